"""The worst case over purifiers: an attacker who tries them all keeps, for every sample, the one that served best.

Of each sample (one subject, prompt, place and seed, hence the same noise under every purifier) the value is taken
that is worst for the defender; then everything goes on as for any other board. BlurGuard's benchmark reports it as its
headline. A worst value is worse than a mean even where purifiers do nothing, so it is read against the controls' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.identity import digest
from bench.results import (
    MeasurementRecord,
    PluginRecord,
    Result,
    SampleRow,
    protocol_hash,
)
from bench.runs import Run, defense_key, does_nothing, is_control, is_mean, points_of, primary
from bench.stats import Difference, Estimate, Point, mean_interval, paired_difference

FEWEST = 2
"""Purifiers from which there is a worst case."""


@dataclass(frozen=True)
class MatrixRow:
    """One defense under each purifier, in the order of the matrix's columns. ``clean``: photos without protection, the
    control of each purifier."""

    label: str
    control: bool
    clean: bool
    cells: tuple[Estimate, ...]


@dataclass(frozen=True)
class Matrix:
    """Defenses by purifiers, scored by the measurement that ranks; the last two columns are mean and worst case.

    ``shifts``: by purifier, the paired difference between clean photos purified and clean photos as they are.
    """

    measurement: str
    unit: str
    higher_is_better: bool
    columns: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    shifts: Mapping[str, Difference]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Cells that differ in purifier, defense and seed, and share the protocol of the measurement ``name``.

    ``purifiers``: those that count, by key, the control first.
    """

    name: str
    runs: tuple[Run, ...]
    purifiers: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"worst case over {len(self.purifiers)} purifiers: {', '.join(self.purifiers.values())}"

    @cached_property
    def by_defense(self) -> dict[str, dict[int, dict[str, Run]]]:
        """Defense, seed, purifier -> cell."""
        found: dict[str, dict[int, dict[str, Run]]] = {}
        for run in self.runs:
            cell = run.result.cell
            if (key := purifier_key(run)) in self.purifiers and cell.seed in self.seeds:
                found.setdefault(defense_key(cell), {}).setdefault(cell.seed, {})[key] = run
        return found

    @cached_property
    def seeds(self) -> set[int]:
        """Those for which a control ran under every purifier, or any defense, or else all."""
        whole: dict[bool, set[int]] = {True: set(), False: set()}
        ran: dict[tuple[str, int], set[str]] = {}
        for run in self.runs:
            cell = run.result.cell
            if run.result.status == "ok":
                under = ran.setdefault((defense_key(cell), cell.seed), set())
                under.add(purifier_key(run))
                whole[is_control(cell.defense)] |= {cell.seed} if under >= set(self.purifiers) else set()
        return whole[True] or whole[False] or {run.result.cell.seed for run in self.runs}


def families(runs: Sequence[Run]) -> list[Family]:
    """Of cells that differ in purifier, defense and seed alone, the sets that have a worst case: one per protocol of
    the measurement that ranks. Cells without it stand in each."""
    name = primary(runs)
    keys = {run.result.cell.id: measure_key(found) for run in runs
            if name and (found := run.result.measurement(name))}
    parts = [[run for run in runs if keys.get(run.result.cell.id, key) == key] for key in sorted(set(keys.values()))]
    made = [Family(name, tuple(part), counted_purifiers(part, name)) for part in parts]
    return [family for family in made if len(family.purifiers) >= FEWEST]


def measure_key(measured: MeasurementRecord) -> str:
    """What two numbers must share to be compared over purifiers."""
    return digest([measured.name, measured.metric, measured.version, measured.parameters, measured.protocol])


def purifier_key(run: Run) -> str:
    purifier = run.result.cell.purifier
    return digest(purifier.identity()) if purifier else ""


def counted_purifiers(runs: Sequence[Run], name: str) -> dict[str, str]:
    """Purifiers with their labels: those that a control met, for others lack a clean-photo control; without controls,
    all. Only those under which the measurement was made sample by sample."""
    scored = [run for run in runs if (m := run.result.measurement(name)) and is_mean(m, run.rows.get(name, ()))]
    met = [run for run in scored if is_control(run.result.cell.defense)] or scored
    found = {purifier_key(run): run.result.cell.purifier for run in met}
    labelled = {key: purifier.label if purifier else "none" for key, purifier in found.items()}
    order = sorted(found, key=lambda key: (not does_nothing(found[key]), labelled[key], key))
    return {key: labelled[key] for key in order}


def worst_runs(family: Family) -> list[Run]:
    """One run per defense and seed, whose samples are the worst over the purifiers."""
    return [worst_run(family, under) for seeds in family.by_defense.values() for under in seeds.values()]


def worst_run(family: Family, under: Mapping[str, Run]) -> Run:
    """The worst of one defense and seed; a run without measurements where a purifier is lacking."""
    first = next(iter(under.values()))
    finished = {key: run for key, run in under.items() if run.result.status == "ok"}
    base = next(iter(finished.values()), first).result
    cell = base.cell.model_copy(update={"purifier": PluginRecord(
        kind="purifier", name="worst_case", label=family.title, version=1,
        parameters={"over": list(family.purifiers)})})
    result = base.model_copy(update={"cell": cell, "measurements": []})
    if not finished:
        return Run(result, {})
    if lacks := lacking(family, under):
        return Run(result, {}, lacks)
    sources = [finished[key] for key in family.purifiers]
    worst = [made for m in base.measurements if (made := worst_measurement(m, sources, result, family))]
    return Run(result.model_copy(update={"measurements": [m for m, _ in worst]}), {m.name: rows for m, rows in worst})


