"""Crews whose workers are joblib's, submitit's (on this machine or on Slurm) or Ray's.

Hydra's own plugins for these run cells inside the worker, compose each cell's config again when it starts, and (joblib)
lose the whole sweep with one process. Here the cell arrives as it was planned, and every worker gives it a process of
its own, watched like those of this machine: a cell that raises, exits, is killed or hangs is a record, not the end of
a worker.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.config import device_of
from bench.errors import BenchError
from bench.files import told
from bench.launcher import HEARTBEAT, Ended, Processes, Task, WorkerLost
from bench.lease import birth

log = logging.getLogger(__name__)


def supervise(task: Task, head: tuple[int, str] | None = None) -> Ended:
    """Run one task in a process of its own; what a worker does. ``head``: number and birth of the process on this
    machine without which the worker must not go on."""
    if head is not None:
        _end_with(head)
    multiprocessing.set_start_method("forkserver", force=True)  # a fresh process does not know loky's own method
    task = replace(task, settings=replace(task.settings, device=device_of(task.settings.device)))
    crew = Processes()
    job = crew.start(task)
    try:
        while not crew.over(job):
            crew.wait([job], HEARTBEAT)
        return crew.ended(job)
    finally:
        crew.stop([job])


_WATCHED: set[tuple[int, str]] = set()


def _end_with(head: tuple[int, str]) -> None:
    """Watch the head once per worker; the worker's own cells end with the worker."""
    def watch() -> None:
        while birth(head[0]) == head[1]:
            time.sleep(1.0)
        os._exit(1)

    if head not in _WATCHED:
        _WATCHED.add(head)
        threading.Thread(target=watch, daemon=True).start()


def library(name: str, extra: str) -> Any:
    """An optional library, or how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BenchError(f"launcher: {name.partition('.')[0]} is not installed ({error}); get it with "
                         f"pip install 'diffusion-defense-bench[{extra}]', or use launcher=local.") from error


@dataclass
class Joblib:
    """Worker processes of joblib (its loky executor) on this machine."""

    workers: int
    here: bool = True
    head: tuple[int, str] = field(default_factory=lambda: (os.getpid(), birth(os.getpid())))

    def start(self, task: Task) -> Any:
        return self._executor().submit(supervise, task, self.head)

    def _executor(self) -> Any:
        """The same one, or a new one in the place of one that broke."""
        loky = library("joblib.externals.loky", "joblib")
        return loky.get_reusable_executor(max_workers=self.workers, timeout=3600)

    def wait(self, jobs: Sequence[Any], seconds: float) -> None:
        from concurrent.futures import FIRST_COMPLETED, wait

        wait(jobs, timeout=seconds, return_when=FIRST_COMPLETED)

    def over(self, job: Any) -> bool:
        return bool(job.done())

    def ended(self, job: Any) -> Ended:
        try:
            return _checked(job.result())
        except Exception as error:  # a worker that dies breaks the executor, and each release names that in its own way
            raise WorkerLost(f"{type(error).__name__}: {error}") from error

    def stop(self, jobs: Sequence[Any]) -> None:
        self._executor().shutdown(wait=True, kill_workers=True)


class Resumable:
    """What submitit pickles. Preempted or out of time, a job is queued again as it was: its finished stages are in
    the store."""

    def __call__(self, task: Task) -> Ended:
        return supervise(task)

    def checkpoint(self, task: Task) -> Any:
        return library("submitit", "slurm").helpers.DelayedSubmission(self, task)


@dataclass
class Submitit:
    """A job of submitit per cell. ``cluster``: ``local`` or ``slurm``. ``folder``: for its scripts and logs; on Slurm
    the nodes must see it. ``options``: what submitit's executor is told. ``requeues``: how often a job goes on when
    its time is up. ``pause``: seconds between two looks at the jobs."""

    cluster: str
    folder: Path
    options: Mapping[str, Any]
    requeues: int = 3
    pause: float = 0.2

    def __post_init__(self) -> None:
        submitit = library("submitit", "slurm")
        self.here = self.cluster == "local"
        executor = submitit.LocalExecutor if self.here else submitit.SlurmExecutor
        try:
            self.executor = executor(folder=self.folder, max_num_timeout=self.requeues)
            self.executor.update_parameters(**self.options)
        except (RuntimeError, ValueError, OSError) as error:
            raise BenchError(f"launcher: submitit refuses ({error}).") from error

    def start(self, task: Task) -> Any:
        with told("launcher", self.folder):
            return self.executor.submit(Resumable(), task)

    def wait(self, jobs: Sequence[Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not any(self.over(job) for job in jobs):
            time.sleep(self.pause)

    def over(self, job: Any) -> bool:
        return bool(job.done())

    def ended(self, job: Any) -> Ended:
        try:
            ended = _checked(job.result())
        except Exception as error:  # submitit's own, for a job without a result
            raise WorkerLost(f"job {job.job_id}: {error}") from error
        if ended.status != "failed":
            self._tidy(job)
        return ended

    def _tidy(self, job: Any) -> None:
        """A finished cell has its own log; thousands of a grid's job files would only be in the way."""
        for path in (job.paths.submitted_pickle, job.paths.result_pickle, job.paths.stdout, job.paths.stderr,
                     job.paths.submission_file):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def stop(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            log.info("Cancelling job %s", job.job_id)
            job.cancel(check=False)
        deadline = time.monotonic() + 15
        while self.here and time.monotonic() < deadline and not all(self.over(job) for job in jobs):
            time.sleep(self.pause)


@dataclass
class Ray:
    """Tasks of Ray. ``address``: of a running cluster, None for one of ``workers`` slots on this machine. ``cpus`` and
    ``gpus``: what a cell takes; Ray shares out the GPUs. Ray's own usage reports stay off unless the environment asks
    for them."""

    address: str | None
    workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    here: bool = False

    def __post_init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = library("ray", "ray")
        size = {} if self.address else {"num_cpus": max(1, round(self.workers * self.cpus)), "include_dashboard": False}
        try:
            self.ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **size)
        except Exception as error:  # it has many ways to say that there is no cluster
            raise BenchError(f"launcher: Ray does not start at {self.address or 'this machine'} ({error}).") from error
        self.task = self.ray.remote(supervise).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)

    def room(self) -> int:
        """How many cells the whole cluster can run at a time."""
        found = self.ray.cluster_resources()
        by_gpu = found.get("GPU", 0) / self.gpus if self.gpus else float("inf")
        return max(1, int(min(found.get("CPU", 1) / self.cpus, by_gpu)))

    def start(self, task: Task) -> Any:
        return self.task.remote(task)

    def wait(self, jobs: Sequence[Any], seconds: float) -> None:
        self.ray.wait(list(jobs), num_returns=1, timeout=seconds)

    def over(self, job: Any) -> bool:
        return bool(self.ray.wait([job], num_returns=1, timeout=0)[0])

    def ended(self, job: Any) -> Ended:
        try:
            return _checked(self.ray.get(job))
        except Exception as error:  # Ray's own, for a worker or a node that is gone
            raise WorkerLost(f"{type(error).__name__}: {error}") from error

    def stop(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            with suppress(Exception):
                self.ray.cancel(job, force=True)
        self.ray.shutdown()


def _checked(ended: Any) -> Ended:
    """What came back from another process is what was asked for."""
    if not isinstance(ended, Ended):
        raise TypeError(f"a worker sent {type(ended).__name__}")
    return ended
