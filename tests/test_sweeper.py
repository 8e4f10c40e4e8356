"""Planning a grid, launching what is missing, and saying how it went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf

from bench.cli import run
from bench.config import Cell
from bench.errors import BenchError
from bench.explain import explained
from bench.planner import cell_of as whole
from bench.planner import expand, in_order, resolve_cells
from bench.results import read_result
from tests.conftest import BASE, Compose
from tests.test_config import cell_of
from tests.test_launcher import cell

GRID = ("-m", *BASE, "hydra.launcher.runner=tests.fakes:run_cell", "hydra.launcher.preload=tests.fakes", "suite=grid")


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: ModuleType) -> None:
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path))
    monkeypatch.setenv("BENCH_STORE", str(tmp_path / ".store"))
    monkeypatch.setenv("COLUMNS", "200")


def ran(folder: Path) -> list[str]:
    """What the runner was asked for, in order: how each cell behaves."""
    file = folder / "ran.txt"
    return [line.split()[1] for line in file.read_text().splitlines()] if file.exists() else []


def statuses(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in (folder / "grid").glob("*/result.json"):
        status = read_result(path.parent).status
        found[status] = found.get(status, 0) + 1
    return found


def test_a_block_is_a_product_and_the_command_line_goes_over_it() -> None:
    block = {"model": "m", "attack": ["a", "b"], "seed": [0, 1], "metrics": "[x,y]", "allow_pickle": True}
    points = expand([], [block])
    assert len(points) == 4
    assert points[0] == ["model=m", "attack=a", "seed=0", "metrics=[x,y]", "allow_pickle=true"]
    assert len(expand(["seed=5"], [block])) == 2
    assert len(expand(["seed=1,2,3", "defense=d,e"], [block])) == 2 * 3 * 2
    assert expand(["seed=1,2"], []) == [["seed=1"], ["seed=2"]]
    assert len(expand([], [{"attack": "a,b"}, {"attack": "c"}])) == 3
    assert expand([], [{"surrogate": ["", "m"]}]) == [["surrogate="], ["surrogate=m"]]


@pytest.mark.parametrize(("words", "block"), [
    ([], {"metrics": ["a", "b", "c"]}), ([], {"metrics": ["[a,b]", "c", "a"]}), ([], {"metrics": "a,b,c"}),
    (["metrics=a,b,c"], {"metrics": "[d]"}), (["metrics=a,b", "metrics=[c]"], {})])
def test_metrics_of_a_choice_are_all_measured_in_each_cell(words: list[str], block: dict[str, object]) -> None:
    """They make no cells: of equal cells that differed in metrics the first alone would run."""
    assert [point[-1:] for point in expand(words, [block])] == [["metrics=[a,b,c]"]]


@pytest.mark.parametrize("value", [{"a": 1}, [["x"]], []])
def test_a_block_refuses_what_is_no_word(value: object) -> None:
    with pytest.raises(BenchError, match="blocks: 'attack' has"):
        expand([], [{"attack": value}])


def test_all_errors_come_at_once_and_equal_cells_are_one(compose: Compose) -> None:
    points = [["seed=1"], ["attack=fake_atack"], ["seed=2"], ["attack.step=3"], ["attack.steps=x"], ["seed=-1"],
              ["model=nowhere"], ["metrics=fake_score"], ["sed=1"], ["metrics.fid.n=1"], ["seed=[1"]]
    with pytest.raises(BenchError) as caught:
        resolve_cells(points, compose)
    message = str(caught.value)
    for said in ("attack: unknown name 'fake_atack'. Did you mean fake_attack", "attack: unknown option 'step'. Did "
                 "you mean steps", "attack.steps: Value 'x' of type 'str' could not be converted to Integer",
                 "seed=-1 is out of range", "unknown checkpoint 'nowhere'", "command line: unknown option 'sed'. Did "
                 "you mean seed", "add it: metrics=[fid]", "'seed=[1' is not understood"):
        assert said in message
    assert len(resolve_cells([["seed=1"], ["seed=0"], ["seed=1", "device=cpu"]], compose)) == 2


def test_neighbours_build_different_first_stages(compose: Compose) -> None:
    cells = [cell_of(compose, f"defense={d}", f"attack.steps={s}") for d in ("none", "fake_shield") for s in (1, 2, 3)]
    order = [type(one.defense).__name__ for one in in_order(cells)]
    assert all(a != b for a, b in pairwise(order))
    assert {one.id for one in in_order(cells)} == {one.id for one in cells}


def test_a_sweep_records_every_end_and_runs_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    words = (*GRID, "attack.behave=ok,fail,kill", "defense=none,fake_cleaner")
    assert run(words) == 1
    assert statuses(tmp_path) == {"ok": 1, "failed": 2, "n/a": 3}
    assert sorted(ran(tmp_path)) == ["fail", "kill", "ok"]
    shown = capsys.readouterr()
    assert "6 cells: 3 run, 3 n/a" in shown.out
    assert "fake_cleaner repairs models; the customization track defends images" in shown.out
    assert "the attack found no face" in shown.err
    assert "killed by signal 9" in shown.err
    assert run(words) == 1
    assert sorted(ran(tmp_path)) == ["fail", "fail", "kill", "kill", "ok"]
    assert len((tmp_path / "grid" / "plan.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "grid" / "leaderboard.md").is_file()


def test_a_finished_sweep_runs_nothing_until_it_is_forced_or_lacks_a_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    assert run((*GRID, "seed=0,1")) == 0
    assert run((*GRID, "seed=0,1")) == 0
    assert len(ran(tmp_path)) == 2
    assert "2 cells: 2 done" in capsys.readouterr().out
    assert run(("plan", *GRID, "seed=0,1", "metrics.fake_score.n=5")) == 0
    assert "lacks fake_score" in capsys.readouterr().out
    assert run((*GRID, "seed=0,1", "mode=retry")) == 0
    assert len(ran(tmp_path)) == 2
    assert run((*GRID, "seed=0,1", "mode=force")) == 0
    assert len(ran(tmp_path)) == 4


def test_a_plan_runs_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(("plan", *GRID, "seed=0,1,2")) == 0
    assert "3 cells: 3 run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_bad_input_stops_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run((*GRID, "defense=none,fake_sheild", "attack.steps=x")) == 2
    error = capsys.readouterr().err
    assert "defense: unknown name 'fake_sheild'. Did you mean fake_shield" in error
    assert "Traceback" not in error
    assert ran(tmp_path) == []


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.launcher.RUNNER", "tests.fakes:run_cell")


@pytest.mark.usefixtures("in_process")
def test_hydras_basic_launcher_runs_the_same_cells(tmp_path: Path) -> None:
    words = ("-m", *BASE, "suite=grid", "hydra/launcher=basic", "attack.behave=ok,raise,fail")
    assert run(words) == 1
    assert statuses(tmp_path) == {"ok": 1, "failed": 2}
    planned = [json.loads(line) for line in (tmp_path / "grid" / "plan.jsonl").read_text().splitlines()]
    assert {line["cell"] for line in planned} == {p.parent.name for p in (tmp_path / "grid").glob("*/result.json")}


@pytest.mark.usefixtures("in_process")
def test_a_job_that_is_not_the_planned_one_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    from bench import sweeper

    monkeypatch.setattr(sweeper, "in_order", lambda cells: [_renamed(one) for one in cells])
    assert run(("-m", *BASE, "suite=grid", "hydra/launcher=basic")) == 1
    assert "changed since this sweep was planned" in " ".join(capsys.readouterr().err.split())
    assert ran(tmp_path) == []
    assert statuses(tmp_path) == {}


def _renamed(one: Cell) -> Cell:
    from dataclasses import replace

    return replace(one, id="0" * 16)


def test_a_cell_that_is_named_by_hand_has_a_title() -> None:
    assert cell("a").title() == "fake_shield (described) · fake_wash · fake_attack · text · seed 0"


def test_cells_from_parts_are_those_composed_whole_from_fewer_configs(compose: Compose) -> None:
    asked: list[tuple[str, ...]] = []

    def counted(words: Sequence[str]) -> DictConfig:
        asked.append(tuple(words))
        return compose(words)

    grid = {"defense": ["none", "fake_shield"], "purifier": ["none", "fake_wash"], "seed": [0, 1], "stamp": '"a, b"',
            "customization.steps": [4, 8], "attack.steps": [1, 2, 3], "metrics": "[fake_score]",
            "metrics.fake_score.n": 9}
    points = expand([], [grid])
    cells = resolve_cells(points, counted)
    assert cells == [whole(point, compose) for point in points]
    assert len(cells) == 48 and len(asked) <= 1 + 2 + 2 + 3 + 1
    assert {cell.stamp for cell in cells} == {"a, b"} and {cell.protocol.steps for cell in cells} == {4, 8}


@pytest.mark.parametrize("word", ["sede=1", "seed=two", "+seed=1", "backdoor.samples=none", "experiment=none_such"])
def test_a_wrong_word_about_the_root_is_told_as_the_whole_config_tells_it(compose: Compose, word: str) -> None:
    points = [["defense=fake_shield", word]]
    with pytest.raises(Exception) as expected:
        whole(points[0], compose)
    with pytest.raises(BenchError) as told:
        resolve_cells(points, compose)
    assert str(told.value) == str(explained(expected.value))


@pytest.mark.parametrize(("sets", "value", "expected"), [
    ("seed", 7, [(7, 4.0), (7, 4.0)]), ("defense.eps", "${attack.steps}", [(0, 1.0), (0, 2.0)]),
])
def test_a_choice_that_reaches_beyond_its_node_is_composed_whole(
    compose: Compose, sets: str, value: object, expected: list[tuple[int, float]],
) -> None:
    def reaching(words: Sequence[str]) -> DictConfig:
        cfg = compose([word for word in words if word != "defense.eps=8"])
        if "defense.eps=8" in words:
            OmegaConf.update(cfg, sets, value)
        return cfg

    points = [["defense=fake_shield", "defense.eps=8", f"attack.steps={steps}"] for steps in (1, 2)]
    cells = resolve_cells(points, reaching)
    assert cells == [whole(point, reaching) for point in points]
    assert [(cell.seed, cell.defense.eps) for cell in cells] == expected