def lacking(family: Family, under: Mapping[str, Run]) -> tuple[str, ...]:
    """Why there is no worst case: purifiers without a cell, and cells without a value."""
    absent = [label for key, label in family.purifiers.items() if key not in under]
    said = [f"no cell under {', '.join(absent)}"] if absent else []
    for key, label in family.purifiers.items():
        result = under[key].result if key in under else None
        if result and result.error:
            said.append(f"failed under {label}: {result.error.type}")
        elif result and result.status == "n/a":
            said.append(f"n/a under {label}: {result.reason}")
        elif result and result.measurement(family.name) is None:
            said.append(f"{family.name} not measured under {label}")
    return tuple(said)


def worst_measurement(
    measured: MeasurementRecord, sources: Sequence[Run], result: Result, family: Family,
) -> tuple[MeasurementRecord, list[SampleRow]] | None:
    """One measurement, if it has a better direction and comes sample by sample under every purifier."""
    found = [run.result.measurement(measured.name) for run in sources]
    key, higher = measure_key(measured), measured.higher_is_better
    if higher is None or any(m is None or measure_key(m) != key for m in found):
        return None
    tables = [run.rows.get(measured.name, ()) for run in sources]
    if not all(rows and m and (m.value is None or is_mean(m, rows)) for m, rows in zip(found, tables, strict=True)):
        return None
    rows = worst_rows(dict(zip(family.purifiers.values(), tables, strict=True)), higher)
    values = [row.value for row in rows if row.value is not None]
    metric = PluginRecord(kind="metric", name=measured.metric, label=measured.metric, version=measured.version,
                          parameters=measured.parameters)
    update = {
        "value": math.fsum(values) / len(values) if values else None, "low": None, "high": None, "n": len(rows),
        "clusters": len({row.cluster for row in rows if row.value is not None}),
        "reason": "" if values else measured.reason or rows[0].reason,
        "protocol_hash": protocol_hash(result.cell, metric, measured.name, measured.protocol),
    }
    return measured.model_copy(update=update), rows


def worst_rows(tables: Mapping[str, Sequence[SampleRow]], higher_is_better: bool) -> list[SampleRow]:
    """Sample by sample the worst of the values that there are; no value where a purifier's sample is missing."""
    found: dict[tuple[str, str], dict[str, SampleRow]] = {}
    for label, rows in tables.items():
        for row in rows:
            found.setdefault((row.cluster, row.sample), {})[label] = row
    worst = min if higher_is_better else max
    made = []
    for (cluster, sample), under in found.items():
        values = [row.value for row in under.values() if row.value is not None]
        absent = [label for label in tables if label not in under]
        reason = f"no sample under {', '.join(absent)}" if absent else next(iter(under.values())).reason
        value = worst(values) if values and not absent else None
        made.append(SampleRow(next(iter(under.values())).metric, sample, cluster, value,
                              reason if value is None else ""))
    return made


def make_matrix(family: Family, unit: str, higher: bool, lines: Mapping[str, tuple[str, Estimate]]) -> Matrix:
    """``lines``: defense -> its label and its worst case, in the order of the board. Those that met one purifier only
    are left out: the board of that purifier has them."""
    rows, shifts = [], {}
    for key, (label, worst) in lines.items():
        defense = next(iter(next(iter(family.by_defense[key].values())).values())).result.cell.defense
        points = {purifier: under_purifier(family, key, purifier) for purifier in family.purifiers}
        if sum(map(bool, points.values())) < FEWEST:
            continue
        cells = tuple(mean_interval(found, share=unit == "share") for found in points.values())
        whole = worst.value is not None
        mean = mean_interval(mean_points(list(points.values()))) if whole else worst
        rows.append(MatrixRow(label, is_control(defense), does_nothing(defense), (*cells, mean, worst)))
        if does_nothing(defense):
            shifts = shifts_of(family, points)
    return Matrix(family.name, unit, higher, (*family.purifiers.values(), "mean", "worst"), tuple(rows), shifts,
                  tuple(harms(family.name, shifts, higher)))


def under_purifier(family: Family, defense: str, purifier: str) -> list[Point]:
    """All seeds' samples of a defense under one purifier."""
    return [point for under in family.by_defense[defense].values() if purifier in under
            for point in points_of(under[purifier], family.name)]


def mean_points(tables: Sequence[Sequence[Point]]) -> list[Point]:
    """Sample by sample the mean over purifiers, of samples that all have."""
    values: dict[tuple[str, str], list[float]] = {}
    for points in tables:
        for point in points:
            values.setdefault((point.unit, point.sample), []).append(point.value)
    return [Point(unit, sample, math.fsum(of) / len(of)) for (unit, sample), of in values.items()
            if len(of) == len(tables)]


def shifts_of(family: Family, points: Mapping[str, Sequence[Point]]) -> dict[str, Difference]:
    """What each purifier does to clean photos: none where no cell left them as they are."""
    purifiers = {purifier_key(run): run.result.cell.purifier for run in family.runs}
    plain = next((key for key in family.purifiers if does_nothing(purifiers[key])), None)
    if plain is None:
        return {}
    return {label: paired_difference(points[key], points[plain])
            for key, label in family.purifiers.items() if key != plain}


def harms(name: str, shifts: Mapping[str, Difference], higher: bool) -> list[str]:
    """A purifier that protects clean photos by itself: its rows owe part of their value to it, not to the defense."""
    return [f"{label} moves {name} of clean photos, too, by {d.value:+.3g} [{d.low:+.3g}, {d.high:+.3g}]: compare its "
            "column with its clean row, not with another column"
            for label, d in shifts.items()
            if d.value is not None and d.excludes_zero and (d.value > 0) == higher]
