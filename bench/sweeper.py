"""The planning sweeper and the default launcher, as Hydra plugins.

The one place that touches Hydra's private side: Hydra 1.3 runs only plugins whose name starts with ``hydra_plugins.``,
so ``register`` files ours under such a name, while the classes stay importable from here by other processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from bench import terminal
from bench.config import Cell, Config, Settings, root_of, settings
from bench.errors import BenchError
from bench.launcher import PRELOAD, RUNNER, Ended, Pool, stamp, workers
from bench.outcomes import failed, not_applicable, write
from bench.planner import Planned, choices, chosen, expand, freeze, in_order, plan, resolve_cells, result_of
from bench.suites import extended, fitting, kept, read_words

logger = logging.getLogger(__name__)
PREFIX = "hydra_plugins.bench."


@dataclass
class SweeperConf:
    """``launch``: false plans only. ``also``: overrides of plugins that the master config does not hold."""

    _target_: str = f"{PREFIX}GridSweeper"
    launch: bool = True
    also: list[str] = field(default_factory=list)


@dataclass
class WorkersConf:
    """``runner``: the function that runs a cell, as ``module:function``. ``preload``: the module that the fork server
    imports once for all cells."""

    _target_: str = f"{PREFIX}WorkersLauncher"
    runner: str = RUNNER
    preload: str = PRELOAD


class PlanChanged(BenchError):
    """A job whose own cell is not the one that was planned."""


def register() -> None:
    """Make ``hydra/sweeper=bench`` and ``hydra/launcher=workers`` known to Hydra."""
    plugins = Plugins.instance()
    for plugin in (GridSweeper, WorkersLauncher):
        plugins.class_name_to_class[PREFIX + plugin.__name__] = plugin
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="bench", node=SweeperConf, provider="bench")
    store.store(group="hydra/launcher", name="workers", node=WorkersConf, provider="bench")


class WorkersLauncher(Launcher):
    """One process per cell on this machine, ``workers`` at a time."""

    def __init__(self, runner: str = RUNNER, preload: str = PRELOAD) -> None:
        self.runner, self.preload = runner, preload
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise BenchError("hydra/launcher=workers: runs cells of the sweeper `bench` only; leave hydra/sweeper unset.")

    def run(self, cells: Sequence[Cell], how: Settings, root: Config, progress: Progress) -> list[Ended]:
        """Run planned cells; they are handed over as they were planned, nothing is composed again."""
        pool = Pool(how, workers(root.workers, how.device), root.time_limit, root.on_error == "stop", self.runner,
                    (self.preload,))
        progress.workers = pool.workers
        return pool.run(cells, progress.report)


@dataclass
class Progress:
    """One line per cell that ends, with the time that the rest may take."""

    total: int
    workers: int = 1
    started: float = field(default_factory=time.monotonic)
    spent: list[float] = field(default_factory=list)

    def report(self, ended: Ended, left: int) -> None:
        self.spent.append(ended.seconds)
        reason = f": {ended.reason}" if ended.reason else ""
        logger.info("[%*d/%d] %-6s %s (%.1f s)%s%s", len(str(self.total)), self.total - left, self.total, ended.status,
                    ended.cell.title(), ended.seconds, reason, self._eta(left))

    def _eta(self, left: int) -> str:
        seconds = sum(self.spent) / len(self.spent) * left / max(1, min(self.workers, left))
        return f" · {left} left, about {terminal.duration(seconds)}" if left else ""


class GridSweeper(Sweeper):
    """Plans the whole grid first, then launches what is missing. Ends with the board and an exit code."""

    def __init__(self, launch: bool = True, also: Sequence[str] = ()) -> None:
        self.launch, self.also = launch, list(also)
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        if self.launch:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config,
            )

    def sweep(self, arguments: list[str]) -> Any:
        """Plan, record, launch, report. Raises SystemExit(1) if any cell failed."""
        assert self.config is not None
        root, how = root_of(self.config), settings(self.config)
        suite = read_words([*arguments, *self.also])
        points = [point for words in self._experiments(list(suite.typed))
                  for point in expand(words, self._blocks(words))]
        points = kept(points, suite, self._defaults()) if suite.only else points
        found = plan(resolve_cells(extended(points, suite), self._compose), how.results, root.mode)
        planned = fitting(found, points, suite)
        terminal.show_plan(planned)
        if not self.launch:
            return planned
        self._record(planned, how)
        ended = self._run([p.cell for p in planned if p.todo == "run"], how, root)
        return finish(planned, ended, how)

    def _experiments(self, words: list[str]) -> list[list[str]]:
        """The words once per experiment, since each brings blocks of its own."""
        named = choices(words).get("experiment", [])
        others = [word for word in words if not word.startswith("experiment=")]
        return [[name, *others] for name in named] or [others]

    def _blocks(self, words: Sequence[str]) -> list[Any]:
        found = self._compose([word for word in words if word.startswith("experiment=")]).blocks
        blocks = OmegaConf.to_container(found)
        assert isinstance(blocks, list)
        return blocks

    def _defaults(self) -> dict[str, str]:
        """What a cell has that says nothing of a key."""
        cfg = self._compose([])
        return {**{str(key): str(cfg[key]) for key in cfg if key != "hydra"}, **chosen(cfg)}

    def _compose(self, words: Sequence[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, list(words))

    def _record(self, planned: Sequence[Planned], how: Settings) -> None:
        for path in freeze(planned, how.results):
            logger.info("Plan: %s", path)
        for one in planned:
            if one.todo == "n/a":
                write(not_applicable(one.cell, one.reason), how.results)

    def _run(self, cells: Sequence[Cell], how: Settings, root: Config) -> list[Ended]:
        if not cells:
            return []
        progress = Progress(len(cells))
        if isinstance(self.launcher, WorkersLauncher):
            return self.launcher.run(in_order(cells), how, root, progress)
        return self._run_elsewhere(in_order(cells), how)

    def _run_elsewhere(self, cells: Sequence[Cell], how: Settings) -> list[Ended]:
        """Under one of Hydra's own launchers a job composes its config when it starts, so it gets the planned id."""
        assert self.launcher is not None and self.config is not None
        with read_write(self.config), open_dict(self.config):
            self.config.hydra.sweep.dir = str(how.results / cells[0].suite)
        before = [stamp(cell.folder(how.results)) for cell in cells]
        started = time.monotonic()
        returned = self.launcher.launch([[*cell.overrides, f"cell={cell.id}"] for cell in cells], initial_job_idx=0)
        seconds = (time.monotonic() - started) / len(cells)
        return [judge(cell, old, back, seconds, how)
                for cell, old, back in zip(cells, before, returned, strict=True)]


