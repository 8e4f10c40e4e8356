"""Mirror results elsewhere. ``result.json`` is the record; a tracker that fails is a warning in it, never more."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from bench.errors import BenchError, unknown
from bench.results import Result, SampleRow, add_warnings

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["online", "offline", "disabled"]
MODES = ("online", "offline", "disabled")
MOST_ROWS = 500
MOST_IMAGES = 24
"""Per cell: a mirror is for looking at; all rows are in ``samples.jsonl``."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """``record`` mirrors one finished cell. ``images``: name -> uint8 [3, h, w]. ``folder``: where files may go."""

    def record(self, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor], folder: Path,
               ) -> None: ...


@dataclass(frozen=True)
class NullTracker:
    """Mirrors nothing."""

    def record(self, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor], folder: Path) -> None:
        return None


@dataclass(frozen=True)
class ListTracker:
    """Keeps what it is given, for tests."""

    records: list[tuple[Result, tuple[SampleRow, ...], dict[str, Tensor]]] = field(default_factory=list)

    def record(self, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor], folder: Path) -> None:
        self.records.append((result, tuple(rows), dict(images)))


@dataclass(frozen=True)
class WandbTracker:
    """One Weights & Biases run per cell: its id is the cell's, its group the suite.

    ``mode``: offline (default; upload later with ``wandb sync``), online, or disabled.
    """

    project: str = "bench"
    mode: str = "offline"
    entity: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, "tracker wandb", MODES)

    def record(self, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with self.start(result, folder) as run:
            fill(run, result, rows, images)

    def start(self, result: Result, folder: Path) -> Any:
        """The run, which ends with its ``with`` block."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        online: dict[str, Any] = {"resume": "allow"} if self.mode == "online" else {}
        return wandb.init(
            project=self.project, entity=self.entity, mode=cast(Mode, self.mode), dir=str(folder), id=result.cell.id,
            group=result.suite, job_type="cell", name=run_name(result), tags=tags(result),
            # Without this a second init in one process returns the first run and ignores the new id.
            reinit="finish_previous", config=configuration(result), settings=quiet(), **online,
        )


def quiet() -> Any:
    """No console capture, no machine statistics, no copy of the code or of the host's details."""
    import wandb

    return wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, x_disable_meta=True,
                          x_disable_stats=True)


def fill(run: Any, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor]) -> None:
    """Summary, per-sample table and images of one result."""
    import wandb

    run.summary.update(summary(result))
    if rows:
        table = wandb.Table(columns=["metric", "sample", "cluster", "value", "reason"])
        for row in rows[:MOST_ROWS]:
            table.add_data(row.metric, row.sample, row.cluster, row.value, row.reason)
        run.log({"samples": table})
    for name, pixels in islice(images.items(), MOST_IMAGES):
        array = pixels.permute(1, 2, 0).cpu().numpy()
        run.log({f"images/{name}": wandb.Image(array, caption=name, file_type="png")})


def run_name(result: Result) -> str:
    """Defense, attack and seed: what one looks for in a list of runs."""
    cell = result.cell
    purifier = [cell.purifier.label] if cell.purifier and cell.purifier.name != "none" else []
    defense = f"{cell.defense.label} on {cell.surrogate.name}" if cell.surrogate else cell.defense.label
    return "/".join([defense, *purifier, cell.attack.label, f"s{cell.seed}"])


def tags(result: Result) -> list[str]:
    """W&B refuses tags longer than 64 characters."""
    cell = result.cell
    found = [cell.track, cell.model.name, cell.defense.name, cell.attack.name, result.status]
    return list(dict.fromkeys(tag[:64] for tag in found if tag))


def configuration(result: Result) -> dict[str, Any]:
    """The resolved cell, with where it came from."""
    return {**result.cell.model_dump(mode="json"), "suite": result.suite, "stamp": result.stamp,
            "provenance": result.provenance}


def summary(result: Result) -> dict[str, Any]:
    """Metrics by name, their interval ends beside them; a missing value is left out."""
    found: dict[str, Any] = {"status": result.status, "reason": result.reason or (
        result.error.message if result.error else "")}
    for measured in result.measurements:
        ends = {"": measured.value, "_low": measured.low, "_high": measured.high}
        found.update({measured.name + end: value for end, value in ends.items() if value is not None})
    found["seconds"] = round(sum(stage.seconds for stage in result.cost), 3)
    return found


def mirrored(tracker: Tracker, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor],
             folder: Path) -> Result:
    """Mirror ``result``, which lies in ``folder``; returns it, there and here with a warning if the tracker failed."""
    try:
        tracker.record(result, rows, images, folder)
    except Exception as error:
        message = f"tracking: {type(error).__name__}: {error}"
        log.warning(message)
        return _warned(result, message, folder)
    return result


def _warned(result: Result, message: str, folder: Path) -> Result:
    try:
        return add_warnings(result, [message], folder)
    except (BenchError, OSError) as error:  # the result itself lies there already, and is worth more than a note in it
        log.warning("%s", error)
        return result.model_copy(update={"warnings": [*result.warnings, message]})
