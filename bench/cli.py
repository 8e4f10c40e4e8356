"""``bench``: verbs first, everything else is Hydra."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bench import discovery
from bench.errors import BenchError, unknown
from bench.plugin import GROUPS, KINDS, REGISTRY

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.config import Cell

MOVED = ("defense.", "attack.", "purifier.", "data.", "metrics.", "only.", "also.")
"""Overrides of plugins that only a cell has, and changes of a suite: in a grid they go to the sweeper, not to the
master config."""

HELP = """\
bench - compose defense x attack x metric grids on diffusion models, run them, rank them

One cell      bench defense={defense} attack={attack}
              bench defense={defense} attack={attack} model=micro-sd-b seed=1
A grid        bench -m defense=none,{defense} attack={attack} seed=0,1,2
A suite       bench -m experiment={suite}
              the same command again runs only what is missing
              bench -m experiment={suite} only.seed=0 also.defense=<yours>
              only. leaves out what is not chosen, also. adds a defense, attack, purifier or metric

Verbs         bench list [kind]           plugins, with what they need and are told
              bench list models           checkpoints by name
              bench show <kind>/<name>    one plugin: paper, options, defaults
              bench plan -m ...           the grid's cells: run, done or n/a and why; runs nothing
              bench status <suite>        what a suite has finished and what runs; --watch: live
              bench leaderboard <suite>   rank a suite's results
              bench verify <folder>       recompute identities, hashes and values; --reproduce K runs K cells again
              bench send <suite>          send results and board to Weights & Biases, offline or --online
              bench new-plugin <kind> <name>  write a package with a plugin of your own;
                                          --track customization|editing|backdoor, --folder <where>
              bench doctor                check this installation