def judge(cell: Cell, before: tuple[int, int] | None, back: JobReturn, seconds: float, how: Settings) -> Ended:
    """How a cell ended under a foreign launcher: by the result it wrote, else by what the launcher says."""
    now = stamp(cell.folder(how.results))
    result = result_of(cell.folder(how.results)) if now not in (None, before) else None
    if result is None:
        error = back._return_value if back.status == JobStatus.FAILED else "its job ended and left no result"
        result = failed(cell, type(error).__name__ if isinstance(error, Exception) else "JobEnded", str(error))
        if not isinstance(error, PlanChanged):
            write(result, how.results)
    return Ended(cell, result.status, seconds, result.error.message if result.error else result.reason)


def finish(planned: Sequence[Planned], ended: Sequence[Ended], how: Settings) -> list[Ended]:
    """Write and show the boards, then say what failed."""
    for suite in dict.fromkeys(p.cell.suite for p in planned):
        _board(how.results / suite)
    wrong = [one for one in ended if one.status == "failed"]
    unrun = len([p for p in planned if p.todo == "run"]) - len(ended)
    if wrong or unrun:
        terminal.show_failures(wrong, unrun, how.results)
        raise SystemExit(1)
    return list(ended)




def _board(folder: Path) -> None:
    """A board that cannot be made, say because no cell has a result yet, hides no failure."""
    from bench.leaderboard import print_boards, write_boards

    try:
        print_boards(write_boards(folder))
    except BenchError as error:
        logger.warning("%s", error)
