"""The worst case over purifiers: an attacker who tries them all keeps, for every sample, the one that served best.
And over attackers: whoever publishes a photo does not know which model it will meet, so where photos were attacked on
several models there is a worst case over all of them, with a matrix of how far each protection carries.

Of each sample (one subject, prompt, place and seed, hence the same noise under every purifier) the value is taken
that is worst for the defender; then everything goes on as for any other board. BlurGuard's benchmark reports it as its
headline. A worst value is worse than a mean even where purifiers do nothing, so it is read against the controls' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from bench.identity import digest_plain
from bench.results import (
    CellRecord,
    MeasurementRecord,
    ModelRecord,
    PluginRecord,
    Result,
    SampleRow,
    protocol_hash,
)
from bench.runs import (
    Run,
    does_nothing,
    is_control,
    is_mean,
    primary,
    protected_on,
    protects_photos,
    samples_of,
)
from bench.samples import Samples, of_rows
from bench.stats import Difference, Estimate, Tally, matched, mean_interval, mean_intervals, paired_differences

FEWEST = 2
"""Purifiers, or attacked models, from which there is a worst case."""
WORST = "worst_case"
ALL_ATTACKS, ALL_MODELS = "all attacks", "all models"
"""What stands for them on the board of their worst case."""


@dataclass(frozen=True)
class MatrixRow:
    """One defense under each purifier or attacker, in the order of the matrix's columns. ``clean``: photos without
    protection, the control of each."""

    label: str
    control: bool
    clean: bool
    cells: tuple[Estimate, ...]


@dataclass(frozen=True)
class Matrix:
    """Defenses by what they met, scored by the measurement that ranks; the last two columns are mean and worst case.

    ``shifts``: by purifier, the paired difference between clean photos purified and clean photos as they are. ``over``:
    what the columns are, ``purifier`` or ``attack``.
    """

    measurement: str
    unit: str
    higher_is_better: bool
    columns: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    shifts: Mapping[str, Difference]
    notes: tuple[str, ...] = ()
    over: str = "purifier"


@dataclass(frozen=True)
class Axis:
    """What the cells of a family differ in besides defense and seed. ``key``, ``label``: of a cell's place on it;
    ``first``: whether that place leads."""

    name: str
    key: Callable[[Run], str]
    label: Callable[[Run], str]
    first: Callable[[Run], bool]


@dataclass(frozen=True)
class Family:
    """Cells that differ along ``axis``, in defense and in seed, and share the protocol of the measurement ``name``.

    ``places``: those on the axis that count, by key, with their labels.
    """

    name: str
    runs: tuple[Run, ...]
    places: Mapping[str, str]
    axis: Axis

    @property
    def title(self) -> str:
        return f"worst case over {len(self.places)} {self.axis.name}s: {', '.join(self.places.values())}"

    @property
    def stand_ins(self) -> dict[str, Any]:
        """What a cell's record says in place of what the family differs in."""
        def stands(kind: str, label: str) -> PluginRecord:
            return PluginRecord(kind=kind, name=WORST, label=label, version=1, parameters={"over": list(self.places)})

        if self.axis.name == PURIFIER.name:
            return {"purifier": stands("purifier", self.title)}
        return {"attack": stands("attack", ALL_ATTACKS), "model": ModelRecord(name=ALL_MODELS),
                "purifier": stands("purifier", self.title)}

    @cached_property
    def by_defense(self) -> dict[str, dict[int, dict[str, Run]]]:
        """Defense, seed, place -> cell."""
        found: dict[str, dict[int, dict[str, Run]]] = {}
        for run in self.runs:
            cell = run.result.cell
            if (key := self.axis.key(run)) in self.places and cell.seed in self.seeds:
                found.setdefault(run.line, {}).setdefault(cell.seed, {})[key] = run
        return found

    @cached_property
    def hashes(self) -> dict[str, list[tuple[MeasurementRecord, str]]]:
        """Of the worst case, by measurement, as they become known."""
        return {}

    def hash_of(self, measured: MeasurementRecord, cell: CellRecord) -> str:
        """The protocol hash of a worst case, whose cells differ in defense and seed alone."""
        known = self.hashes.setdefault(measured.name, [])
        for one, hash in known:
            if same_measure(one, measured):
                return hash
        metric = PluginRecord(kind="metric", name=measured.metric, label=measured.metric, version=measured.version,
                              parameters=measured.parameters)
        known.append((measured, protocol_hash(cell, metric, measured.name, measured.protocol)))
        return known[-1][1]

    @cached_property
    def worst(self) -> list[Run]:
        """One run per defense and seed, whose samples are the worst over the places."""
        return [worst_run(self, under) for seeds in self.by_defense.values() for under in seeds.values()]

    @cached_property
    def seeds(self) -> set[int]:
        """Those for which a control ran at every place, or any defense, or else all."""
        whole: dict[bool, set[int]] = {True: set(), False: set()}
        ran: dict[tuple[str, int], set[str]] = {}
        for run in self.runs:
            cell = run.result.cell
            if run.result.status == "ok":
                under = ran.setdefault((run.line, cell.seed), set())
                under.add(self.axis.key(run))
                whole[is_control(cell.defense)] |= {cell.seed} if under >= set(self.places) else set()
        return whole[True] or whole[False] or {run.result.cell.seed for run in self.runs}


