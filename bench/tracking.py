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
from bench.results import IMAGES, RESULT, SAMPLES, Result, SampleRow, add_warnings

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["online", "offline", "disabled"]
MODES = ("online", "offline", "disabled")
MOST_ROWS = 500
MOST_IMAGES = 24
"""Per cell: a mirror is for looking at; all rows are in ``samples.jsonl``."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """``record`` mirrors one finished cell, whose files lie in ``folder``. ``images``: name -> uint8 [3, h, w]."""

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


def preloaded(mode: str) -> tuple[str, ...]:
    """What beginning a run imports anyway, 2 seconds of every cell unless a fork server has it."""
    return () if mode == "disabled" else ("wandb.sdk.launch",)


@dataclass(frozen=True)
class WandbTracker:
    """One Weights & Biases run per cell: its id is the cell's, its group the suite.

    ``mode``: offline (default; upload later with ``wandb sync``), online, or disabled. ``timeout``: seconds that a run
    may take to begin. ``files``: where W&B keeps its own; beside the cell if None.
    """

    project: str = "bench"
    mode: str = "offline"
    entity: str | None = None
    timeout: float = 60.0
    files: Path | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, "tracker wandb", MODES)

    def record(self, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor | Path], folder: Path,
               ) -> None:
        with self.start(result, folder) as run:
            fill(run, result, rows, images, folder)

    def start(self, result: Result, folder: Path) -> Any:
        """The run of a cell, which ends with its ``with`` block."""
        return self.begin(result.cell.id, folder, group=result.suite, job_type="cell", name=run_name(result),
                          tags=tags(result), config=configuration(result))

    def begin(self, id: str, folder: Path, **told: Any) -> Any:
        """A run with this id: the one that has it already, where W&B knows one."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        files = self.files or folder
        files.mkdir(parents=True, exist_ok=True)
        online: dict[str, Any] = {"resume": "allow"} if self.mode == "online" else {}
        return wandb.init(
            project=self.project, entity=self.entity, mode=cast(Mode, self.mode), dir=str(files), id=id,
            # Without this a second init in one process returns the first run and ignores the new id.
            reinit="finish_previous", settings=quiet(self.timeout), **told, **online,
        )


def quiet(timeout: float) -> Any:
    """No console capture, no machine statistics, no copy of the code or of the host's details."""
    import wandb

    return wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, x_disable_meta=True,
                          x_disable_stats=True, init_timeout=timeout)


def fill(run: Any, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Tensor | Path], folder: Path,
         ) -> None:
    """Summary, per-sample table and images of one result, and where its files lie."""
    import wandb

    run.summary.update(summary(result))
    if rows:
        table = wandb.Table(columns=["metric", "sample", "cluster", "value", "reason"])
        for row in rows[:MOST_ROWS]:
            table.add_data(row.metric, row.sample, row.cluster, row.value, row.reason)
        run.log({"samples": table})
    for name, picture in islice(images.items(), MOST_IMAGES):
        shown = str(picture) if isinstance(picture, Path) else picture.permute(1, 2, 0).cpu().numpy()
        run.log({f"images/{name}": wandb.Image(shown, caption=name, file_type="png")})
    if files := result_files(result, folder):
        about = {"suite": result.suite, "status": result.status, "seal": result.seal}
        run.log_artifact(referring(f"result-{result.cell.id}", "result", files, about))


def result_files(result: Result, folder: Path) -> dict[str, Path]:
    """The files of a result that lie in its folder: name in the folder -> place."""
    names = [RESULT, SAMPLES, *(f"{IMAGES}/{name}" for name in result.images)]
    return {name: folder / name for name in names if (folder / name).is_file()}


def referring(name: str, kind: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> Any:
    """An artifact that says where files lie and what is in them (their digest), and uploads none of them."""
    import wandb

    artifact = wandb.Artifact(name, type=kind, metadata=dict(about))
    for relative, place in files.items():
        artifact.add_reference(place.resolve().as_uri(), name=relative)
    return artifact


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
