"""Finished cells as boards read them, and what makes two of them comparable."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path

from bench.config import SERVED_BY_DATA
from bench.identity import digest_plain
from bench.results import (
    CellRecord,
    MeasurementRecord,
    ModelRecord,
    PluginRecord,
    Result,
    data_identity,
    read_result,
)
from bench.samples import KEPT, Places, Samples, read_samples
from bench.stats import Layout, Tally, layout_of


@dataclass(frozen=True)
class Run:
    """A result with its rows by measurement. ``lacks``: what a result that was made of several would have needed.
    ``made_of``: the ids of those several, none for a cell that ran."""

    result: Result
    rows: Mapping[str, Samples]
    lacks: tuple[str, ...] = ()
    made_of: tuple[str, ...] = ()

    @cached_property
    def found(self) -> dict[str, MeasurementRecord]:
        """The measurements by name."""
        return {measured.name: measured for measured in self.result.measurements}

    @cached_property
    def means(self) -> frozenset[str]:
        """The measurements whose value is the mean of their rows."""
        return frozenset(m.name for m in self.result.measurements if is_mean(m, self.rows.get(m.name)))

    @cached_property
    def line(self) -> str:
        """See :func:`defense_key`."""
        return defense_key(self.result.cell)

    @property
    def cells(self) -> tuple[str, ...]:
        """The ids of all cells behind it."""
        return self.made_of or (self.result.cell.id,)


def read_run(folder: Path) -> Run:
    result = read_result(folder)
    return Run(result, read_samples(result, folder))


def group_key(result: Result) -> str:
    """The same for all cells that differ in defense, surrogate and seed alone."""
    cell = result.cell
    purifier = cell.purifier.identity() if cell.purifier else None
    return digest_plain([cell.track, cell.model.digest or cell.model.name, data_identity(cell), cell.attack.identity(),
                   purifier, cell.protocol])


def family_key(result: Result) -> str:
    """The same for all cells that may differ in purifier, too."""
    cell = result.cell
    return digest_plain([cell.track, cell.model.digest or cell.model.name, data_identity(cell), cell.attack.identity(),
                   cell.protocol])


def question_key(result: Result) -> str:
    """The same for all cells that may differ in attack and attacked model, too."""
    return digest_plain([result.cell.track, data_identity(result.cell), result.cell.protocol])


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
    return digest_plain([cell.defense.identity(), cell.surrogate.digest if cell.surrogate else ""])


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


def is_mean(measured: MeasurementRecord, rows: Samples | None) -> bool:
    if rows is None or rows.mean is None or measured.value is None:
        return False
    return math.isclose(rows.mean, measured.value, rel_tol=1e-5, abs_tol=1e-6)


def samples_of(runs: Sequence[Run], name: str) -> Tally:
    """The samples of one measurement that have a value, over runs."""
    found = [(run.result.cell, rows) for run in runs if (rows := run.rows.get(name))]
    layout = layout_over(tuple((str(cell.seed), cell.track == "backdoor", rows.known_places) for cell, rows in found))
    return Tally(layout, found[0][1].known if len(found) == 1 else tuple(chain.from_iterable(
        rows.known for _, rows in found)))


@lru_cache(KEPT)
def layout_over(parts: tuple[tuple[str, bool, Places], ...]) -> Layout:
    """Of the samples of several seeds. The unit of statistics: a subject stays one over all seeds; a backdoor is
    implanted anew with each, so that its seeds are units of their own."""
    return layout_of(tuple(
        (f"{cluster}/s{seed}", "", name) if nested else (cluster, seed, name)
        for seed, nested, places in parts for cluster, name in zip(places.clusters, places.names, strict=True)))