def families(runs: Sequence[Run]) -> list[Family]:
    """Of cells that differ in purifier, defense and seed alone, the sets that have a worst case."""
    return [family for family in by_protocol(runs, PURIFIER) if len(family.places) >= FEWEST]


def attackers(runs: Sequence[Run], purified: Sequence[Family]) -> list[Family]:
    """Of cells that differ in attack, attacked model, purifier, defense and seed, the sets with a worst case over
    attackers: on photos as they were published, and on photos under each attacker's worst purifier where there are
    ``purified`` families. None where one model was attacked, or where defenses do not protect photos: only then does
    the attacker come after them and choose."""
    if not any(protects_photos(run.result.cell.defense) for run in runs):
        return []
    plain = [run for run in runs if does_nothing(run.result.cell.purifier)]
    sets = [plain, [run for family in purified for run in family.worst]]
    made = [family for part in sets for family in by_protocol([on_its_model(run) for run in part], ATTACKER)]
    return [family for family in made if len(attacked(family)) >= FEWEST]


def attacked(family: Family) -> set[str]:
    """The models at the places of a family."""
    return {run.result.cell.model.digest or run.result.cell.model.name for run in family.runs
            if family.axis.key(run) in family.places}


def on_its_model(run: Run) -> Run:
    """The run with the model that it was protected on said, be it the attacked one or not: where the attacked models
    differ, protection on one of them is another line than protection on each."""
    cell = run.result.cell.model_copy(update={"surrogate": protected_on(run.result.cell)})
    return replace(run, result=run.result.model_copy(update={"cell": cell}))


def by_protocol(runs: Sequence[Run], axis: Axis) -> list[Family]:
    """One family per protocol of the measurement that ranks; cells without it stand in each."""
    name = primary(runs)
    keys = {run.result.cell.id: measure_key(found) for run in runs
            if name and (found := run.result.measurement(name))}
    parts = [[run for run in runs if keys.get(run.result.cell.id, key) == key] for key in sorted(set(keys.values()))]
    return [Family(name, tuple(part), counted(part, name, axis), axis) for part in parts]


def measure_key(measured: MeasurementRecord) -> str:
    """What two numbers must share to be compared over purifiers."""
    return digest_plain([measured.name, measured.metric, measured.version, measured.parameters, measured.protocol])


def same_measure(one: MeasurementRecord, other: MeasurementRecord | None) -> bool:
    return other is not None and (one.name, one.metric, one.version, one.parameters, one.protocol) == (
        other.name, other.metric, other.version, other.parameters, other.protocol)


def purifier_key(run: Run) -> str:
    purifier = run.result.cell.purifier
    return digest_plain(purifier.identity()) if purifier else ""


def purifier_label(run: Run) -> str:
    purifier = run.result.cell.purifier
    return purifier.label if purifier else "none"


def unpurified(run: Run) -> bool:
    return does_nothing(run.result.cell.purifier)


