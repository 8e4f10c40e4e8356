"""The lines of a board before anything is compared: the cells of one defense with their samples, by column, and what
they lack of what a ranked line must have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bench.results import MeasurementRecord, PluginRecord, Result, evidence
from bench.runs import Run, is_control, samples_of
from bench.samples import Samples
from bench.stats import Point, Tally, tally

DEFENSE_STAGES = ("protect", "repair")
"""Stages whose cost is the defense's."""
OWN_STAGES = (*DEFENSE_STAGES, "score_inputs")
"""Stages that differ between defenses even where nothing came of them."""
Sample = tuple[int, str, str]
"""Seed, unit and name of a sample."""


@dataclass(frozen=True)
class Column:
    """One measurement under one protocol."""

    name: str
    unit: str
    higher_is_better: bool | None
    protocol_hash: str

    @property
    def measurement(self) -> str:
        """The name without what tells two protocols apart."""
        return self.name.partition("~")[0]


@dataclass
class Entry:
    """All cells of one defense on one board, one per seed."""

    label: str
    cells: list[Run] = field(default_factory=list)
    points: dict[str, Tally] = field(default_factory=dict)

    @cached_property
    def finished(self) -> list[Run]:
        return [run for run in self.cells if run.result.status == "ok"]

    @property
    def control(self) -> bool:
        return is_control(self.defense)

    @property
    def defense(self) -> PluginRecord:
        return self.cells[0].result.cell.defense

    @cached_property
    def outcomes(self) -> dict[int, frozenset[str]]:
        """By seed, the artefacts that were measured and are not the defense's own: pictures and models after it."""
        return {run.result.cell.seed: frozenset(
            key for stage, key in evidence(run.result).items() if not stage.startswith(OWN_STAGES))
            for run in self.finished}

    def is_like(self, other: Entry) -> bool:
        """Whether it left the attacker the very same pictures in every seed, as tests that change nothing do."""
        return bool(self.outcomes) and all(self.outcomes.values()) and self.outcomes == other.outcomes

    @property
    def eps(self) -> float | None:
        """The budget on images; a defense of models may call something else so (adversarial neuron pruning does)."""
        if self.defense.facts.get("acts_on") == "model":
            return None
        value = self.defense.parameters.get("eps")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def find_columns(runs: Sequence[Run], name: str) -> list[Column]:
    """The ranking measurement first, then the others in the order of the results; one that has values under several
    protocols gets a column for each, told apart by the start of its hash."""
    found: dict[tuple[str, str], MeasurementRecord] = {}
    valued = {one.name for run in runs for one in run.result.measurements if one.value is not None}
    for run in runs:
        for one in run.result.measurements:
            if one.value is not None or one.name not in valued:
                found.setdefault((one.name, one.protocol_hash), one)
    times = Counter(measurement for measurement, _ in found)
    columns = [Column(m.name if times[m.name] == 1 else f"{m.name}~{h[:4]}", m.unit, m.higher_is_better, h)
               for (_, h), m in found.items()]
    return sorted(columns, key=lambda column: column.measurement != name)


def find_entries(runs: Sequence[Run], columns: Sequence[Column]) -> list[Entry]:
    """One per defense with its options and surrogate; those that share a label get the options that tell them apart."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.line, []).append(run)
    labels = unique_labels({key: cells[0].result for key, cells in by_key.items()})
    entries = []
    for key, cells in by_key.items():
        entry = Entry(labels[key], sorted(cells, key=lambda run: run.result.cell.seed))
        entry.points = {column.name: find_points(entry.finished, column) for column in columns}
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry.label)


def unique_labels(firsts: Mapping[str, Result]) -> dict[str, str]:
    """Labels by defense key; equal ones are told apart by the options in which they differ, or by their version."""
    defenses = {key: result.cell.defense for key, result in firsts.items()}
    labels = {}
    for key, defense in defenses.items():
        twins = [other for other in defenses.values() if other.label == defense.label]
        differing = sorted(name for name in defense.parameters
                           if any(twin.parameters.get(name) != defense.parameters[name] for twin in twins))
        options = [f"{name}={defense.parameters[name]}" for name in differing]
        if len({twin.version for twin in twins}) > 1:
            options.append(f"version {defense.version}")
        labels[key] = " ".join([defense.label, *options, *on_surrogate(firsts[key], firsts.values())])
    return labels


def on_surrogate(result: Result, others: Iterable[Result]) -> list[str]:
    """The words that name a line's surrogate; with the start of its digest where another model has that name."""
    model = result.cell.surrogate
    if model is None:
        return []
    namesakes = {r.cell.surrogate.digest for r in others if r.cell.surrogate and r.cell.surrogate.name == model.name}
    return ["on", model.name if len(namesakes) == 1 else f"{model.name} {model.digest[:6]}"]


