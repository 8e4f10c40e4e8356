"""Boards as data: who is ahead of whom under one protocol, with intervals, controls and what is missing.

A board compares defenses under one track, model, data, attack, purifier and protocol; where cells differ in purifier
alone, a further board holds the worst case over purifiers, where photos were attacked on several models one holds the
worst case over attackers, and where models with and without a backdoor were scored, one holds who tells them apart.
Everything on them is computed again from the per-sample rows; no torch, no weights, no images are needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from bench.detection import DetectionBoard, make_detection, population_key, scores_models
from bench.identity import canonical_json, digest
from bench.results import MeasurementRecord, Result
from bench.runs import (
    Run,
    defense_key,
    does_nothing,
    family_key,
    group_key,
    is_control,
    is_mean,
    primary,
    question_key,
    samples_of,
)
from bench.samples import Samples
from bench.stats import (
    Difference,
    Estimate,
    Placing,
    Point,
    Tally,
    detectable,
    holm,
    mean_interval,
    paired_difference,
    placings,
    tally,
)
from bench.switches import Switch, Variant, find_switches
from bench.worst_case import ALL_ATTACKS, Family, Matrix, attackers, families, make_matrix, worst_runs

DEFENSE_STAGES = ("protect", "repair")
"""Stages whose cost is the defense's."""
ALPHA = 0.05
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


@dataclass(frozen=True)
class Delta:
    """A paired difference to a control. ``mark``: ``*`` if its interval excludes 0, ``**`` if it is beyond 0 after
    Holm's correction over all such comparisons of defenses in the column, too; ``p_holm``: its p after correction;
    ``detectable``: the smallest difference found with 80 % power at the level of the correction's first step."""

    control: str
    difference: Difference
    mark: str = ""
    p_holm: float | None = None
    detectable: float | None = None


@dataclass(frozen=True)
class Power:
    """What so few units could have seen in the ranking column, given the spread of the paired differences to controls:
    the difference found with 80 % power, in the median over ``comparisons``. ``corrected``: at ``level``, the first
    step of Holm's correction, from ``least`` to ``most``; ``single``: at 5 %, without correction."""

    units: int
    comparisons: int
    level: float
    corrected: float
    least: float
    most: float
    single: float


