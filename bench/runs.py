"""Finished cells as boards read them, and what makes two of them comparable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.config import SERVED_BY_DATA
from bench.identity import digest
from bench.results import (
    CellRecord,
    MeasurementRecord,
    ModelRecord,
    PluginRecord,
    Result,
    SampleRow,
    data_identity,
    read_result,
    rows_of,
)
from bench.stats import Point


@dataclass(frozen=True)
class Run:
    """A result with its rows by measurement. ``lacks``: what a result that was made of several would have needed.
    ``made_of``: the ids of those several, none for a cell that ran."""

    result: Result
    rows: Mapping[str, Sequence[SampleRow]]
    lacks: tuple[str, ...] = ()
    made_of: tuple[str, ...] = ()

    @property
    def cells(self) -> tuple[str, ...]:
        """The ids of all cells behind it."""
        return self.made_of or (self.result.cell.id,)


def read_run(folder: Path) -> Run:
    result = read_result(folder)
    rows: dict[str, list[SampleRow]] = {}
    for row in rows_of(result, folder):
        rows.setdefault(row.metric, []).append(row)
    return Run(result, rows)


def group_key(result: Result) -> str:
    """The same for all cells that differ in defense, surrogate and seed alone."""
    cell = result.cell
    purifier = cell.purifier.identity() if cell.purifier else None
    return digest([cell.track, cell.model.digest or cell.model.name, data_identity(cell), cell.attack.identity(),
                   purifier, cell.protocol])


def family_key(result: Result) -> str:
    """The same for all cells that may differ in purifier, too."""
    cell = result.cell
    return digest([cell.track, cell.model.digest or cell.model.name, data_identity(cell), cell.attack.identity(),
                   cell.protocol])


def question_key(result: Result) -> str:
    """The same for all cells that may differ in attack and attacked model, too."""
    return digest([result.cell.track, data_identity(result.cell), result.cell.protocol])


def protected_on(cell: CellRecord) -> ModelRecord | None:
    """The model that photos were protected on, None for a defense that looks at no model."""
    if cell.surrogate:
        return cell.surrogate
    needs = set(map(str, cell.defense.facts.get("needs") or ())) - set(SERVED_BY_DATA)
    return cell.model if needs else None


def protects_photos(plugin: PluginRecord | None) -> bool:
    return plugin is not None and plugin.facts.get("acts_on") == "images"


def defense_key(cell: CellRecord) -> str:
    """The same for all cells of one line: a defense with its options, on one surrogate."""
    return digest([cell.defense.identity(), cell.surrogate.digest if cell.surrogate else ""])


def is_control(plugin: PluginRecord | None) -> bool:
    return plugin is None or bool(plugin.facts.get("control"))


def does_nothing(plugin: PluginRecord | None) -> bool:
    """Whether it is the control that leaves photos as they are: the one without options."""
    return plugin is None or (is_control(plugin) and not plugin.parameters)


def primary(group: Sequence[Run]) -> str:
    """The measurement that ranks: the one that most results name first, among those with a better direction."""
    firsts = [next((m.name for m in run.result.measurements if m.higher_is_better is not None), "") for run in group]
    counts = Counter(name for name in firsts if name)
    return min(counts, key=lambda name: (-counts[name], name), default="")


def is_mean(measured: MeasurementRecord, rows: Sequence[SampleRow]) -> bool:
    values = [row.value for row in rows if row.value is not None]
    if not values or measured.value is None:
        return False
    return math.isclose(math.fsum(values) / len(values), measured.value, rel_tol=1e-5, abs_tol=1e-6)


def points_of(run: Run, name: str) -> list[Point]:
    """The samples of one measurement that have a value."""
    nested, seed = run.result.cell.track == "backdoor", str(run.result.cell.seed)
    return [Point(unit_of(run.result, row), row.sample, row.value, "" if nested else seed)
            for row in run.rows.get(name, ()) if row.value is not None]


def unit_of(result: Result, row: SampleRow) -> str:
    """The unit of statistics: a subject stays one over all seeds, a backdoor is implanted anew with each."""
    return f"{row.cluster}/s{result.cell.seed}" if result.cell.track == "backdoor" else row.cluster
