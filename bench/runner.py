"""Run one cell: its track, its metrics, its record. A cell that raises is recorded as failed and hurts no other."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.allocator import keep_freed_memory
from bench.codecs import MeasurementsCodec
from bench.config import Cell, Settings
from bench.errors import BenchError, Incompatible
from bench.outcomes import cell_record, failed, not_applicable
from bench.plugin import identity
from bench.progress import shown
from bench.provenance import now, provenance
from bench.results import (
    MEASURE,
    CellRecord,
    MeasurementRecord,
    Result,
    StageRecord,
    measurement_record,
    merged,
    plugin_record,
    sample_rows,
    stage_record,
    write_result,
)
from bench.store import Store
from bench.tracking import NullTracker, Tracker, WandbTracker, mirrored
from bench.workbench import Outcome, Workbench

if TYPE_CHECKING:
    from bench.records import Measurement, Model

VERSION = 1
log = logging.getLogger(__name__)


def run_cell(cell: Cell, settings: Settings) -> Result:
    """Run one cell to its result, which is written below ``settings.results`` and returned.

    Whatever the cell raises becomes a result of status ``failed`` with its traceback; only an interrupt or an exit
    passes through. A second call reuses every stage that the first one finished.
    """
    started = now()
    with shown(cell.title()) as progress:
        bench = Workbench(Store(settings.store), settings.device, progress)
        try:
            prepare(settings)
            return finish(cell, settings, bench, *measured(cell, bench), started)
        except Incompatible as reason:
            result = not_applicable(cell, str(reason))
        except Exception as error:
            log.error("%s: %s: %s", cell.title(), type(error).__name__, error)
            trace = "" if isinstance(error, BenchError) else traceback.format_exc()
            result = failed(cell, type(error).__name__, str(error), trace)
    update = {"provenance": provenance(started, cell.overrides), "cost": costs(bench)}
    return write_result(result.model_copy(update=update), [], {}, cell.folder(settings.results))


def prepare(settings: Settings) -> None:
    """The same bits for the same seed: a fixed thread count, deterministic kernels where there are any. Freed memory
    stays with the process, and fresh memory is not filled, which torch does beside those kernels. And no bars of other
    libraries between ours."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def measured(cell: Cell, bench: Workbench) -> tuple[Outcome, dict[str, list[Measurement]]]:
    """The track's evidence and every metric on it; a metric is a stage like any other, and trains nothing."""
    model = resolve_model(cell)
    outcome = track_of(cell)(cell, model, bench)
    found = {}
    for name, metric in cell.metrics.items():
        found[name] = bench.stage(
            MEASURE, VERSION, {"evidence": outcome.inputs, "metric": identity(metric)},
            partial(metric.measure, outcome.evidence), MeasurementsCodec(), seeded_by={"metric": identity(metric)},
        ).value
    return outcome, found


def resolve_model(cell: Cell) -> Model:
    from bench.diffusion.checkpoints import resolve

    return resolve(cell.model, cell.allow_pickle)


def track_of(cell: Cell) -> Any:
    from bench.tracks import backdoor, customization, editing

    return {"customization": customization.run, "editing": editing.run, "backdoor": backdoor.run}[cell.track]


def finish(
    cell: Cell, settings: Settings, bench: Workbench, outcome: Outcome, found: Mapping[str, list[Measurement]],
    started: str,
) -> Result:
    """Write the record of a cell that ran to its end, then mirror it to the tracker, so that a tracker that hangs costs
    nothing. What was measured before and is not asked for now stays."""
    record = cell_record(cell)
    everything = [m for ms in found.values() for m in ms]
    result = Result(
        suite=cell.suite, cell=record, status="ok", measurements=records(cell, record, found), stamp=cell.stamp,
        cost=costs(bench), artefacts=artefacts(bench), provenance=provenance(started, cell.overrides),
        warnings=[w for _, stored in bench.used for w in stored.warnings] + list(cell.skipped.values()),
    )
    folder = cell.folder(settings.results)
    result, rows = merged(result, sample_rows(everything), cell.metrics, folder)
    written = write_result(result, rows, outcome.pictures, folder)
    return mirrored(tracker_of(settings), written, rows, outcome.pictures, folder)


def tracker_of(settings: Settings) -> Tracker:
    """W&B as the config wants it."""
    chosen = settings.tracker
    return NullTracker() if chosen.wandb == "disabled" else WandbTracker(chosen.project, chosen.wandb)


def records(
    cell: Cell, record: CellRecord, found: Mapping[str, list[Measurement]],
) -> list[MeasurementRecord]:
    return [measurement_record(m, plugin_record(cell.metrics[name]), record)
            for name, measurements in found.items() for m in measurements]


def costs(bench: Workbench) -> list[StageRecord]:
    return [stage_record(name, stored.key, stored.cost, stored.reused) for name, stored in bench.used]


def artefacts(bench: Workbench) -> dict[str, str]:
    """Stage -> key; a stage that ran for several subjects is numbered."""
    counted: dict[str, int] = {}
    keys = {}
    for name, stored in bench.used:
        counted[name] = counted.get(name, 0) + 1
        keys[name if counted[name] == 1 else f"{name}_{counted[name]}"] = stored.key
    return keys