@dataclass(frozen=True)
class Line:
    """One defense on one board. ``rank`` is None where it is listed but not ranked, and then ``reason`` says why;
    ``tied``: its rank is shared. ``placing``: its rank when units and seeds are resampled. ``seconds``: of its own
    stage, mean over cells. ``scores`` and ``deltas`` by column name. ``surrogate``: the model it protected on, where
    that is not the attacked one. ``cells``: the ids of all cells behind it."""

    label: str
    name: str
    status: str
    control: bool
    knows: tuple[str, ...]
    eps: float | None
    seeds: tuple[int, ...]
    scores: Mapping[str, Estimate]
    deltas: Mapping[str, tuple[Delta, ...]]
    seconds: float | None
    rank: int | None = None
    tied: bool = False
    placing: Placing | None = None
    reason: str = ""
    surrogate: str = ""
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One board. The first column is the one that ranks.

    ``family``: shared by boards that differ in purifier alone. ``worst_of``: of a worst-case board, the purifiers or
    attackers, and ``matrix`` shows each of them. ``unpurified``: the board of photos as they were published.
    ``switches``: what single options of the defenses do, in the ranking column; ``power``: what differences there could
    have been seen.
    """

    id: str
    track: str
    model: str
    data: str
    attack: str
    purifier: str
    protocol: Mapping[str, object]
    columns: tuple[Column, ...]
    controls: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    family: str = ""
    unpurified: bool = False
    worst_of: tuple[str, ...] = ()
    matrix: Matrix | None = None
    switches: tuple[Switch, ...] = ()
    power: Power | None = None


@dataclass(frozen=True)
class Boards:
    """All boards of a suite. ``stamps``: what the results say they are not. ``detections``: of whole populations."""

    suite: str
    stamps: tuple[str, ...]
    counts: Mapping[str, int]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    detections: tuple[DetectionBoard, ...] = ()


@dataclass
class Entry:
    """All cells of one defense on one board, one per seed."""

    label: str
    cells: list[Run] = field(default_factory=list)
    points: dict[str, Tally] = field(default_factory=dict)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.cells if run.result.status == "ok"]

    @property
    def control(self) -> bool:
        return is_control(self.cells[0].result.cell.defense)

    @property
    def eps(self) -> float | None:
        value = self.cells[0].result.cell.defense.parameters.get("eps")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def make_boards(suite: str, runs: Sequence[Run], notes: Iterable[str] = ()) -> Boards:
    """Group cells by what a comparison must share, and make a board of each group."""
    ordered = sorted(runs, key=lambda run: run.result.cell.id)
    tables = [table for question in grouped(ordered, question_key) for table in question_tables(question)]
    tables.sort(key=in_order)
    stamps = tuple(sorted({run.result.stamp for run in ordered if run.result.stamp}))
    counts = Counter(run.result.status for run in ordered)
    return Boards(suite, stamps, {status: counts[status] for status in sorted(counts)}, tuple(tables), tuple(notes),
                  tuple(detection_boards(ordered)))


def detection_boards(runs: Sequence[Run]) -> Iterator[DetectionBoard]:
    """One per population of models that any defense scored."""
    for population in grouped(runs, population_key):
        scored = {defense_key(run.result.cell): run.result for run in population if scores_models(run)}
        if scored and (board := make_detection(population, unique_labels(scored))):
            yield board


def grouped(runs: Sequence[Run], key: Callable[[Result], str]) -> list[list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run.result), []).append(run)
    return list(found.values())


def in_order(table: Table) -> tuple[object, ...]:
    """The worst case over attackers first, then boards of one family together, those of the plainer protocol before
    others; the worst case over purifiers first."""
    return (table.track, table.attack != ALL_ATTACKS, table.attack, table.model, table.data, len(table.protocol),
            canonical_json(table.protocol), table.family, not table.worst_of, not table.unpurified, table.purifier,
            table.id)


def question_tables(question: Sequence[Run]) -> list[Table]:
    """The boards of each attacker, and the worst case over attackers where several models were attacked."""
    kin = grouped(question, family_key)
    purified = [found for family in kin for found in families(family)]
    tables = [table for family in kin for table in family_tables(family)]
    name = question_key(question[0].result)
    return [*tables, *(replace(worst_table(found), family=name) for found in attackers(question, purified))]


def family_tables(family: Sequence[Run]) -> list[Table]:
    """A board per purifier, and the worst case where there are several."""
    tables = [table for group in grouped(family, group_key) for table in group_tables(group)]
    name = family_key(family[0].result)
    return [replace(table, family=name) for table in [*tables, *map(worst_table, families(family))]]


def worst_table(family: Family) -> Table:
    """The board of a worst case, with the matrix of what it is the worst of; without one where no line was everywhere,
    as in a suite that is still running."""
    runs = worst_runs(family)
    table = replace(make_table(runs, family.name, family.title), unpurified=False,
                    worst_of=tuple(family.places.values()))
    if not table.columns:
        return table
    ranked = table.columns[0]
    keys = {entry.label: defense_key(entry.cells[0].result.cell) for entry in find_entries(runs, [])}
    lines = {keys[line.label]: (line.label, line.scores[ranked.name])
             for line in table.lines if line.status in ("ok", "incomplete")}
    matrix = make_matrix(family, ranked.unit, bool(ranked.higher_is_better), lines)
    return replace(table, matrix=matrix)


def group_tables(group: Sequence[Run]) -> list[Table]:
    """A board per protocol of the measurement that ranks; cells without a number stand on each of them."""
    name = primary(group)
    hashes = {run.result.cell.id: found.protocol_hash for run in group
              if name and (found := run.result.measurement(name))}
    protocols = sorted(set(hashes.values())) or [""]
    return [make_table([run for run in group if hashes.get(run.result.cell.id, protocol) == protocol], name, protocol)
            for protocol in protocols]


def make_table(runs: Sequence[Run], name: str, protocol: str) -> Table:
    cell = runs[0].result.cell
    columns = find_columns(runs, name)
    entries = find_entries(runs, columns)
    controls = [entry for entry in entries if entry.control and entry.finished]
    controls.sort(key=lambda e: (len(e.cells[0].result.cell.defense.parameters), e.label))
    wanted, lost = expected(entries, columns), hopeless(entries, columns)
    lines = [make_line(entry, columns, controls, wanted, lost) for entry in entries]
    lines = rank(corrected(lines), entries, columns)
    names = tuple(dict.fromkeys(entry.cells[0].result.cell.defense.name for entry in controls))
    variants = [Variant(entry.label, entry.cells[0].result.cell, entry.points[columns[0].name])
                for entry in entries if columns]
    return Table(
        digest([group_key(runs[0].result), protocol]), cell.track, cell.model.name, cell.data.label,
        cell.attack.label, cell.purifier.label if cell.purifier else "none", cell.protocol, tuple(columns), names,
        tuple(lines), tuple(missing(lines, columns)), unpurified=does_nothing(cell.purifier),
        switches=find_switches(variants, ALPHA), power=power(lines, columns),
    )


def find_columns(runs: Sequence[Run], name: str) -> list[Column]:
    """The ranking measurement first, then the others in the order of the results; one that occurs under several
    protocols gets a column for each, told apart by the start of its hash."""
    found: dict[tuple[str, str], MeasurementRecord] = {}
    for run in runs:
        for one in run.result.measurements:
            found.setdefault((one.name, one.protocol_hash), one)
    times = Counter(measurement for measurement, _ in found)
    columns = [Column(m.name if times[m.name] == 1 else f"{m.name}~{h[:4]}", m.unit, m.higher_is_better, h)
               for (_, h), m in found.items()]
    return sorted(columns, key=lambda column: column.measurement != name)


def find_entries(runs: Sequence[Run], columns: Sequence[Column]) -> list[Entry]:
    """One per defense with its options and surrogate; those that share a label get the options that tell them apart."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(defense_key(run.result.cell), []).append(run)
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
    if all(is_mean(m, run.rows.get(m.name)) for run, m in found):
        return samples_of([run for run, _ in found], column.measurement)
    return tally([Point(f"seed {run.result.cell.seed}", "", m.value) for run, m in found if m.value is not None])