def attacker_key(run: Run) -> str:
    cell = run.result.cell
    return digest_plain([cell.attack.identity(), cell.model.digest or cell.model.name, purifier_key(run)])


def attacker_label(run: Run) -> str:
    cell = run.result.cell
    said = f"{cell.attack.label} on {cell.model.name}"
    if cell.purifier and cell.purifier.name == WORST:
        return f"{said}, worst of {len(cell.purifier.parameters['over'])} purifiers"
    return said


PURIFIER = Axis("purifier", purifier_key, purifier_label, unpurified)
ATTACKER = Axis("attack", attacker_key, attacker_label, lambda run: False)


def counted(runs: Sequence[Run], name: str, axis: Axis) -> dict[str, str]:
    """Places with their labels: those where a control was, for others lack a clean-photo control; without controls,
    all. Only those where the measurement was made sample by sample."""
    scored = [run for run in runs if (m := run.result.measurement(name)) and is_mean(m, run.rows.get(name))]
    met = [run for run in scored if is_control(run.result.cell.defense)] or scored
    found = {axis.key(run): run for run in met}
    order = sorted(found, key=lambda key: (not axis.first(found[key]), axis.label(found[key]), key))
    return {key: axis.label(found[key]) for key in order}


def worst_run(family: Family, under: Mapping[str, Run]) -> Run:
    """The worst of one defense and seed; a run without measurements where a place is lacking."""
    first = next(iter(under.values()))
    finished = {key: run for key, run in under.items() if run.result.status == "ok"}
    base = next(iter(finished.values()), first).result
    cell = base.cell.model_copy(update=family.stand_ins)
    result = base.model_copy(update={"cell": cell, "measurements": []})
    behind = tuple(dict.fromkeys(id for run in under.values() for id in run.cells))
    if not finished:
        return Run(result, {}, made_of=behind)
    if lacks := lacking(family, under):
        return Run(result, {}, lacks, behind)
    sources = [finished[key] for key in family.places]
    worst = [made for m in base.measurements if (made := worst_measurement(m, sources, result, family))]
    whole = result.model_copy(update={"measurements": [m for m, _ in worst]})
    return Run(whole, {m.name: rows for m, rows in worst}, made_of=behind)


def lacking(family: Family, under: Mapping[str, Run]) -> tuple[str, ...]:
    """Why there is no worst case: places without a cell, and cells without a value."""
    absent = [label for key, label in family.places.items() if key not in under]
    said = [f"no cell under {', '.join(absent)}"] if absent else []
    for key, label in family.places.items():
        result = under[key].result if key in under else None
        if key in under and under[key].lacks:
            said.append(f"{label}: {'; '.join(under[key].lacks)}")
        elif result and result.error:
            said.append(f"failed under {label}: {result.error.type}")
        elif result and result.status == "n/a":
            said.append(f"n/a under {label}: {result.reason}")
        elif result and result.measurement(family.name) is None:
            said.append(f"{family.name} not measured under {label}")
    return tuple(said)


def worst_measurement(
    measured: MeasurementRecord, sources: Sequence[Run], result: Result, family: Family,
) -> tuple[MeasurementRecord, Samples] | None:
    """One measurement, if it has a better direction and comes sample by sample at every place."""
    found = [run.found.get(measured.name) for run in sources]
    higher = measured.higher_is_better
    if higher is None or not all(same_measure(measured, m) for m in found):
        return None
    tables = [rows for run in sources if (rows := run.rows.get(measured.name))]
    if len(tables) < len(sources) or not all(
            m and (m.value is None or m.name in run.means) for m, run in zip(found, sources, strict=True)):
        return None
    rows = worst_rows(list(family.places.values()), tables, higher)
    update = {
        "value": rows.mean, "low": None, "high": None, "n": len(rows), "clusters": len(set(rows.known_places.clusters)),
        "reason": "" if rows.known else measured.reason or rows.reasons[0],
        "protocol_hash": family.hash_of(measured, result.cell),
    }
    return measured.model_copy(update=update), rows


