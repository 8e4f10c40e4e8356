"""The results of cells that did not run to their end: not applicable, or failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.config import Cell, data_digest
from bench.identity import plain
from bench.results import CellRecord, ErrorRecord, ModelRecord, PluginRecord, Result, plugin_record, write_result

if TYPE_CHECKING:
    from pathlib import Path


def cell_record(cell: Cell) -> CellRecord:
    """A cell as it goes on record. A model that is a folder is named by the folder's last part."""
    return CellRecord(
        id=cell.id, track=cell.track, model=_model(cell.model, cell.model_digest),
        surrogate=_model(cell.surrogate, cell.surrogate_digest) if cell.surrogate else None,
        data=_plugin(cell, "data"), data_digest=data_digest(cell.data), attack=_plugin(cell, "attack"),
        defense=_plugin(cell, "defense"), purifier=_plugin(cell, "purifier"), seed=cell.seed,
        protocol=plain(cell.protocol),
    )


def _model(name: str, digest: str) -> ModelRecord:
    return ModelRecord(name=name.rstrip("/").rpartition("/")[2], digest=digest)


def _plugin(cell: Cell, kind: str) -> PluginRecord:
    return plugin_record(getattr(cell, kind), cell.labels.get(kind, ""))


def not_applicable(cell: Cell, reason: str) -> Result:
    """A cell that cannot run, with its reason."""
    return Result(suite=cell.suite, cell=cell_record(cell), status="n/a", reason=reason, stamp=cell.stamp)


def failed(cell: Cell, kind: str, message: str, traceback: str = "") -> Result:
    """A cell that ended without a value. ``kind``: an exception's class, or how the process ended."""
    error = ErrorRecord(type=kind, message=message, traceback=traceback)
    return Result(suite=cell.suite, cell=cell_record(cell), status="failed", error=error, stamp=cell.stamp)


def write(result: Result, results: Path) -> Result:
    """Write such a result, which has no samples and no images, into its cell's folder."""
    return write_result(result, [], {}, results / result.suite / result.cell.id)