def measured(run: Run, column: Column) -> MeasurementRecord | None:
    found = run.found.get(column.measurement)
    return found if found and found.protocol_hash == column.protocol_hash else None


def expected(entries: Sequence[Entry], columns: Sequence[Column]) -> set[Sample]:
    """What a ranked line must have: all that the controls have, or that anyone has if there are none."""
    if not columns:
        return set()
    of_controls = [covered(entry, columns[0]) for entry in entries if entry.control]
    return set().union(*of_controls) or set().union(*(covered(entry, columns[0]) for entry in entries))


def covered(entry: Entry, column: Column) -> set[Sample]:
    """What there is of a column."""
    return {(run.result.cell.seed, unit, sample)
            for run in entry.finished for unit, _, sample in find_points([run], column).layout.keys}


def hopeless(entries: Sequence[Entry], columns: Sequence[Column]) -> set[tuple[int, str]]:
    """The (seed, sample) pairs for which controls have no value in the ranking column, nor has any other line: a photo
    without a face, say. They are nobody's gap."""
    if not columns:
        return set()
    lost = {one for entry in entries if entry.control for one in valueless(entry, columns[0])}
    for seed, rows in (found for entry in entries if lost for found in ranking_rows(entry, columns[0])):
        lost -= {(seed, name) for name in rows.known_places.names}
    return lost


def valueless(entry: Entry, column: Column) -> set[tuple[int, str]]:
    """The (seed, sample) pairs that a column has no value of."""
    return {(seed, name) for seed, rows in ranking_rows(entry, column) for name in rows.missing}


