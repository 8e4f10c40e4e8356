"""Run cells, each in a process of its own, so that whatever one of them does costs only itself.

A pool hands cells to a crew: processes of this machine (here), or workers of joblib, submitit or Ray (`bench.crews`),
each of which again gives every cell a process. A fork server imports torch once; a fresh cell then starts in a
fraction of a second.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from bench.config import Cell, Settings, gpus
from bench.errors import BenchError
from bench.files import told
from bench.lease import SUFFIX, Lease, owner_of
from bench.outcomes import failed, write
from bench.results import RESULT, Result, read_result

logger = logging.getLogger(__name__)

RUNNER = "bench.runner:run_cell"
LOG = "log.txt"
RUNNING = ".running"
SWEEP = "sweep-"
"""What the leases of sweeps, rather than cells, start with; they name the sweep's store."""
PRELOAD = "bench.preload"
GRACE = 5.0
"""Seconds between asking a process to end and killing it."""
HEARTBEAT = 60.0
"""Seconds without news after which the log says what is still running."""
AGAIN = 1.0
"""Seconds after which a cell that another sweep holds is looked at again."""
TRIES = 3
"""How often a cell is started whose worker, not the cell itself, is lost."""


@dataclass(frozen=True)
class Ended:
    """How a cell ended: its status and, where it is not ``ok``, why."""

    cell: Cell
    status: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """A cell to run, with all that a worker anywhere needs for it. ``runner``: ``module:function``, called with (cell,
    settings). ``time_limit``: seconds, 0 for none. ``stamp``: of its result file when the pool began, to tell an old
    result from a new one. ``visible``: the GPUs it sees, None for all."""

    cell: Cell
    settings: Settings
    runner: str = RUNNER
    preload: tuple[str, ...] = (PRELOAD,)
    time_limit: float = 0.0
    stamp: tuple[int, int] | None = None
    visible: str | None = None

    def folder(self) -> Path:
        return self.cell.folder(self.settings.results)


class WorkerLost(Exception):
    """The worker of a cell is gone and left no word of how the cell ended."""


class Crew(Protocol):
    """Whoever runs tasks. ``here``: on this machine, so that its GPUs are shared out by the pool."""

    here: bool

    def start(self, task: Task) -> Any:
        """Begin a task; returns the job that the other methods take. Raises BenchError when the disk refuses."""

    def wait(self, jobs: Sequence[Any], seconds: float) -> None:
        """Until one of the jobs is over, or for so long."""

    def over(self, job: Any) -> bool: ...

    def ended(self, job: Any) -> Ended:
        """How a job that is over ended. Raises WorkerLost."""

    def stop(self, jobs: Sequence[Any]) -> None:
        """End these jobs and let the workers go."""


