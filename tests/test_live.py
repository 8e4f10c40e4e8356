"""How a suite stands: from its plan, its results and the leases of who is at work."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import terminal
from bench.config import Settings
from bench.errors import BenchError
from bench.launcher import SWEEP, running_folder
from bench.lease import SUFFIX, Lease
from bench.live import Watch
from bench.planner import Planned, freeze
from bench.store import LOCKS
from tests import fakes
from tests.test_launcher import cell


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Six planned cells, of which one is done before the plan, one n/a, two ended since, and two are left."""
    cells = {name: cell(name, behave) for name, behave in
             {"before": "ok", "never": "n/a", "good": "ok", "bad": "fail", "next": "ok", "last": "ok"}.items()}
    todo = {"before": "done", "never": "n/a"}
    how = Settings(tmp_path, tmp_path / "store")
    fakes.run_cell(cells["before"], how)
    list(freeze([Planned(one, todo.get(name, "run")) for name, one in cells.items()], tmp_path))
    minute = time.time() - 60
    os.utime(tmp_path / "s" / "before" / "result.json", (minute - 60,) * 2)
    os.utime(tmp_path / "s" / "plan.jsonl", (minute,) * 2)
    for name in ("never", "good", "bad"):
        fakes.run_cell(cells[name], how)
    return tmp_path / "s"


def test_counts_and_what_is_left_of_a_sweep_that_ended_early(suite: Path) -> None:
    snapshot = Watch(suite).look()
    assert snapshot.count() == {"ok": 2, "n/a": 1, "failed": 1, "missing": 2}
    assert (snapshot.left(), snapshot.ended, snapshot.alive(), snapshot.eta()) == (2, 2, False, None)
    assert "2 to do; no sweep is at work" in terminal.status_line(snapshot)
    assert {state.cell: state.reason for state in snapshot.states}["bad"] == "the attack found no face"


def test_who_runs_what_and_when_it_may_be_over(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, locks = running_folder(suite), tmp_path / "store" / LOCKS
    folder.mkdir(parents=True)
    locks.mkdir(parents=True)
    sweep = Lease(folder / f"{SWEEP}1{SUFFIX}", str(tmp_path / "store"))
    with sweep, Lease(folder / f"next{SUFFIX}", "next · seed 0"), Lease(locks / f"train-77{SUFFIX}", "train"):
        snapshot = Watch(suite).look()
        assert snapshot.count()["running"] == 1 and snapshot.count()["missing"] == 1
        (work,) = snapshot.work
        assert (work.title, work.stage, work.owner.pid) == ("next · seed 0", "train", os.getpid())
        assert snapshot.eta() == pytest.approx(60, abs=10), "two ended in a minute, two are left"
        terminal.show_status(snapshot)
    shown = capsys.readouterr().out
    assert "train" in shown and f"process {os.getpid()} on" in shown and "2 to do, about" in shown


def test_a_cell_that_runs_again_is_running_whatever_it_was_before(suite: Path) -> None:
    folder = running_folder(suite)
    folder.mkdir(parents=True)
    with Lease(folder / f"bad{SUFFIX}", "again"):
        assert {state.cell: state.status for state in Watch(suite).look().states}["bad"] == "running"


def test_watching_ends_when_nobody_is_at_work_and_tells_every_change(
    suite: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    folder = running_folder(suite)
    folder.mkdir(parents=True)
    lease = Lease(folder / f"next{SUFFIX}", "next")
    lease.take()
    watch, told = Watch(suite), []
    for snapshot in watch.until_over(0.01):
        told.append(snapshot.count())
        if len(told) == 2:
            fakes.run_cell(replace(cell("next"), suite="s"), Settings(suite.parent, suite.parent / "store"))
            lease.release()
    assert told == [{"ok": 2, "n/a": 1, "failed": 1, "running": 1, "missing": 1}] * 2 + [
        {"ok": 3, "n/a": 1, "failed": 1, "missing": 1}]
    terminal.watch_status(watch.until_over(0.01))
    assert capsys.readouterr().out.count("3 ok") == 1


def test_a_finished_result_is_read_once(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(suite)
    first = watch.look()
    monkeypatch.setattr("bench.live.result_of", lambda folder: pytest.fail("read again"))
    assert watch.look().states == first.states


def test_a_folder_without_a_plan_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no plan.jsonl"):
        Watch(tmp_path).look()


def test_a_lease_of_a_dead_machine_is_no_work(suite: Path) -> None:
    folder = running_folder(suite)
    folder.mkdir(parents=True)
    said = {"token": "t", "host": "n", "machine": "m", "pid": 1, "born": "1", "what": "x", "since": 0, "patience": 9}
    (folder / f"next{SUFFIX}").write_text(json.dumps(said))
    os.utime(folder / f"next{SUFFIX}", (time.time() - 30,) * 2)
    assert not Watch(suite).look().alive()
