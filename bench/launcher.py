"""Run cells on this machine, each in a process of its own, so that whatever one of them does costs only itself.

A fork server imports torch once; a fresh cell then starts in a fraction of a second.
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
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.config import Cell, Settings, gpus
from bench.errors import BenchError
from bench.outcomes import failed, write
from bench.results import RESULT, Result, read_result

logger = logging.getLogger(__name__)

RUNNER = "bench.runner:run_cell"
LOG = "log.txt"
PRELOAD = "bench.preload"
GRACE = 5.0
"""Seconds between asking a process to end and killing it."""
HEARTBEAT = 60.0
"""Seconds without news after which the log says what is still running."""


@dataclass(frozen=True)
class Ended:
    """How a cell ended: its status and, where it is not ``ok``, why."""

    cell: Cell
    status: str
    seconds: float
    reason: str = ""


@dataclass
class Running:
    """A cell under way. ``stamp``: of the result file before it started, to tell an old result from a new one."""

    cell: Cell
    process: BaseProcess
    slot: int
    stamp: tuple[int, int] | None
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
    running: list[Running] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    def run(self, cells: Sequence[Cell], report: Callable[[Ended, int], None]) -> list[Ended]:
        """Run all cells; ``report`` hears of each that ends and how many are left. On Ctrl-C every process is ended."""
        waiting = list(cells)
        start = self._context().Process
        try:
            while (waiting and not self._stopped()) or self.running:
                while waiting and len(self.running) < self.workers and not self._stopped():
                    self._start(waiting.pop(0), start)
                for ended in self._collect():
                    self.ended.append(ended)
                    report(ended, len(waiting) + len(self.running))
        finally:
            for running in self.running:
                end(running.process)
        return self.ended

    def _context(self) -> Any:
        """Threads are fixed before torch is imported; BLAS reads them only then."""
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(self.settings.threads)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        return context

    def _stopped(self) -> bool:
        return self.stop and any(ended.status == "failed" for ended in self.ended)

    def _start(self, cell: Cell, start: Callable[..., BaseProcess]) -> None:
        slot = min(set(range(self.workers)) - {running.slot for running in self.running})
        folder = cell.folder(self.settings.results)
        folder.mkdir(parents=True, exist_ok=True)
        process = start(target=work, args=(cell, self.settings, self.runner, folder / LOG, gpu(self.settings, slot)))
        self.running.append(Running(cell, process, slot, stamp(folder)))
        process.start()

    def _collect(self) -> list[Ended]:
        """Wait for news, then every cell that ended or ran out of time."""
        wait([running.process.sentinel for running in self.running], timeout=self._patience())
        gone = [running for running in self.running if self._is_over(running)]
        self.running = [running for running in self.running if running not in gone]
        if not gone and not self.time_limit:
            _tell_running(self.running)
        return [self._judge(running) for running in gone]

    def _patience(self) -> float:
        left = [self.time_limit - running.seconds() for running in self.running] if self.time_limit else []
        return max(0.0, min([HEARTBEAT, *left]))

    def _is_over(self, running: Running) -> bool:
        return not running.process.is_alive() or self._late(running)

    def _late(self, running: Running) -> bool:
        return bool(self.time_limit) and running.seconds() >= self.time_limit

    def _judge(self, running: Running) -> Ended:
        """What the cell recorded itself; if it recorded nothing, a failure with the way it ended."""
        late = running.process.is_alive()
        end(running.process)
        seconds = running.seconds()
        result = None if late else fresh(running, self.settings)
        if result is None:
            limit = f"exceeded its time limit of {self.time_limit:g} s"
            reason = limit if late else how(running.process.exitcode)
            result = write(failed(running.cell, "ProcessEnded", reason, _tail(running, self.settings)),
                           self.settings.results)
        reason = result.error.message if result.error else result.reason
        return Ended(running.cell, result.status, seconds, reason)


def work(cell: Cell, settings: Settings, runner: str, log: Path, visible: str | None) -> None:
    """The body of a cell's process. A session of its own, so that ending it ends what it started."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    _write_to(log)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    result = function(runner)(cell, settings)
    sys.exit(1 if result.status == "failed" else 0)


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
    with suppress(FileNotFoundError):
        state = (folder / RESULT).stat()
        return state.st_ino, state.st_mtime_ns
    return None


def fresh(running: Running, settings: Settings) -> Result | None:
    """The result that this run wrote, if it did."""
    folder = running.cell.folder(settings.results)
    if stamp(folder) in (None, running.stamp):
        return None
    try:
        return read_result(folder)
    except BenchError as error:
        logger.warning("%s", error)
        return None


def how(code: int | None) -> str:
    """How a process ended that left no result."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; perhaps the machine ran out of memory" if name == "SIGKILL" else ""
        return f"killed by signal {-code} ({name}){hint}"
    return f"its process ended with exit code {code} and left no result; see {LOG} in its folder"


def _tail(running: Running, settings: Settings, size: int = 4000) -> str:
    try:
        text = (running.cell.folder(settings.results) / LOG).read_text(errors="replace")
    except OSError:
        return ""
    return text[-size:]


def _tell_running(running: Sequence[Running]) -> None:
    for one in running:
        logger.info("        … %s, %.0f s so far", one.cell.title(), one.seconds())


def gpu(settings: Settings, slot: int) -> str | None:
    """The one GPU that a slot's cells see, when there are several to share out."""
    names = gpus() if settings.device == "cuda" else []
    return names[slot % len(names)] if len(names) > 1 else None


def workers(requested: int, device: str) -> int:
    """Cells at a time: as asked for; else one per GPU, or one per core that this process may use."""
    return requested or (len(gpus()) if device == "cuda" else 0) or len(os.sched_getaffinity(0))
