"""Our launchers as Hydra plugins: each names the crew that runs a sweep's cells. Presets: ``conf/hydra/launcher``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from bench import terminal
from bench.config import Cell, Config, Settings
from bench.errors import BenchError
from bench.launcher import PRELOAD, RUNNER, Crew, Ended, Pool, Processes, workers
from bench.tracking import preloaded

logger = logging.getLogger(__name__)
PREFIX = "hydra_plugins.bench."
JOBS = ".jobs"
ON_SLURM = 64
"""Jobs on Slurm at a time, where nothing else is asked for."""


@dataclass
class WorkersConf:
    """``runner``: the function that runs a cell, as ``module:function``. ``preload``: the module that the fork server
    imports once for all cells."""

    _target_: str = f"{PREFIX}WorkersLauncher"
    runner: str = RUNNER
    preload: str = PRELOAD


@dataclass
class JoblibConf(WorkersConf):
    """As many workers as ``workers`` says."""

    _target_: str = f"{PREFIX}JoblibLauncher"


@dataclass
class LocalJobsConf(WorkersConf):
    """``timeout_min``: of one job, in minutes."""

    _target_: str = f"{PREFIX}LocalJobsLauncher"
    timeout_min: int = 7 * 24 * 60


@dataclass
class SlurmConf(WorkersConf):
    """A job per cell, at most ``workers`` in the queue. ``timeout_min``: of one job; then it is queued again up to
    ``requeues`` times. ``setup``: shell lines before the job. ``extra``: other options of sbatch by name."""

    _target_: str = f"{PREFIX}SlurmLauncher"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 24 * 60
    requeues: int = 3
    cpus_per_task: int = 4
    gpus_per_node: int | None = 1
    mem_gb: int | None = 32
    setup: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayConf(WorkersConf):
    """``address``: of a running cluster (``auto``: the one of this machine); null starts one here. ``cpus`` and
    ``gpus``: what one cell takes."""

    _target_: str = f"{PREFIX}RayLauncher"
    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None


class CellLauncher(Launcher):
    """Runs planned cells; they are handed over as they were planned, nothing is composed again."""

    def __init__(self, runner: str = RUNNER, preload: str = PRELOAD, **options: Any) -> None:
        self.runner, self.preload, self.options = runner, preload, options
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise BenchError(f"hydra/launcher: {type(self).__name__} runs cells of the sweeper `bench` only; leave "
                         "hydra/sweeper unset.")

    def run(self, cells: Sequence[Cell], how: Settings, root: Config) -> list[Ended]:
        """Run them all, with a line in the log for each that ends."""
        crew, many = self.crew(cells, how, root)
        settings = how if crew.here else replace(how, device=root.device)  # `auto` is for the worker to say
        once = (self.preload, *preloaded(how.tracker.wandb))
        pool = Pool(settings, many, root.time_limit, root.on_error == "stop", self.runner, once, crew)
        return pool.run(cells, Progress(cells, many).report)

    def crew(self, cells: Sequence[Cell], how: Settings, root: Config) -> tuple[Crew, int]:
        """Who runs the cells, and how many at a time."""
        raise NotImplementedError


class WorkersLauncher(CellLauncher):
    """One process per cell on this machine, ``workers`` at a time."""

    def crew(self, cells: Sequence[Cell], how: Settings, root: Config) -> tuple[Crew, int]:
        return Processes(), workers(root.workers, how.device)


class JoblibLauncher(CellLauncher):
    """Workers of joblib on this machine."""

    def crew(self, cells: Sequence[Cell], how: Settings, root: Config) -> tuple[Crew, int]:
        from bench.crews import Joblib

        many = min(workers(root.workers, how.device), len(cells))
        return Joblib(many), many


class LocalJobsLauncher(CellLauncher):
    """A job of submitit per cell on this machine. Unlike submitit's own executor, never more than ``workers`` at a
    time. The jobs outlive a head that is killed."""

    def crew(self, cells: Sequence[Cell], how: Settings, root: Config) -> tuple[Crew, int]:
        from bench.crews import Submitit

        folder = how.results / JOBS / cells[0].suite
        return Submitit("local", folder, self.options), workers(root.workers, how.device)


class SlurmLauncher(CellLauncher):
    """A Slurm job per cell, through submitit. The jobs outlive a head that is killed."""

    def crew(self, cells: Sequence[Cell], how: Settings, root: Config) -> tuple[Crew, int]:
        from bench.crews import Submitit

        folder = how.results / JOBS / cells[0].suite
        options = slurm_options(self.options, cells[0].suite)
        return Submitit("slurm", folder, options, int(self.options["requeues"]), 2.0), root.workers or ON_SLURM


def slurm_options(asked: dict[str, Any], name: str) -> dict[str, Any]:
    """What submitit calls the options of SlurmConf."""
    options = {key: asked.get(key) for key in ("partition", "account", "qos", "constraint", "cpus_per_task",
                                               "gpus_per_node")}
    options |= {"time": asked["timeout_min"], "job_name": f"bench-{name}", "setup": list(asked.get("setup") or ()),
                "additional_parameters": dict(asked.get("extra") or {})}
    if asked.get("mem_gb"):
        options["mem"] = f"{asked['mem_gb']}GB"
    return {key: value for key, value in options.items() if value not in (None, [], {})}


class RayLauncher(CellLauncher):
    """Tasks of Ray, on a running cluster or on this machine."""

    def crew(self, cells: Sequence[Cell], how: Settings, root: Config) -> tuple[Crew, int]:
        from bench.crews import Ray

        gpus = self.options.get("gpus")
        share = float(gpus) if gpus is not None else float(how.device == "cuda")
        address = self.options.get("address")
        many = min(workers(root.workers, how.device), len(cells))
        crew = Ray(address, many, float(self.options.get("cpus") or 1.0), share)
        return crew, root.workers or crew.room()


LAUNCHERS: dict[str, tuple[type[CellLauncher], type]] = {
    "workers": (WorkersLauncher, WorkersConf), "bench_joblib": (JoblibLauncher, JoblibConf),
    "bench_jobs": (LocalJobsLauncher, LocalJobsConf), "bench_slurm": (SlurmLauncher, SlurmConf),
    "bench_ray": (RayLauncher, RayConf),
}
"""Option of ``hydra/launcher`` -> its plugin and what can be set; the presets build on these."""


def register_launchers() -> None:
    """Make our launchers known to Hydra."""
    for name, (plugin, conf) in LAUNCHERS.items():
        Plugins.instance().class_name_to_class[PREFIX + plugin.__name__] = plugin
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=conf, provider="bench")


@dataclass
class Progress:
    """One line per cell that ends, with the time that the rest may take. Of the cells that share a first stage, one
    builds it, which may take a hundred times as long as the others, so the two kinds are counted apart."""

    cells: Sequence[Cell]
    workers: int = 1
    builders: dict[tuple[Any, ...], float] = field(default_factory=dict)
    sharers: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = len({cell.first_stage() for cell in self.cells})

    def report(self, ended: Ended, left: int) -> None:
        stage = ended.cell.first_stage()
        if stage in self.builders:
            self.sharers.append(ended.seconds)
        else:
            self.builders[stage] = ended.seconds
        reason = f": {ended.reason}" if ended.reason else ""
        total = len(self.cells)
        logger.info("[%*d/%d] %-6s %s (%.1f s)%s%s", len(str(total)), total - left, total, ended.status,
                    ended.cell.title(), ended.seconds, reason, self._rest(left))

    def _rest(self, left: int) -> str:
        """How many are left and how long they may take, once one of each kind that is left has ended."""
        building = self.stages - len(self.builders)
        sharing = left - building
        if not left or (sharing and not self.sharers):
            return f" · {left} left" if left else ""
        work = building * fmean(self.builders.values()) + sharing * fmean(self.sharers or [0.0])
        return f" · {left} left, about {terminal.duration(work / max(1, min(self.workers, left)))}"
