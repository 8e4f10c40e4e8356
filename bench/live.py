"""How a suite stands, while it runs or afterwards: read from its plan, its results and the leases of who is at work."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.launcher import SWEEP, running_folder, stamp
from bench.lease import Owner, owners
from bench.planner import PLAN, result_of
from bench.results import RESULT
from bench.store import LOCKS

EVERY = 2.0
"""Seconds between two looks."""


@dataclass(frozen=True)
class State:
    """One planned cell. ``status``: ``ok``, ``n/a``, ``failed``, ``missing``, or ``running``, whatever an earlier run
    left. ``due``: the sweep has still to end it."""

    cell: str
    title: str
    status: str
    reason: str
    due: bool


@dataclass(frozen=True)
class Work:
    """A cell that runs just now. ``stage``: what it builds, "" between stages. Seconds since the cell and the stage
    began."""

    title: str
    owner: Owner
    seconds: float
    stage: str = ""
    stage_seconds: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """``sweeps``: those alive. ``seconds``: since the plan was made. ``ended``: cells that ended since then."""

    states: list[State]
    work: list[Work]
    sweeps: list[Owner]
    seconds: float
    ended: int

    def count(self) -> dict[str, int]:
        return dict(Counter(state.status for state in self.states))

    def left(self) -> int:
        """Cells that the sweep has still to end, those that run among them."""
        return sum(state.due for state in self.states)

    def alive(self) -> bool:
        return bool(self.sweeps or self.work)

    def eta(self) -> float | None:
        """Seconds until the sweep is over, at its pace so far; None without a pace."""
        return self.seconds / self.ended * self.left() if self.alive() and self.ended else None


@dataclass
class Watch:
    """Looks at a suite again and again; a result that did not change is not read again."""

    folder: Path
    known: dict[str, tuple[object, str, str]] = field(default_factory=dict)

    def look(self) -> Snapshot:
        """Raises BenchError where no plan lies."""
        path = self.folder / PLAN
        try:
            lines, made = [json.loads(line) for line in path.read_text().splitlines()], path.stat().st_mtime
        except FileNotFoundError:
            raise BenchError(f"status: {self.folder} holds no {PLAN}; run its grid first (bench -m ...).") from None
        held = owners(running_folder(self.folder))
        sweeps = [owner for name, owner in held.items() if name.startswith(SWEEP)]
        states = [self._state(line, held, made) for line in lines]
        asked = sum(line["plan"] == "run" for line in lines)
        ended = asked - sum(state.due for state in states)
        return Snapshot(states, workers(held, sweeps), sweeps, max(0.0, time.time() - made), ended)

    def _state(self, line: dict[str, Any], held: dict[str, Owner], made: float) -> State:
        cell = line["cell"]
        status, reason = self._result(cell)
        due = line["plan"] == "run" and (status == "missing" or self._written(cell) < made)
        if cell in held:
            status, reason, due = "running", "", line["plan"] == "run"
        return State(cell, line["title"], status, reason, due)

    def _result(self, cell: str) -> tuple[str, str]:
        now = stamp(self.folder / cell)
        if cell not in self.known or self.known[cell][0] != now:
            result = result_of(self.folder / cell) if now else None
            reason = "" if result is None else result.error.message if result.error else result.reason
            self.known[cell] = now, "missing" if result is None else result.status, reason
        return self.known[cell][1:]

    def _written(self, cell: str) -> float:
        try:
            return (self.folder / cell / RESULT).stat().st_mtime
        except OSError:
            return 0.0

    def until_over(self, every: float = EVERY) -> Iterator[Snapshot]:
        """A look now and every ``every`` seconds, until no sweep and no cell is at work."""
        while True:
            snapshot = self.look()
            yield snapshot
            if not snapshot.alive():
                return
            time.sleep(every)


def workers(held: dict[str, Owner], sweeps: list[Owner]) -> list[Work]:
    """Who runs which cell and, of its stages, builds which."""
    stores = dict.fromkeys(owner.what for owner in sweeps) or {os.environ.get("BENCH_STORE", "results/.store"): None}
    building: dict[tuple[str, int], tuple[float, str]] = {}
    for store in stores:
        for owner in owners(Path(store) / LOCKS).values():
            place = owner.machine, owner.pid
            building[place] = max(building.get(place, (0.0, "")), (owner.since, owner.what))
    now = time.time()
    found = []
    for name, owner in held.items():
        if not name.startswith(SWEEP):
            since, stage = building.get((owner.machine, owner.pid), (now, ""))
            found.append(Work(owner.what, owner, max(0.0, now - owner.since), stage, max(0.0, now - since)))
    return sorted(found, key=lambda work: -work.seconds)
