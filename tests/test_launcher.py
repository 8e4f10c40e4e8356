"""Cells in processes of their own: whatever one does, the others finish and its end is on record."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from bench.config import Cell, Settings
from bench.launcher import Ended, Pool, Running, Task, how, workers
from bench.launchers import Progress
from bench.protocols import CustomizationProtocol
from bench.results import read_result
from tests import fakes

RUNNER = "tests.fakes:run_cell"


def cell(name: str, behave: str = "ok") -> Cell:
    return Cell(name, "s", "customization", "text", "d", frozenset(), False, 0, fakes.FakePeople(), fakes.FakeShield(),
                fakes.FakeWash(), fakes.FakeAttack(behave=behave), CustomizationProtocol(), {})


def pool(folder: Path, **options: object) -> Pool:
    return replace(Pool(Settings(folder, folder / "store"), 2, runner=RUNNER, preload=("tests.fakes",)), **options)


def test_every_way_to_end_is_recorded_and_hurts_no_other(tmp_path: Path) -> None:
    cells = [cell(name, name) for name in ("exit", "kill", "raise", "fail", "ok")]
    cells.append(cell("na", "n/a"))
    heard: list[Ended] = []
    ended = pool(tmp_path).run(cells, lambda one, left: heard.append(one))
    found = {one.cell.id: (one.status, one.reason) for one in ended}
    assert heard == ended
    assert found["ok"] == ("ok", "")
    assert found["na"] == ("n/a", "no face to attack")
    assert found["fail"] == ("failed", "the attack found no face")
    assert found["exit"][1].startswith("its process ended with exit code 3")
    assert found["kill"][1].startswith("killed by signal 9 (SIGKILL)")
    assert found["raise"][0] == "failed"
    for name, (status, reason) in found.items():
        result = read_result(tmp_path / "s" / name)
        assert result.status == status
        assert (result.error.message if result.error else result.reason) == reason
    assert "the runner itself broke" in read_result(tmp_path / "s" / "raise").error.traceback


def test_a_cell_over_its_time_is_ended(tmp_path: Path) -> None:
    ended = pool(tmp_path, time_limit=4.0).run([cell("a", "hang"), cell("b")], lambda one, left: None)
    reasons = {one.cell.id: one.reason for one in ended}
    assert reasons == {"a": "exceeded its time limit of 4 s", "b": ""}


def test_stop_starts_no_cell_after_a_failure(tmp_path: Path) -> None:
    cells = [cell("a", "fail"), cell("b"), cell("c")]
    ended = pool(tmp_path, workers=1, stop=True).run(cells, lambda one, left: None)
    assert [one.cell.id for one in ended] == ["a"]


def test_an_old_result_is_not_taken_for_this_runs(tmp_path: Path) -> None:
    fakes.run_cell(cell("a"), Settings(tmp_path, tmp_path))
    (one,) = pool(tmp_path).run([cell("a", "exit")], lambda one, left: None)
    assert one.status == "failed"
    assert read_result(tmp_path / "s" / "a").status == "failed"


def test_each_cell_has_a_process_of_its_own_and_a_log(tmp_path: Path) -> None:
    pool(tmp_path).run([cell("a"), cell("b")], lambda one, left: None)
    pids = [line.split()[2] for line in (tmp_path / "ran.txt").read_text().splitlines()]
    assert len(set(pids)) == 2
    assert (tmp_path / "s" / "a" / "log.txt").is_file()


def test_cells_that_would_wait_for_one_another_do_not_start_together(tmp_path: Path) -> None:
    """The protected photos of seed 0 are being built: what needs them lets what does not need them go first."""
    builds, needs, waits = (replace(cell(name), attack=fakes.FakeAttack(steps=steps))
                            for name, steps in (("builds", 1), ("needs", 2), ("waits", 3)))
    elsewhere = replace(needs, id="elsewhere", seed=1)
    tried = pool(tmp_path)
    queue = [Task(one, tried.settings) for one in (builds, needs, waits, elsewhere)]
    assert tried._next(queue) == 0
    tried.running = [Running(queue.pop(0), None, 0)]
    assert queue[tried._next(queue)].cell.id == "elsewhere"
    tried.running.append(Running(queue.pop(), None, 1))
    assert queue[tried._next(queue)].cell.id == "needs", "where all would wait, the first of them does"


def test_the_time_left_counts_stages_and_the_cells_that_share_them_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Four stages, three cells each: 600 s for the first of a stage, 10 s for what shares it, two at a time."""
    cells = [replace(cell(f"{seed}-{place}"), seed=seed) for place in range(3) for seed in range(4)]
    progress = Progress(cells, 2)
    with caplog.at_level(logging.INFO):
        for done, one in enumerate(cells, 1):
            progress.report(Ended(one, "ok", 600.0 if done <= 4 else 10.0, ""), len(cells) - done)
    said = [line.partition(" s)")[2] for line in caplog.messages]
    assert said[0] == " · 11 left", "nobody knows yet what the others take"
    assert said[4] == " · 7 left, about 35 s"
    assert said[-2:] == [" · 1 left, about 10 s", ""]
    alone = Progress([replace(cell(str(seed)), seed=seed) for seed in range(5)])
    with caplog.at_level(logging.INFO):
        alone.report(Ended(alone.cells[0], "ok", 60.0, ""), 4)
    assert caplog.messages[-1].endswith(" · 4 left, about 4 min")


@pytest.mark.parametrize(("code", "said"), [
    (-9, "killed by signal 9 (SIGKILL); perhaps the machine ran out of memory"), (-11, "killed by signal 11 (SIGSEGV)"),
    (3, "its process ended with exit code 3 and left no result; see log.txt in its folder"),
])
def test_how_a_process_ended(code: int, said: str) -> None:
    assert how(code) == said


def test_workers_default_to_cores_or_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr("bench.launcher.gpus", lambda: ["4", "5"])
    assert (workers(7, "cpu"), workers(0, "cpu"), workers(0, "cuda")) == (7, 3, 2)
