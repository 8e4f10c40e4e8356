"""The planning sweeper, as a Hydra plugin.

This and `bench.launchers` touch Hydra's private side: Hydra 1.3 runs only plugins whose name starts with
``hydra_plugins.``, so ``register`` files ours under such a name, while the classes stay importable from here by other
processes.
"""

from __future__ import annotations

import logging
import secrets
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
from bench.files import told
from bench.launcher import SWEEP, Ended, running_folder, stamp
from bench.launchers import PREFIX, CellLauncher, register_launchers
from bench.lease import SUFFIX, announced, clear
from bench.outcomes import failed, not_applicable, write
from bench.planner import Planned, choices, chosen, expand, freeze, in_order, plan, resolve_cells, result_of
from bench.suites import extended, fitting, kept, read_words

logger = logging.getLogger(__name__)


@dataclass
class SweeperConf:
    """``launch``: false plans only. ``also``: overrides of plugins that the master config does not hold."""

    _target_: str = f"{PREFIX}GridSweeper"
    launch: bool = True
    also: list[str] = field(default_factory=list)


class PlanChanged(BenchError):
    """A job whose own cell is not the one that was planned."""


def register() -> None:
    """Make ``hydra/sweeper=bench`` and our launchers known to Hydra."""
    Plugins.instance().class_name_to_class[f"{PREFIX}GridSweeper"] = GridSweeper
    ConfigStore.instance().store(group="hydra/sweeper", name="bench", node=SweeperConf, provider="bench")
    register_launchers()


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
        with told("results", how.results):
            for path in freeze(planned, how.results):
                logger.info("Plan: %s", path)
        for one in planned:
            if one.todo == "n/a" and not _on_record(one, how):
                write(not_applicable(one.cell, one.reason), how.results)

    def _run(self, cells: Sequence[Cell], how: Settings, root: Config) -> list[Ended]:
        if not cells:
            return []
        folder = running_folder(how.results / cells[0].suite)
        clear(folder)
        with announced(folder / f"{SWEEP}{secrets.token_hex(4)}{SUFFIX}", str(how.store)):
            if isinstance(self.launcher, CellLauncher):
                return self.launcher.run(in_order(cells), how, root)
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



def _on_record(planned: Planned, how: Settings) -> bool:
    """Whether the same is written there already; writing a thousand files anew takes a while."""
    before = result_of(planned.cell.folder(how.results))
    return before is not None and before.reason == planned.reason and before.stamp == planned.cell.stamp


def _board(folder: Path) -> None:
    """A board that cannot be made, say because no cell has a result yet, hides no failure."""
    from bench.leaderboard import print_boards, write_boards

    try:
        with told("leaderboard", folder):
            print_boards(write_boards(folder), folder=folder)
    except BenchError as error:
        logger.warning("%s", error)