def ranking_rows(entry: Entry, column: Column) -> list[tuple[int, Samples]]:
    """The rows of a column by seed."""
    return [(run.result.cell.seed, rows) for run in entry.finished
            if (m := measured(run, column)) and (rows := run.rows.get(m.name))]


def make_line(
    entry: Entry, columns: Sequence[Column], controls: Sequence[Entry], wanted: set[Sample],
    lost: set[tuple[int, str]],
) -> Line:
    defense = entry.cells[0].result.cell.defense
    scores = {column.name: estimate(entry, column) for column in columns}
    fair = fair_controls(entry, controls)
    deltas = {column.name: tuple(differences(entry, column, fair)) for column in columns}
    status, reason = standing(entry, columns, wanted, lost)
    knows = defense.facts.get("knows") or ()
    return Line(entry.label, defense.name, status, entry.control, tuple(map(str, knows)), entry.eps,
                tuple(run.result.cell.seed for run in entry.finished), scores, deltas, cost(entry), reason=reason,
                surrogate=surrogate.name if (surrogate := entry.cells[0].result.cell.surrogate) else "",
                cells=tuple(id for run in entry.cells for id in run.cells))


def estimate(entry: Entry, column: Column) -> Estimate:
    """Pooled over seeds. A single value without rows keeps the interval that its metric gave."""
    points = entry.points[column.name]
    found = [m for run in entry.finished if (m := measured(run, column))]
    if not points.values:
        reasons = sorted({m.reason for m in found if m.reason})
        return Estimate(None, None, None, 0, 0, "; ".join(reasons) or "not measured")
    pooled = mean_interval(points, share=column.unit == "share")
    if any(sample for _, _, sample in points.layout.keys):
        return pooled
    samples, low, high = sum(m.n for m in found), pooled.low, pooled.high
    if len(found) == 1:
        low, high = found[0].low, found[0].high
    value = max(points.values) if found[0].protocol.get("aggregate") == "max" else pooled.value
    return Estimate(value, low, high, samples, pooled.units, "" if low is not None else pooled.reason)


def fair_controls(entry: Entry, controls: Sequence[Entry]) -> list[Entry]:
    """One of each kind of control, but not the line itself, nor one at another budget."""
    kinds: dict[str, list[Entry]] = {}
    for control in controls:
        kinds.setdefault(control.cells[0].result.cell.defense.name, []).append(control)
    same = [[c for c in of if None in (c.eps, entry.eps) or c.eps == entry.eps] for of in kinds.values()
            if entry not in of]
    return [fair[0] for fair in same if fair]


def differences(entry: Entry, column: Column, controls: Sequence[Entry]) -> list[Delta]:
    return [Delta(control.cells[0].result.cell.defense.name,
                  paired_difference(entry.points[column.name], control.points[column.name])) for control in controls]


def corrected(lines: Sequence[Line]) -> list[Line]:
    """The lines with what Holm's correction says of their differences: column by column, over all comparisons of
    defenses with controls."""
    names = list(lines[0].scores) if lines else []
    judged = {name: judge([line for line in lines if not line.control], name) for name in names}
    return [replace(line, deltas={name: tuple(marked(delta, judged[name].get((line.label, delta.control)))
                                              for delta in line.deltas[name]) for name in names}) for line in lines]