def worst_rows(labels: Sequence[str], tables: Sequence[Samples], higher_is_better: bool) -> Samples:
    """Sample by sample the worst of the values that there are; no value where a place's sample is missing.
    ``labels``: of the places."""
    first, worst = tables[0], min if higher_is_better else max
    if any(rows.places is not first.places for rows in tables):
        return of_rows(first.metric, worst_of_each(labels, tables, worst))
    known = [[value for value in of if value is not None] for of in zip(*(rows.values for rows in tables), strict=True)]
    return Samples(first.metric, first.places, tuple(worst(values) if values else None for values in known),
                   {place: first.reasons[place] for place, values in enumerate(known) if not values})


def worst_of_each(
    labels: Sequence[str], tables: Sequence[Samples], worst: Callable[[Iterable[float]], float],
) -> Iterator[SampleRow]:
    found: dict[tuple[str, str], dict[int, SampleRow]] = {}
    for place, rows in enumerate(tables):
        for row in rows:
            found.setdefault((row.cluster, row.sample), {})[place] = row
    for (cluster, sample), under in found.items():
        values = [row.value for row in under.values() if row.value is not None]
        absent = [label for place, label in enumerate(labels) if place not in under]
        reason = f"no sample under {', '.join(absent)}" if absent else next(iter(under.values())).reason
        value = worst(values) if values and not absent else None
        yield SampleRow(next(iter(under.values())).metric, sample, cluster, value, reason if value is None else "")


def make_matrix(family: Family, unit: str, higher: bool, lines: Mapping[str, tuple[str, Estimate]]) -> Matrix:
    """``lines``: defense -> its label and its worst case, in the order of the board. Those that were at one place only
    are left out: the board of that place has them."""
    points = {key: {place: at_place(family, key, place) for place in family.places} for key in lines}
    points = {key: of for key, of in points.items() if sum(bool(found.values) for found in of.values()) >= FEWEST}
    scores = iter(mean_intervals([(found, unit == "share") for of in points.values() for found in of.values()]))
    rows, shifts = [], dict[str, Difference]()
    for key, of in points.items():
        (label, worst), cells = lines[key], tuple(islice(scores, len(of)))
        defense = next(iter(next(iter(family.by_defense[key].values())).values())).result.cell.defense
        mean = mean_interval(mean_points(list(of.values()))) if worst.value is not None else worst
        rows.append(MatrixRow(label, is_control(defense), does_nothing(defense), (*cells, mean, worst)))
        if does_nothing(defense):
            shifts = shifts_of(family, of, unit == "share")
    return Matrix(family.name, unit, higher, (*family.places.values(), "mean", "worst"), tuple(rows), shifts,
                  tuple(harms(family.name, shifts, higher)), family.axis.name)


def at_place(family: Family, defense: str, place: str) -> Tally:
    """All seeds' samples of a defense at one place."""
    return samples_of([under[place] for under in family.by_defense[defense].values() if place in under], family.name)


def mean_points(tables: Sequence[Tally]) -> Tally:
    """Sample by sample the mean over places, of samples that all have."""
    shared = tables[0]
    for other in tables[1:]:
        shared, _ = matched(shared, other)
    values = [matched(shared, other)[1].values for other in tables]
    return Tally(shared.layout, tuple(math.fsum(of) / len(of) for of in zip(*values, strict=True)))


def shifts_of(family: Family, points: Mapping[str, Tally], share: bool) -> dict[str, Difference]:
    """What each purifier does to clean photos: none where no cell left them as they are."""
    leads = {family.axis.key(run): family.axis.first(run) for run in family.runs}
    plain = next((key for key in family.places if leads[key]), None)
    if plain is None:
        return {}
    moved = {key: label for key, label in family.places.items() if key != plain}
    found = paired_differences([(points[key], points[plain], share) for key in moved])
    return dict(zip(moved.values(), found, strict=True))


def harms(name: str, shifts: Mapping[str, Difference], higher: bool) -> list[str]:
    """A purifier that protects clean photos by itself: its rows owe part of their value to it, not to the defense."""
    return [f"{label} moves {name} of clean photos, too, by {d.value:+.3g} [{d.low:+.3g}, {d.high:+.3g}]: compare its "
            "column with its clean row, not with another column"
            for label, d in shifts.items()
            if d.value is not None and d.excludes_zero and (d.value > 0) == higher]
