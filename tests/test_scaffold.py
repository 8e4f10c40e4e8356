"""``bench new-plugin``: what it writes works, and what it cannot write it refuses."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from bench import discovery
from bench.cli import run
from bench.errors import BenchError
from bench.plugin import REGISTRY, facts_of
from bench.results import read_result
from bench.scaffold import SOURCES, new_plugin, read_words
from bench.testing.case import Case
from bench.testing.kit import checks_of

ROOT = Path(__file__).parent.parent
FEW = {"steps": 2, "batch": 4}
"""Options that make a written attack fast on tiny models."""


def written(name: str, kind: str, track: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A written plugin's class, known to the bench until the test ends, and its source. Its module stays imported, so
    no two tests may choose one name."""
    discovery.load()  # before the registry is copied: it loads once per process
    monkeypatch.setattr(REGISTRY, "facts", dict(REGISTRY.facts))
    monkeypatch.setattr(REGISTRY, "classes", dict(REGISTRY.classes))
    wanted = new_plugin([kind, f"{name}_{kind}_{track}", "--track", track, f"--folder={folder / 'p'}"])
    source = folder / "p" / "src" / f"{wanted.module}.py"
    monkeypatch.syspath_prepend(source.parent)
    importlib.import_module(wanted.module)
    return REGISTRY.get(kind, wanted.name), source


@pytest.mark.parametrize(("kind", "track"), [pair for pair in SOURCES if pair not in
                                             (("defense", "editing"), ("metric", "editing"))])
def test_every_written_plugin_is_short_and_conforms(
    kind: str, track: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls, source = written("short", kind, track, tmp_path, monkeypatch)
    assert len([line for line in source.read_text().splitlines() if line.strip()]) <= 30
    assert "{{" not in "".join(path.read_text() for path in (tmp_path / "p").rglob("*.*") if path.is_file())
    options = {key: value for key, value in FEW.items() if hasattr(cls, key)} if kind == "attack" else {}
    case = Case(cls, options, apart=hasattr(cls, "protect"))
    for label, check in checks_of(case).items():
        (tmp_path / label).mkdir()
        check(case, tmp_path / label)


@pytest.mark.parametrize("kind", ["defense", "attack", "metric"])
def test_the_quickstart_has_cells_for_a_plugin_of_the_editing_track(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    name = facts_of(written("quick", kind, "editing", tmp_path, monkeypatch)[0]).name
    grid = read_words([kind, name, "--track=editing"]).grid
    assert run(["plan", "-m", *grid.split(), f"results={tmp_path}"]) == 0
    assert kind == "metric" or name in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["defence", "mine"], "unknown kind 'defence'. Did you mean defense"),
    (["defense", "mine", "--track", "photos"], "unknown track 'photos'.*Valid: backdoor, customization, editing"),
    (["defense", "My-Own"], "'My-Own' cannot be a plugin's name; give lower-case letters"),
    (["defense", "lambda"], "'lambda' cannot be a plugin's name"),
    (["defense", "noise"], "'noise' is taken by the defense defenses.noise:SignNoise"),
    (["defense", "aspl_quick"], "'aspl_quick' is taken by the preset defense/aspl_quick.yaml"),
    (["metric", "ism"], "'ism' is taken by the metric metrics.ism"),
    (["defense", "mine", "--fodler", "x"], "unknown option '--fodler'. Did you mean --folder"),
    (["defense"], "give a kind and a name, for example bench new-plugin defense mine"),
    (["defense", "mine", "--track"], "--track lacks a value"),
])
def test_what_cannot_be_written_is_one_clear_error(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match=message):
        new_plugin(words)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for words in (["defense", "mine"], ["defense", "mine", "--folder", "file"]):
        with pytest.raises(BenchError, match="is there and not an empty folder"):
            new_plugin(words)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_verb_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new-plugin", "metric", "my_score", "--track=backdoor"]) == 0
    shown = capsys.readouterr().out
    for command in read_words(["metric", "my_score", "--track=backdoor"]).commands():
        assert command in shown
        assert command in (tmp_path / "my_score" / "README.md").read_text()
    assert "also.metrics=my_score" in shown


def fresh(folder: Path, installed: bool) -> dict[str, str]:
    """The environment of a new virtual environment in which everything that this one has can be imported.

    ``installed``: with the bench itself as a wheel from a copy of the checkout; else with the checkout.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    parent = sysconfig.get_path("purelib")
    # A line of a .pth file that starts with `import` is run: the parent's own .pth files count, too.
    (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    unset = ("PYTHONPATH", "BENCH_RESULTS", "BENCH_STORE")
    home = {key: value for key, value in os.environ.items() if key not in unset}
    script = folder / "bin" / "bench"
    script.write_text('#!/bin/sh\nexec python -m bench "$@"\n')
    script.chmod(0o755)
    if installed:
        copy = shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(
            ".*", "results", "build", "*.egg-info", "__pycache__", "tests"))
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
                        "--no-index", str(copy)], check=True, capture_output=True, cwd=folder)
    return {**home, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder),
            "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **({} if installed else {"PYTHONPATH": str(ROOT)})}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_five_commands_lead_from_an_empty_folder_to_a_board(installed: bool, tmp_path: Path) -> None:
    env, home = fresh(tmp_path / "venv", installed), tmp_path / "home"
    home.mkdir()
    commands = ["bench new-plugin defense mine", *read_words(["defense", "mine"]).commands()]
    assert len(commands) == 5
    commands[1] = "python -m " + commands[1].replace("-e", "--no-build-isolation --no-deps --no-index -e")  # no network
    commands[2] = "python -m " + commands[2]
    shown = [subprocess.run(shlex.split(command), env=env, cwd=home, capture_output=True, text=True)
             for command in commands]
    for command, done in zip(commands, shown, strict=True):
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    rows = [read_result(path.parent) for path in (home / "results" / "quickstart").glob("*/result.json")]
    ours = [row for row in rows if row.cell.defense.name == "mine"]
    assert {row.status for row in rows} == {"ok"} and len(ours) == 2  # with and without a purifier
    board = json.loads((home / "results" / "quickstart" / "leaderboard.json").read_text())
    assert "mine" in json.dumps(board) and " mine " in shown[-1].stdout
