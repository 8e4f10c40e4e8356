"""``bench new-plugin``: write a package with one working plugin, its tests and the commands that put it on a board."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import discovery
from bench.errors import BenchError, unknown
from bench.plugin import GROUPS, REGISTRY, TRACKS

KINDS = ("defense", "attack", "metric")
TEMPLATES = Path(__file__).parent / "templates"
USAGE = "bench new-plugin: give a kind and a name, for example bench new-plugin defense mine. " \
        f"Kinds: {', '.join(KINDS)}; options: --track {'|'.join(TRACKS)}, --folder <where>."
SOURCES = {
    ("defense", "customization"): "defense_images", ("defense", "editing"): "defense_images",
    ("defense", "backdoor"): "defense_model", ("attack", "customization"): "attack_customization",
    ("attack", "editing"): "attack_editing", ("attack", "backdoor"): "attack_backdoor",
    ("metric", "customization"): "metric_images", ("metric", "editing"): "metric_images",
    ("metric", "backdoor"): "metric_backdoor",
}
"""Kind and track -> template."""
FAST = {"attack_customization": ", options={\"steps\": 2}", "attack_backdoor": ", options={\"steps\": 2, \"batch\": 4}",
        "defense_images": ", apart=True"}
"""What the test hands to the conformance kit. `apart`: each photo is protected by itself."""
CELLS = {"customization": "only.attack=zero_shot only.defense=none,noise",
         "editing": "only.attack=inpaint_micro only.defense=none,noise",
         "backdoor": "only.attack=baddiffusion_quick only.defense=none"}
"""The cheapest cells of a track in the suite."""
SUITE = "quickstart"


@dataclass(frozen=True)
class Wanted:
    """What was asked for. ``folder``: where the package goes."""

    kind: str
    name: str
    track: str
    folder: Path

    @property
    def module(self) -> str:
        return f"bench_{self.name}"

    @property
    def template(self) -> str:
        return SOURCES[self.kind, self.track]

    @property
    def grid(self) -> str:
        """The command that puts the plugin on a board, without ``bench -m``."""
        return f"experiment={SUITE} {CELLS[self.track]} also.{GROUPS.get(self.kind, self.kind)}={self.name}"

    def commands(self) -> list[str]:
        """From the package to a board."""
        return [f"pip install -e {self.folder}", f"pytest {self.folder}", f"bench -m {self.grid}",
                f"bench leaderboard {SUITE}"]


def new_plugin(words: Sequence[str]) -> Wanted:
    """Check the words and write the package; raises BenchError before anything is written."""
    wanted = read_words(words)
    check(wanted)
    write(wanted)
    return wanted


def read_words(words: Sequence[str]) -> Wanted:
    """``KIND NAME [--track T] [--folder F]``, options anywhere."""
    plain: list[str] = []
    options, left = {"--track": "customization", "--folder": ""}, list(words)
    while left:
        word, _, value = left.pop(0).partition("=")
        if word in options:
            if not value and not left:
                raise BenchError(f"{word} lacks a value. {USAGE}")
            options[word] = value or left.pop(0)
        elif word.startswith("-"):
            raise unknown("option", word, "bench new-plugin", options)
        else:
            plain.append(word)
    if len(plain) != 2:
        raise BenchError(USAGE)
    kind, name = plain
    return Wanted(kind, name, options["--track"], Path(options["--folder"] or name))


def check(wanted: Wanted) -> None:
    """Kind and track exist, the name is free and fit for Python, the folder is empty."""
    if wanted.kind not in KINDS:
        raise unknown("kind", wanted.kind, "bench new-plugin", KINDS)
    if wanted.track not in TRACKS:
        raise unknown("track", wanted.track, "bench new-plugin", TRACKS)
    name = wanted.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BenchError(f"bench new-plugin: '{name}' cannot be a plugin's name; give lower-case letters, digits and "
                         "_, starting with a letter, and no word of Python's own.")
    if owner := taken(wanted):
        raise BenchError(f"bench new-plugin: the name '{name}' is taken by {owner}; give another one.")
    if wanted.folder.exists() and (not wanted.folder.is_dir() or any(wanted.folder.iterdir())):
        raise BenchError(f"bench new-plugin: '{wanted.folder}' is there and not an empty folder; give another place "
                         "with --folder, or another name.")


def taken(wanted: Wanted) -> str:
    """Who has the name already, "" if nobody: a plugin of the kind, a preset, or an installed module."""
    from bench.config import config_folder

    discovery.load()
    if (wanted.kind, wanted.name) in REGISTRY.facts:
        return f"the {wanted.kind} {REGISTRY.facts[wanted.kind, wanted.name].origin}"
    preset = config_folder() / GROUPS.get(wanted.kind, wanted.kind) / f"{wanted.name}.yaml"
    if preset.is_file():
        return f"the preset {preset.parent.name}/{preset.name}"
    return f"the installed module {wanted.module}" if importlib.util.find_spec(wanted.module) else ""


def write(wanted: Wanted) -> None:
    """The package's files, from the templates."""
    told = values(wanted)
    for template, target in (("pyproject.toml", "pyproject.toml"), ("README.md", "README.md"),
                             (f"{wanted.template}.py", f"src/{wanted.module}.py"),
                             ("test.py", f"tests/test_{wanted.name}.py")):
        path = wanted.folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled((TEMPLATES / f"{template}.txt").read_text(), told))


def values(wanted: Wanted) -> dict[str, str]:
    """What the templates leave open."""
    article = "An" if wanted.kind == "attack" else "A"
    return {
        "name": wanted.name, "kind": wanted.kind, "group": wanted.kind, "module": wanted.module,
        "Class": "".join(part.capitalize() for part in wanted.name.split("_")),
        "distribution": wanted.module.replace("_", "-"), "A kind": f"{article} {wanted.kind}",
        "commands": "\n".join(wanted.commands()), "arguments": FAST.get(wanted.template, ""),
    }


def filled(text: str, told: Mapping[str, str]) -> str:
    """The text with every ``{{word}}`` replaced."""
    return re.sub(r"\{\{([^}]+)\}\}", lambda found: told[found[1]], text)