def find_points(runs: Sequence[Run], column: Column) -> Tally:
    """Samples of one column over all seeds. Where a value is not the mean of its rows, or has none (FID), each
    seed's value is one point."""
    found = [(run, m) for run in runs if (m := measured(run, column)) and m.value is not None]
    if all(m.name in run.means for run, m in found):
        return samples_of([run for run, _ in found], column.measurement)
    return tally([Point(f"seed {run.result.cell.seed}", "", m.value) for run, m in found if m.value is not None])


def measured(run: Run, column: Column) -> MeasurementRecord | None:
    """What a cell says of a column. What has no value was measured under no protocol: its reason stands in each."""
    found = run.found.get(column.measurement)
    return found if found and (found.value is None or found.protocol_hash == column.protocol_hash) else None


@dataclass(frozen=True)
class Needed:
    """What a ranked line must have of ``column``, the one that ranks: ``samples``, all that the controls have, or that
    anyone has if there are none. ``lost``: the seed and name of those without a value on any line."""

    column: Column | None
    samples: frozenset[Sample] = frozenset()
    lost: frozenset[tuple[int, str]] = frozenset()


def find_needed(entries: Sequence[Entry], columns: Sequence[Column]) -> Needed:
    if not columns:
        return Needed(None)
    column, controls = columns[0], [entry for entry in entries if entry.control]
    wanted = set[Sample]().union(*(covered(entry, column) for entry in controls)) or set[Sample]().union(
        *(covered(entry, column) for entry in entries))
    return Needed(column, frozenset(wanted), frozenset(hopeless(entries, column)))


def covered(entry: Entry, column: Column) -> set[Sample]:
    """What there is of a column."""
    return {(run.result.cell.seed, unit, sample)
            for run in entry.finished for unit, _, sample in find_points([run], column).layout.keys}


def hopeless(entries: Sequence[Entry], column: Column) -> set[tuple[int, str]]:
    """The (seed, sample) pairs for which controls have no value in the ranking column, nor has any other line: a photo
    without a face, say. They are nobody's gap."""
    lost = {one for entry in entries if entry.control for one in valueless(entry, column)}
    for seed, rows in (found for entry in entries if lost for found in ranking_rows(entry, column)):
        lost -= {(seed, name) for name in rows.known_places.names}
    return lost


def valueless(entry: Entry, column: Column) -> set[tuple[int, str]]:
    """The (seed, sample) pairs that a column has no value of."""
    return {(seed, name) for seed, rows in ranking_rows(entry, column) for name in rows.missing}


def ranking_rows(entry: Entry, column: Column) -> list[tuple[int, Samples]]:
    """The rows of a column by seed."""
    return [(run.result.cell.seed, rows) for run in entry.finished
            if (m := measured(run, column)) and (rows := run.rows.get(m.name))]


def standing(entry: Entry, needed: Needed) -> tuple[str, str]:
    """``ok``, ``incomplete``, ``n/a`` or ``failed``, and why."""
    broken = [run.result for run in entry.cells if run.result.status == "failed"]
    barred = sorted({run.result.reason for run in entry.cells if run.result.status == "n/a"})
    said = [f"seed {r.cell.seed} failed: {r.error.type}: {first_line(r.error.message)}" for r in broken if r.error]
    if not entry.finished:
        return ("failed" if broken else "n/a"), "; ".join([*said, *barred])
    lacks = list(dict.fromkeys(lack for run in entry.finished for lack in run.lacks))
    lacking = [*said, *barred, *(lacks or gaps(entry, needed))]
    return ("incomplete", "; ".join(lacking)) if lacking else ("ok", "")


def first_line(message: str) -> str:
    return (message.strip().splitlines() or [""])[0][:200]


def gaps(entry: Entry, needed: Needed) -> list[str]:
    """What the ranking column of an entry lacks; lost samples only where it has nothing else either."""
    if needed.column is None:
        return ["nothing was measured"]
    wanted, have = needed.samples, covered(entry, needed.column)
    none = valueless(entry, needed.column)
    empty = len(none - needed.lost if have else none)
    seeds = sorted({seed for seed, _, _ in wanted} - {seed for seed, _, _ in have})
    pairs, met = ({(seed, unit) for seed, unit, _ in of} for of in (wanted, have))
    units = {pair for pair in pairs - met if pair[0] not in seeds}
    absent = [one for one in wanted - have if one[:2] in met and (one[0], one[2]) not in none]
    found = [f"seed {', '.join(map(str, seeds))} missing"] if seeds else []
    found += [f"{len(units)} of {len(pairs)} units missing"] if units else []
    found += [f"{len(absent)} of {len(wanted)} samples missing"] if absent else []
    return found + ([f"{empty} samples without a value"] if empty else [])


def cost(entry: Entry) -> float | None:
    """Mean seconds of the defense's own stage, as it took when it was built."""
    spent = [sum(s.seconds for s in run.result.cost if s.stage in DEFENSE_STAGES) for run in entry.finished
             if any(s.stage in DEFENSE_STAGES for s in run.result.cost)]
    return math.fsum(spent) / len(spent) if spent else None