def judge(defenses: Sequence[Line], column: str) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Of every difference that can be tested, by line and control: the corrected p, and what could have been seen."""
    tested = {(line.label, d.control): d.difference for line in defenses for d in line.deltas[column]}
    tested = {key: difference for key, difference in tested.items() if difference.p is not None}
    adjusted = holm([difference.p or 0.0 for difference in tested.values()])
    return {key: (p, detectable(difference, ALPHA / len(tested)))
            for (key, difference), p in zip(tested.items(), adjusted, strict=True)}


def marked(delta: Delta, judged: tuple[float, float | None] | None) -> Delta:
    p, least = judged or (None, None)
    sure = "**" if p is not None and p < ALPHA else "*"
    return Delta(delta.control, delta.difference, sure if delta.difference.excludes_zero else "", p, least)


def power(lines: Sequence[Line], columns: Sequence[Column]) -> Power | None:
    """None where nothing ranks, or where no comparison with a control has a spread."""
    if not columns or columns[0].higher_is_better is None:
        return None
    deltas = [d for line in lines if not line.control for d in line.deltas[columns[0].name] if d.p_holm is not None]
    seen = [d.detectable for d in deltas if d.detectable]
    alone = [one for d in deltas if (one := detectable(d.difference, ALPHA))]
    if not seen:
        return None
    return Power(min(d.difference.units for d in deltas), len(deltas), ALPHA / len(deltas), median(seen), min(seen),
                 max(seen), median(alone))


def standing(
    entry: Entry, columns: Sequence[Column], wanted: set[Sample], lost: set[tuple[int, str]],
) -> tuple[str, str]:
    """``ok``, ``incomplete``, ``n/a`` or ``failed``, and why."""
    broken = [run.result for run in entry.cells if run.result.status == "failed"]
    barred = sorted({run.result.reason for run in entry.cells if run.result.status == "n/a"})
    said = [f"seed {r.cell.seed} failed: {r.error.type}: {first_line(r.error.message)}" for r in broken if r.error]
    if not entry.finished:
        return ("failed" if broken else "n/a"), "; ".join([*said, *barred])
    lacks = list(dict.fromkeys(lack for run in entry.finished for lack in run.lacks))
    lacking = [*said, *barred, *(lacks or gaps(entry, columns, wanted, lost))]
    return ("incomplete", "; ".join(lacking)) if lacking else ("ok", "")


def first_line(message: str) -> str:
    return (message.strip().splitlines() or [""])[0][:200]


def gaps(
    entry: Entry, columns: Sequence[Column], wanted: set[Sample], lost: set[tuple[int, str]],
) -> list[str]:
    """What the ranking column of an entry lacks; ``lost`` samples only where it has nothing else either."""
    if not columns:
        return ["nothing was measured"]
    have = covered(entry, columns[0])
    none = valueless(entry, columns[0])
    empty = len(none - lost if have else none)
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


def rank(lines: Sequence[Line], entries: Sequence[Entry], columns: Sequence[Column]) -> list[Line]:
    """Complete lines best first, then the others. A line shares the rank of the one that leads its group when the
    interval of their paired difference includes 0, or when there are too few units for an interval. Each such
    comparison is made at 5 %; what is left of it after correction, the marks of differences to controls say."""
    if not columns or columns[0].higher_is_better is None:
        return sorted(lines, key=lambda line: (line.status, line.label))
    name, sign = columns[0].name, -1 if columns[0].higher_is_better else 1
    points = {entry.label: entry.points[name] for entry in entries}

    def score(line: Line) -> float:
        return sign * (line.scores[name].value or 0.0)

    complete = sorted((x for x in lines if x.status == "ok"), key=lambda x: (score(x), x.label))
    places: list[int] = []
    for i, line in enumerate(complete):
        leader = complete[places[-1] - 1] if places else line
        ahead = i and paired_difference(points[line.label], points[leader.label]).excludes_zero
        places.append(i + 1 if ahead or not i else places[-1])
    drawn = placings({x.label: points[x.label] for x in complete}, sign > 0) if len(complete) > 1 else {}
    ranked = [replace(x, rank=place, tied=places.count(place) > 1, placing=drawn.get(x.label))
              for x, place in zip(complete, places, strict=True)]
    return ranked + sorted((x for x in lines if x.status != "ok"), key=lambda x: (x.status != "incomplete", x.label))


def missing(lines: Sequence[Line], columns: Sequence[Column]) -> list[str]:
    """Why numbers are missing on lines that have others."""
    ran = [line for line in lines if any(score.value is not None for score in line.scores.values())]
    why: dict[tuple[str, str], list[str]] = {}
    for line in ran:
        for column in columns:
            score = line.scores[column.name]
            if score.value is None:
                why.setdefault((column.name, score.reason), []).append(line.label)
    return [f"{name} of {', '.join(labels) if len(labels) < len(ran) else 'any line'}: {reason}"
            for (name, reason), labels in why.items()]