Choose with <group>=<name>, set options with <group>.<option>=<value>:
{groups}
Other options (defaults in conf/config.yaml):
{options}
Hydra's own   bench --hydra-help          launchers, completion, --cfg job, --info, ...
"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 a cell failed, 2 bad input, 130 interrupted."""
    from bench import terminal

    try:
        discovery.load()
        terminal.show_warnings(discovery.warnings())
        return _dispatch(list(words))
    except BenchError as error:
        terminal.show_error(str(error))
        return 2
    except KeyboardInterrupt:
        terminal.show_error("interrupted. What was finished is kept; the same command runs only what is missing.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:  # of a parser that has printed its help
        return end.code if isinstance(end.code, int) else 0


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if words[0] in VERBS and words[0] not in PARSED and {"-h", "--help"} & {*words[1:]}:
        print(verb_help(words[0]), end="")
        return 0
    if words[0] in VERBS:
        return VERBS[words[0]](words[1:])
    if "=" not in words[0] and not words[0].startswith("-"):
        raise unknown("verb", words[0], "bench", VERBS)
    return _hydra(words)


def help_text() -> str:
    """What ``bench --help`` prints."""
    found = groups()
    defense, attack = _example()
    suite = (found["experiment"] or ["<suite>"])[0]
    return HELP.format(groups="".join(_group_line(group, names) for group, names in found.items()),
                       options=_options(), defense=defense, attack=attack, suite=suite)


def verb_help(verb: str) -> str:
    """What the help of all says of one verb."""
    verbs = HELP.partition("\nVerbs")[2].partition("\n\n")[0]
    told = [said for said in re.split(r"^ +(?=bench )", verbs, flags=re.M) if said.startswith(f"bench {verb} ")]
    return f"{''.join(told).rstrip()}\n`bench --help` tells of the other verbs and of all options.\n"


def _example() -> tuple[str, str]:
    """A defense that protects photos and an attack that meets it, for examples that work as they stand."""
    attacks = [n for n in REGISTRY.names("attack") if "customization" in REGISTRY.facts["attack", n].track]
    defenses = [n for n in REGISTRY.names("defense") if REGISTRY.facts["defense", n].acts_on == "images"]
    return (defenses or ["<name>"])[0], (attacks or ["<name>"])[0]


def groups() -> dict[str, list[str]]:
    """Hydra groups with their options: plugins, presets and suites."""
    from bench.config import config_folder

    conf = config_folder()
    names = {GROUPS.get(kind, kind): REGISTRY.names(kind) for kind in KINDS}
    names["experiment"] = []
    return {group: sorted({*known, *_presets(conf / group)}) for group, known in names.items()}


def _presets(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*.yaml")]


def _group_line(group: str, names: Sequence[str], width: int = 100) -> str:
    import textwrap

    shown = " ".join(names) or "(none)"
    return textwrap.fill(shown, width, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14) + "\n"


def _options() -> str:
    """The root options with the comments of conf/config.yaml."""
    from bench.config import config_folder

    lines = (config_folder() / "config.yaml").read_text().split("\nsuite:")[1].split("\nhydra:")[0]
    return "".join(f"  {line}\n" for line in f"suite:{lines}".splitlines() if line.strip())


def _list(words: list[str]) -> int:
    from bench import terminal

    if words == ["models"]:
        from bench.diffusion.checkpoints import aliases

        print("\n".join(aliases()))
        return 0
    kinds = [_kind(word) for word in words] or list(KINDS)
    terminal.show_plugins(kinds)
    return 0


def _kind(word: str) -> str:
    names = {**{GROUPS.get(kind, kind): kind for kind in KINDS}, **{kind: kind for kind in KINDS}}
    plural = {f"{kind}s": kind for kind in KINDS}
    if word not in names | plural:
        raise unknown("kind", word, "bench list", [*names, "models"])
    return (names | plural)[word]


def _show(words: list[str]) -> int:
    from bench import terminal

    if len(words) != 1 or "/" not in words[0]:
        raise BenchError("bench show: give one plugin as <kind>/<name>, for example bench show defense/none.")
    group, _, name = words[0].partition("/")
    kind = _kind(group)
    if (kind, name) not in REGISTRY.classes:
        discovery.raise_if_broken(name)
        return _show_preset(kind, name)
    terminal.show_plugin(REGISTRY.facts[kind, name], REGISTRY.get(kind, name))
    return 0


def _show_preset(kind: str, name: str) -> int:
    """A preset is a file: print it."""
    from bench.config import config_folder

    group = GROUPS.get(kind, kind)
    file = config_folder() / group / f"{name}.yaml"
    if name not in groups()[group]:
        raise unknown(kind, name, "bench show", groups()[group])
    print(f"# preset {group}={name}\n{file.read_text()}", end="")
    return 0


def _plan(words: list[str]) -> int:
    return _hydra([*words, "hydra.sweeper.launch=false"], multirun=True)


def _status(words: list[str]) -> int:
    from bench import terminal
    from bench.live import Watch

    asked = Words("status", "What of a suite's plan is finished, what runs and what failed.")
    asked.add_argument("suite", help="a suite below results/, or its folder")
    asked.add_argument("-w", "--watch", action="store_true", help="live, until no sweep is at work")
    given = asked.parse_args(words)
    watch = Watch(_suite_folder([given.suite], "status"))
    if given.watch:
        last = terminal.watch_status(watch.until_over())
    else:
        last = watch.look()
        terminal.show_status(last)
    return 1 if last is not None and "failed" in last.count() else 0


def _leaderboard(words: list[str]) -> int:
    from bench.leaderboard import print_boards, write_boards

    folder = _suite_folder(words, "leaderboard")
    print_boards(write_boards(folder), folder=folder)
    return 0


def _verify(words: list[str]) -> int:
    from bench import terminal
    from bench.verify import reproduce_cells, told, verify_folder

    asked = Words("verify", "Recompute identities, hashes, values and boards of a results folder, and grade it: "
                  "claimed, consistent or reproduced.")
    asked.add_argument("folder", help="a suite, or a folder of suites")
    asked.add_argument("--reproduce", type=int, default=0, metavar="K", help="run K cells again and compare")
    asked.add_argument("--seed", type=int, default=0, help="draws which cells are run again (default 0)")
    asked.add_argument("--store", type=Path, default=Path(os.environ.get("BENCH_STORE", "results/.store")),
                       help="artefacts to check as well, where they are at hand (default results/.store)")
    given = asked.parse_args(words)
    reports = verify_folder(_suite_folder([given.folder], "verify"), given.store)
    for report in reports:
        if given.reproduce:
            reproduce_cells(report, given.reproduce, given.seed, _device(), terminal.show_note)
        terminal.show_lines(told(report))
    return 1 if any(report.problems for report in reports) else 0


def _send(words: list[str]) -> int:
    from bench import terminal
    from bench.config import Tracker
    from bench.sending import send_suite
    from bench.tracking import WandbTracker

    asked = Words("send", "Send a finished suite to Weights & Biases: a run per cell, the board, and where files lie. "
                  "What was sent before is not sent again.")
    asked.add_argument("suite", help="a suite below results/, or its folder")
    asked.add_argument("--online", action="store_true", help="send now (default: write runs for `wandb sync`)")
    asked.add_argument("--project", default=Tracker().project, help="W&B project (default %(default)s)")
    asked.add_argument("--entity", help="W&B user or team (default: yours)")
    given = asked.parse_args(words)
    folder = _suite_folder([given.suite], "send")
    mode = "online" if given.online else "offline"
    sent = send_suite(folder, WandbTracker(given.project, mode, given.entity), terminal.show_error)
    terminal.show_lines([f"{folder}: {sent.told()}"])
    if sent.new and not given.online:
        terminal.show_lines([f"upload with: wandb sync {folder}/wandb/offline-run-*"])
    return 1 if sent.failed else 0


def _device() -> str:
    from bench.config import gpus

    return "cuda" if gpus() else "cpu"


class Words(argparse.ArgumentParser):
    """The words after a verb; what is wrong with them is one error like any other."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(prog=f"bench {verb}", description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{self.prog}: {message}. `{self.prog} --help` lists what it takes.")


def _suite_folder(words: list[str], verb: str) -> Path:
    """``results/<suite>``, or a folder given as it is."""
    if len(words) != 1:
        raise BenchError(f"bench {verb}: give one suite, for example bench {verb} quickstart.")
    results = Path(os.environ.get("BENCH_RESULTS", "results"))
    for folder in (results / words[0], Path(words[0])):
        if folder.is_dir():
            return folder
    found = [p.name for p in results.glob("*") if p.is_dir() and not p.name.startswith(".")]
    raise unknown("suite", words[0], f"bench {verb}", found)


def _doctor(words: list[str]) -> int:
    from bench.doctor import examine

    return examine()


def _new_plugin(words: list[str]) -> int:
    from bench.scaffold import new_plugin

    wanted = new_plugin(words)
    print(f"Wrote {wanted.folder}: your method goes into src/{wanted.module}.py. Next:")
    print("".join(f"  {command}\n" for command in wanted.commands()), end="")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "list": _list, "show": _show, "plan": _plan, "status": _status, "leaderboard": _leaderboard, "doctor": _doctor,
    "new-plugin": _new_plugin,
    "verify": _verify, "send": _send,
}
PARSED = ("status", "verify", "send")
"""Verbs that know ``--help`` themselves."""


def _hydra(words: list[str], multirun: bool = False) -> int:
    """Hand the words to Hydra, and tell its errors our way."""
    import hydra

    from bench.config import config_folder, store_schema
    from bench.explain import EXPLAINABLE, explained
    from bench.sweeper import register

    store_schema()
    register()
    many = multirun or any(word in ("-m", "--multirun") for word in words)
    sys.argv = ["bench", *_arranged([_short(word) for word in words], many)]
    app = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(job)
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with _raised_errors():
            app()
    except EXPLAINABLE as error:
        if traced:
            raise
        raise explained(error) from error
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


@contextmanager
def _raised_errors() -> Iterator[None]:
    """Let Hydra raise its errors; left alone it prints them in its own way and exits."""
    name = "HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _arranged(words: list[str], many: bool) -> list[str]:
    """In a grid, overrides of plugin options go to the sweeper: only its cells have these plugins."""
    if not many and (lost := [word for word in words if word.lstrip("+").startswith(("only.", "also."))]):
        raise BenchError(f"{lost[0]}: changes a grid; add -m.")
    if not many:
        return words
    moved = [word for word in words if word.lstrip("+~").startswith(MOVED)]
    kept = [word for word in words if word not in (*moved, "-m", "--multirun")]
    also = ",".join(_quoted(word) for word in moved)
    return ["--multirun", *kept, f"hydra.sweeper.also=[{also}]"] if moved else ["--multirun", *kept]


def _short(word: str) -> str:
    """``launcher=joblib`` for Hydra's ``hydra/launcher=joblib``, ``launcher.x=1`` for ``hydra.launcher.x=1``."""
    if word.startswith("launcher="):
        return f"hydra/{word}"
    return f"hydra.{word}" if word.startswith("launcher.") else word


def _quoted(word: str) -> str:
    """A word as a quoted string of Hydra's grammar."""
    return "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"


def job(cfg: DictConfig) -> None:
    """Hydra's task function: run the one cell of a config."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bench import terminal

    discovery.load()
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run_planned(cfg)
        return
    try:
        code = run_single(cfg)
    except BenchError as error:
        terminal.show_error(str(error))
        code = 2
    raise SystemExit(code)


def run_planned(cfg: DictConfig) -> None:
    """A job of a sweep under one of Hydra's launchers: refuses to run anything but what was planned."""
    from bench.config import settings
    from bench.launcher import RUNNER, function
    from bench.sweeper import PlanChanged

    cell = _cell(cfg)
    if cell.id != cfg.cell:
        raise PlanChanged(f"cell: planned as {cfg.cell}, but its configuration now gives {cell.id}; it changed since "
                          "this sweep was planned. Run the same command again to plan anew.")
    function(RUNNER)(cell, settings(cfg))


def run_single(cfg: DictConfig) -> int:
    """One cell, here and now; prints its measurements."""
    from bench import terminal
    from bench.compat import check
    from bench.config import settings
    from bench.launcher import RUNNER, function

    if cfg.blocks:
        raise BenchError(f"experiment: {cfg.suite} is a suite of many cells; add -m to run it as a grid.")
    cell, how = _cell(cfg), settings(cfg)
    if reason := check(cell):
        raise BenchError(f"this cell is n/a: {reason}.")
    result = function(RUNNER)(cell, how)
    terminal.show_result(result, cell.folder(how.results))
    if result.error:
        terminal.show_error(result.error.message)
    return 1 if result.status == "failed" else 0


def _cell(cfg: DictConfig) -> Cell:
    from hydra.core.hydra_config import HydraConfig

    from bench.config import build

    hydra = HydraConfig.get()
    chosen = {str(k): str(v) for k, v in hydra.runtime.choices.items()}
    words = [word for word in hydra.overrides.task if not word.startswith("cell=")]
    return build(cfg, chosen, tuple(words))
