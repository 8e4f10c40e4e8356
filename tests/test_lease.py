"""Leases outlive neither a dead process nor a dead machine, and never hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bench import lease
from bench.lease import Lease, announced, look, machine, owner_of, owners


def held_elsewhere(path: Path, patience: float = 3600.0, age: float = 0.0, **changes: object) -> None:
    """A lease as another machine would have left it, its last heartbeat ``age`` seconds ago."""
    said = {"token": "t", "host": "node7", "machine": "another", "pid": os.getpid(), "born": "1", "what": "train",
            "since": 0.0, "patience": patience, **changes}
    path.write_text(json.dumps(said))
    os.utime(path, (time.time() - age,) * 2)


def test_one_holds_it_and_the_others_wait(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    with Lease(path, "train"):
        assert not Lease(path).try_take()
        owner = owner_of(path)
        assert owner is not None and (owner.pid, owner.what, owner.machine) == (os.getpid(), "train", machine())
    assert list(tmp_path.iterdir()) == []
    assert Lease(path).try_take()


def _count(path: str, log: str) -> None:
    for _ in range(5):
        with Lease(Path(path)):
            inside = Path(log + ".inside")
            inside.touch(exist_ok=False)
            with Path(log).open("a") as file:
                file.write("x")
            inside.unlink()


def test_of_many_processes_one_at_a_time(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    all_of_them = [fork.Process(target=_count, args=(str(tmp_path / "a"), str(tmp_path / "log"))) for _ in range(8)]
    for one in all_of_them:
        one.start()
    for one in all_of_them:
        one.join(60)
    assert [one.exitcode for one in all_of_them] == [0] * 8
    assert (tmp_path / "log").read_text() == "x" * 40


def _hold(path: str, ready: object) -> None:
    Lease(Path(path)).take()
    ready.set()  # type: ignore[attr-defined]
    time.sleep(60)


def test_a_killed_owner_on_this_machine_is_noticed_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=_hold, args=(str(tmp_path / "a"), ready))
    process.start()
    assert ready.wait(10)
    assert not Lease(tmp_path / "a").try_take()
    os.kill(process.pid or 0, signal.SIGKILL)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert Lease(tmp_path / "a").try_take(), "a zombie holds nothing"
    process.join()


def test_a_later_process_with_the_owners_number_is_not_the_owner(tmp_path: Path) -> None:
    held_elsewhere(tmp_path / "a", machine=machine(), born="1")
    assert Lease(tmp_path / "a").try_take()


def test_another_machines_lease_is_taken_over_when_it_falls_silent_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    held_elsewhere(path, patience=100.0, age=90.0)
    assert not Lease(path).try_take() and owner_of(path) is not None
    held_elsewhere(path, patience=100.0, age=110.0)
    assert owner_of(path) is None
    assert Lease(path).try_take()
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_age_is_told_by_the_folders_clock_not_by_this_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_elsewhere(tmp_path / "a", patience=100.0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not Lease(tmp_path / "a").try_take()


def test_an_owner_that_died_before_it_said_who_it_is_blocks_for_a_while_only(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    assert not Lease(path).try_take()
    os.utime(path, (time.time() - 1000,) * 2)
    assert Lease(path).try_take()


def test_a_living_owner_keeps_it_beyond_its_patience(tmp_path: Path) -> None:
    with Lease(tmp_path / "a", patience=0.3):
        time.sleep(0.9)
        assert not Lease(tmp_path / "a").try_take()


def test_who_was_silent_for_too_long_takes_nothing_from_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a"
    silent, second = Lease(path), Lease(path)
    assert silent.try_take()
    os.utime(path, (time.time() - 1000,) * 2)
    assert second.try_take()
    silent.release()
    assert path.exists() and not Lease(path).try_take()
    second.release()
    assert not path.exists()


def test_who_looked_too_long_ago_evicts_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    held_elsewhere(path, age=9000.0)
    seen = look(path)
    with Lease(path):
        assert seen is not None and not lease.evict(path, seen)
        assert not Lease(path).try_take()
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_when_the_owner_lets_go(tmp_path: Path) -> None:
    first = Lease(tmp_path / "a")
    first.take()
    threading.Timer(0.3, first.release).start()
    started = time.monotonic()
    with Lease(tmp_path / "a"):
        assert 0.2 < time.monotonic() - started < 5


def test_who_holds_what(tmp_path: Path) -> None:
    held_elsewhere(tmp_path / "train-1.lease")
    held_elsewhere(tmp_path / "train-2.lease", age=9000.0)
    with announced(tmp_path / "sub" / "me.lease", "a sweep"):
        assert [owner.what for owner in owners(tmp_path / "sub").values()] == ["a sweep"]
    assert set(owners(tmp_path)) == {"train-1"}
    assert str(owners(tmp_path)["train-1"]) == f"process {os.getpid()} on node7"


def test_what_the_dead_left_is_cleared_and_the_living_keep_theirs(tmp_path: Path) -> None:
    held_elsewhere(tmp_path / "silent.lease", age=9000.0)
    held_elsewhere(tmp_path / "dead.lease", machine=machine(), born="1")
    held_elsewhere(tmp_path / "alive.lease")
    lease.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["alive.lease"]


def test_an_announcement_is_no_condition(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with announced(tmp_path / "file" / "me.lease", "a sweep"):
        pass