@dataclass
class Running:
    """A cell under way."""

    task: Task
    job: Any
    slot: int
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass
class Pool:
    """``workers`` cells at a time. ``time_limit``: seconds per cell, 0 for none. ``stop``: start no further cell
    after a failure. ``runner``: ``module:function``, called with (cell, settings) in the cell's process."""

    settings: Settings
    workers: int
    time_limit: float = 0.0
    stop: bool = False
    runner: str = RUNNER
    preload: tuple[str, ...] = (PRELOAD,)
    crew: Crew = field(default_factory=lambda: Processes())
    running: list[Running] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell], report: Callable[[Ended, int], None]) -> list[Ended]:
        """Run all cells; ``report`` hears of each that ends and how many are left. On Ctrl-C every process is ended."""
        waiting = [self._task(cell) for cell in cells]
        try:
            while (waiting and not self._stopped()) or self.running:
                for ended in [*self._fill(waiting), *self._collect(waiting)]:
                    self.ended.append(ended)
                    report(ended, len(waiting) + len(self.running))
        finally:
            self.crew.stop([running.job for running in self.running])
        return self.ended

    def _task(self, cell: Cell) -> Task:
        return Task(cell, self.settings, self.runner, self.preload, self.time_limit,
                    stamp(cell.folder(self.settings.results)))

    def _stopped(self) -> bool:
        return self.stop and any(ended.status == "failed" for ended in self.ended)

    def _fill(self, waiting: list[Task]) -> list[Ended]:
        """Start what can start; returns those that could not. A cell that another sweep runs just now is left for
        later: by then it is finished."""
        refused = []
        while waiting and len(self.running) < self.workers and not self._stopped():
            place = self._next(waiting)
            if place is None:
                break
            task = waiting.pop(place)
            try:
                self._start(task)
            except BenchError as error:
                refused.append(Ended(task.cell, "failed", 0.0, str(error)))
        return refused

    def _next(self, waiting: Sequence[Task]) -> int | None:
        """The place of the next task: the first that waits for no running cell's first stage, or else the first."""
        building = {running.task.cell.first_stage() for running in self.running}
        apart = (at for at, task in enumerate(waiting) if task.cell.first_stage() not in building)
        return next((at for at in chain(apart, range(len(waiting))) if owner_of(lease_path(waiting[at])) is None), None)

    def _start(self, task: Task) -> None:
        slot = min(set(range(self.workers)) - {running.slot for running in self.running})
        visible = gpu(self.settings, slot) if self.crew.here else None
        self.running.append(Running(task, self.crew.start(replace(task, visible=visible)), slot))

    def _collect(self, waiting: list[Task]) -> list[Ended]:
        """Wait for news, then every cell that ended or ran out of time."""
        seconds = AGAIN if waiting and len(self.running) < self.workers else HEARTBEAT
        if not self.running:
            time.sleep(seconds if waiting else 0.0)
            return []
        self.crew.wait([running.job for running in self.running], seconds)
        gone = [running for running in self.running if self.crew.over(running.job)]
        self.running = [running for running in self.running if running not in gone]
        if not gone and seconds == HEARTBEAT:
            _tell_running(self.running)
        return [ended for running in gone if (ended := self._end_of(running, waiting)) is not None]

    def _end_of(self, running: Running, waiting: list[Task]) -> Ended | None:
        """How it ended; None for a cell that starts again, since only its worker was lost."""
        task = running.task
        try:
            return replace(self.crew.ended(running.job), cell=task.cell)
        except WorkerLost as lost:
            self.tries[task.cell.id] = self.tries.get(task.cell.id, 1) + 1
            if self.tries[task.cell.id] <= TRIES:
                logger.warning("%s: its worker is gone (%s); it starts again.", task.cell.title(), _first_line(lost))
                waiting.append(task)
                return None
            result = recorded(failed(task.cell, "WorkerLost", str(lost)), task.settings)
            return ended_as(result, task.cell, running.seconds())


@dataclass
class Job:
    """A cell's process."""

    task: Task
    process: BaseProcess
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        return self.task.time_limit - self.seconds() if self.task.time_limit else HEARTBEAT


