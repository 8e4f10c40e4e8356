"""What people type, and what they are told."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench.cli import VERBS, _arranged, run
from bench.discovery import load
from bench.plugin import KINDS, REGISTRY
from bench.results import read_result
from tests.conftest import BASE, least

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COLUMNS", "200")


def test_help_names_every_plugin_verb_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    load()
    names = [name for kind in KINDS for name in REGISTRY.names(kind)]
    words = text.split()
    assert names
    assert not [name for name in names if name not in words]
    assert all(f"bench {verb}" in text for verb in ("list", "show", "plan", "status", "leaderboard", "doctor"))
    assert "time_limit: 0" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"bench {verb}" in text
    assert not [other for other in VERBS if other != verb and f"bench {other}" in text]


@pytest.mark.parametrize("words", [["--help"], ["list"]])
def test_help_and_list_take_less_than_a_second_of_processor_time(words: list[str], tmp_path: Path) -> None:
    assert least(lambda: seconds_of(words, tmp_path), enough=1.0) < 1.0


def seconds_of(words: list[str], folder: Path) -> float:
    """Seconds of processor time of a command line in a process of its own; compiled modules are kept, as a user's
    are."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-m", "bench", *words], cwd=folder, env=env, check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_show_prints_facts_docstring_and_typed_options(fakes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "defense/fake_shield"]) == 0
    text = capsys.readouterr().out
    for said in ("Protects nothing, quickly.", "Fake et al. 2026", "defense.eps", "float", "4.0", "['a', 'b']"):
        assert said in text


@pytest.mark.parametrize(("words", "said"), [
    (["lst"], "unknown verb 'lst'. Did you mean list"),
    (["list", "attakc"], "unknown kind 'attakc'. Did you mean attack"),
    (["show", "defense/sheild"], "unknown defense 'sheild'"),
    (["show", "nothing"], "give one plugin as <kind>/<name>"),
    (["status", "nowhere"], "unknown suite 'nowhere'"),
    (["leaderboard"], "give one suite"),
    ([*BASE, "defense=fake_sheild"], "unknown name 'fake_sheild'. Did you mean fake_shield"),
    ([*BASE, "sed=3"], "unknown option 'sed'. Did you mean seed"),
    ([*BASE, "attack.step=3"], "attack: unknown option 'step'. Did you mean steps"),
    ([*BASE, "seed=x"], "seed: Value 'x' of type 'str' could not be converted to Integer"),
    ([*BASE, "model=plain"], "this cell is n/a: the customization track needs a text-to-image model"),
    ([*BASE, "hydra/launcher=nothing"], "hydra/launcher: unknown name 'nothing'"),
    ([*BASE, "seed=1,2"], "add --multirun"),
    (["experiment=quickstart", *BASE], "add -m to run it as a grid"),
])
def test_bad_input_is_one_message_and_exit_code_2(
    fakes: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], said: str,
) -> None:
    assert run(words) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error
    assert error.count("error ") == 1


def test_one_cell_runs_here_and_prints_its_measurements(
    fakes: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:
    monkeypatch.setattr("bench.launcher.RUNNER", "tests.fakes:run_cell")
    (tmp_path / "results").mkdir()
    assert run([*BASE, "suite=one"]) == 0
    (folder,) = [path.parent for path in (tmp_path / "results" / "one").glob("*/result.json")]
    assert read_result(folder).status == "ok"
    shown = capsys.readouterr().out
    assert "score" in shown
    assert "0.4 – 0.6" in shown
    assert run([*BASE, "attack.behave=fail"]) == 1
    assert "the attack found no face" in capsys.readouterr().err


def test_plugin_options_of_a_grid_go_to_its_cells() -> None:
    assert _arranged(["-m", "attack=a,b", "attack.name='x, y'", "seed=1"], many=True) == [
        "--multirun", "attack=a,b", "seed=1", "hydra.sweeper.also=['attack.name=\\'x, y\\'']"]
    assert _arranged(["attack.name=x"], many=False) == ["attack.name=x"]