class Processes:
    """The crew on this machine: a process per cell, from a fork server that has imported what they all need."""

    here = True

    def start(self, task: Task) -> Job:
        with told("results", task.folder()):
            task.folder().mkdir(parents=True, exist_ok=True)
        process = _context(task).Process(target=work, args=(task,))
        process.start()
        return Job(task, process)

    def wait(self, jobs: Sequence[Job], seconds: float) -> None:
        wait([job.process.sentinel for job in jobs], timeout=max(0.0, min([seconds, *(job.left() for job in jobs)])))

    def over(self, job: Job) -> bool:
        return not job.process.is_alive() or job.left() <= 0

    def ended(self, job: Job) -> Ended:
        """What the cell recorded itself; if it recorded nothing, a failure with the way it ended."""
        late, seconds, task = job.process.is_alive(), job.seconds(), job.task
        end(job.process)
        result = None if late else fresh(task)
        if result is None:
            reason = f"exceeded its time limit of {task.time_limit:g} s" if late else how(job.process.exitcode)
            result = recorded(failed(task.cell, "ProcessEnded", reason, _tail(task)), task.settings)
        return ended_as(result, task.cell, seconds)

    def stop(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            end(job.process)


def _context(task: Task) -> Any:
    """Threads are fixed before torch is imported; BLAS reads them only then."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(task.settings.threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(task.preload))
    return context


def work(task: Task) -> None:
    """The body of a cell's process. A session of its own, so that ending it ends what it started."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if task.visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.visible
    lease = leased(task)
    try:
        _write_to(task.folder() / LOG)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
        # Another sweep may have finished it since this one was planned.
        result = fresh(task) or function(task.runner)(task.cell, task.settings)
    finally:
        lease.release()
    sys.exit(1 if result.status == "failed" else 0)


def leased(task: Task) -> Lease:
    """The right to run a cell, so that two sweeps share their work; where the disk refuses it, the cell says so."""
    lease = Lease(lease_path(task), task.cell.title())
    with suppress(OSError):
        lease.path.parent.mkdir(parents=True, exist_ok=True)
        lease.take()
    return lease


def lease_path(task: Task) -> Path:
    return running_folder(task.settings.results / task.cell.suite) / f"{task.cell.id}{SUFFIX}"


def running_folder(suite: Path) -> Path:
    """Where the leases of a suite's cells lie: beside the suites, so that a suite's folder holds results alone."""
    return suite.parent / RUNNING / suite.name


def function(dotted: str) -> Callable[..., Any]:
    """What ``module:function`` names."""
    module, _, name = dotted.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _end_with_parent() -> None:
    """If the sweep is killed, its cells must not go on alone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _write_to(log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def end(process: BaseProcess) -> None:
    """End a process and everything it started: politely first."""
    if process.pid is None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.is_alive():
            _signal_group(process.pid, number)
            process.join(GRACE)
    _signal_group(process.pid, signal.SIGKILL)
    process.join(GRACE)


def _signal_group(pid: int, number: int) -> None:
    """The group is there as soon as the process has made its session; the process itself always."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
        return
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def stamp(folder: Path) -> tuple[int, int] | None:
    """Inode and time of a result file: both new after a rename into place."""
    with suppress(OSError):
        state = (folder / RESULT).stat()
        return state.st_ino, state.st_mtime_ns
    return None


def fresh(task: Task) -> Result | None:
    """The result that was written since the task was made, if one was."""
    if stamp(task.folder()) in (None, task.stamp):
        return None
    try:
        return read_result(task.folder())
    except BenchError as error:
        logger.warning("%s", error)
        return None


def recorded(result: Result, settings: Settings) -> Result:
    """Put a failure on record; a disk that refuses even that stops no other cell."""
    try:
        return write(result, settings.results)
    except BenchError as error:
        logger.error("%s", error)
        return result


def ended_as(result: Result, cell: Cell, seconds: float) -> Ended:
    return Ended(cell, result.status, seconds, result.error.message if result.error else result.reason)


def how(code: int | None) -> str:
    """How a process ended that left no result."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; perhaps the machine ran out of memory" if name == "SIGKILL" else ""
        return f"killed by signal {-code} ({name}){hint}"
    return f"its process ended with exit code {code} and left no result; see {LOG} in its folder"


def _tail(task: Task, size: int = 4000) -> str:
    try:
        text = (task.folder() / LOG).read_text(errors="replace")
    except OSError:
        return ""
    return text[-size:]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _tell_running(running: Sequence[Running]) -> None:
    for one in running:
        logger.info("        … %s, %.0f s so far", one.task.cell.title(), one.seconds())


def gpu(settings: Settings, slot: int) -> str | None:
    """The one GPU that a slot's cells see."""
    names = gpus() if settings.device == "cuda" else []
    return names[slot % len(names)] if names else None


def workers(requested: int, device: str) -> int:
    """Cells at a time: as asked for; else one per GPU, or one per core that this process may use."""
    return requested or (len(gpus()) if device == "cuda" else 0) or len(os.sched_getaffinity(0))
