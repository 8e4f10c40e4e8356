"""Boards as data: who is ahead of whom under one protocol, with intervals, controls and what is missing.

A board compares defenses under one track, model, data, attack, purifier and protocol; where cells differ in purifier
alone, a further board holds the worst case over purifiers, where photos were attacked on several models one holds the
worst case over attackers, and where models with and without a backdoor were scored, one holds who tells them apart.
Everything on them is computed again from the per-sample rows; no torch, no weights, no images are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median

from bench.detection import DetectionBoard, make_detection, population_key, scores_models
from bench.entries import (
    Column,
    Entry,
    Needed,
    cost,
    find_columns,
    find_entries,
    find_needed,
    measured,
    standing,
    unique_labels,
)
from bench.identity import canonical_json, digest
from bench.placings import Placing, placings
from bench.results import Result
from bench.runs import Run, does_nothing, family_key, group_key, primary, question_key
from bench.stats import (
    ALPHA,
    Difference,
    Estimate,
    Tally,
    detectable,
    holm,
    mean_intervals,
    paired_differences,
)
from bench.switches import Switch, Variant, find_switches
from bench.worst_case import ALL_ATTACKS, Family, Matrix, attackers, families, make_matrix

Scores = Mapping[str, Estimate]
Deltas = Mapping[str, tuple["Delta", ...]]
"""By column."""


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
    scores: Scores
    deltas: Deltas
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
        scored = {run.line: run.result for run in population if scores_models(run)}
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
    kin = [(family, families(family)) for family in grouped(question, family_key)]
    tables = [table for family, worst in kin for table in family_tables(family, worst)]
    name = question_key(question[0].result)
    over = attackers(question, [found for _, worst in kin for found in worst])
    return [*tables, *(replace(worst_table(found), family=name) for found in over)]


def family_tables(family: Sequence[Run], worst: Sequence[Family]) -> list[Table]:
    """A board per purifier, and the worst case where there are several."""
    tables = [table for group in grouped(family, group_key) for table in group_tables(group)]
    name = family_key(family[0].result)
    return [replace(table, family=name) for table in [*tables, *map(worst_table, worst)]]


def worst_table(family: Family) -> Table:
    """The board of a worst case, with the matrix of what it is the worst of; without one where no line was everywhere,
    as in a suite that is still running."""
    table = replace(make_table(family.worst, family.name, family.title), unpurified=False,
                    worst_of=tuple(family.places.values()))
    if not table.columns:
        return table
    ranked = table.columns[0]
    keys = {entry.label: entry.cells[0].line for entry in find_entries(family.worst, [])}
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
    controls, twins = find_controls(entries)
    lines = rank(make_lines(entries, columns, controls), entries, columns)
    names = tuple(dict.fromkeys(entry.defense.name for entry in controls))
    variants = [Variant(entry.label, entry.cells[0].result.cell, entry.points[first.name], first.unit == "share")
                for first in columns[:1] for entry in entries]
    return Table(
        digest([group_key(runs[0].result), protocol]), cell.track, cell.model.name, cell.data.label,
        cell.attack.label, cell.purifier.label if cell.purifier else "none", cell.protocol, tuple(columns), names,
        tuple(lines), (*told_twins(twins), *missing(lines, columns)), unpurified=does_nothing(cell.purifier),
        switches=find_switches(variants, ALPHA), power=power(lines, columns),
    )


def find_controls(entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, list[str]]]:
    """Finished controls, the plainest first, without those that left the same pictures as an earlier one: a second
    comparison with these would only make the correction stricter. And by name of the earlier one, who they are."""
    controls = [entry for entry in entries if entry.control and entry.finished]
    controls.sort(key=lambda x: (len(x.defense.parameters), str(x.defense.facts.get("acts_on", "")), x.label))
    kept: list[Entry] = []
    twins: dict[str, list[str]] = {}
    for control in controls:
        first = next((other for other in kept if control.is_like(other)), None)
        if first is None:
            kept.append(control)
        else:
            twins.setdefault(first.defense.name, []).append(control.label)
    return kept, twins


def told_twins(twins: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name, others in twins.items():
        yield f"Δ {name} is Δ {', Δ '.join(others)} as well: what they leave is the very same."


def make_lines(entries: Sequence[Entry], columns: Sequence[Column], controls: Sequence[Entry]) -> list[Line]:
    needed, scores = find_needed(entries, columns), make_scores(entries, columns)
    deltas = make_deltas(entries, columns, controls)
    return [make_line(entry, scores[entry.label], deltas[entry.label], needed) for entry in entries]


def make_line(entry: Entry, scores: Scores, deltas: Deltas, needed: Needed) -> Line:
    defense, surrogate = entry.defense, entry.cells[0].result.cell.surrogate
    status, reason = standing(entry, needed)
    knows = defense.facts.get("knows") or ()
    return Line(entry.label, defense.name, status, entry.control, tuple(map(str, knows)), entry.eps,
                tuple(run.result.cell.seed for run in entry.finished), scores, deltas, cost(entry), reason=reason,
                surrogate=surrogate.name if surrogate else "",
                cells=tuple(id for run in entry.cells for id in run.cells))


def make_scores(entries: Sequence[Entry], columns: Sequence[Column]) -> dict[str, Scores]:
    """By line; all intervals of a board at once."""
    asked = [(entry, column) for entry in entries for column in columns]
    pooled = mean_intervals([(entry.points[column.name], column.unit == "share") for entry, column in asked])
    scores: dict[str, dict[str, Estimate]] = {entry.label: {} for entry in entries}
    for (entry, column), found in zip(asked, pooled, strict=True):
        scores[entry.label][column.name] = estimate(entry, column, found)
    return dict(scores)


def estimate(entry: Entry, column: Column, pooled: Estimate) -> Estimate:
    """Pooled over seeds. A single value without rows keeps the interval that its metric gave."""
    points = entry.points[column.name]
    if points.layout.sampled:
        return pooled
    found = [m for run in entry.finished if (m := measured(run, column))]
    if not points.values:
        reasons = sorted({m.reason for m in found if m.reason})
        return Estimate(None, None, None, 0, 0, "; ".join(reasons) or "not measured")
    samples, low, high = sum(m.n for m in found), pooled.low, pooled.high
    if len(found) == 1:
        low, high = found[0].low, found[0].high
    value = max(points.values) if found[0].protocol.get("aggregate") == "max" else pooled.value
    return Estimate(value, low, high, samples, pooled.units, "" if low is not None else pooled.reason)


def fair_controls(entry: Entry, controls: Sequence[Entry]) -> list[Entry]:
    """One of each kind of control, but not the line itself, nor one at another budget."""
    kinds: dict[str, list[Entry]] = {}
    for control in controls:
        kinds.setdefault(control.defense.name, []).append(control)
    same = [[c for c in of if None in (c.eps, entry.eps) or c.eps == entry.eps] for of in kinds.values()
            if not any(entry is c for c in of)]
    return [fair[0] for fair in same if fair]


def make_deltas(
    entries: Sequence[Entry], columns: Sequence[Column], controls: Sequence[Entry],
) -> dict[str, Deltas]:
    """By line the differences to controls; all of a board at once."""
    pairs = [(entry, control) for entry in entries for control in fair_controls(entry, controls)]
    found = iter(paired_differences([(one.points[column.name], other.points[column.name], column.unit == "share")
                                     for column in columns for one, other in pairs]))
    deltas: dict[str, dict[str, tuple[Delta, ...]]] = {
        entry.label: {column.name: () for column in columns} for entry in entries}
    for column in columns:
        for (entry, _), delta in zip(pairs, corrected(pairs, list(islice(found, len(pairs)))), strict=True):
            deltas[entry.label][column.name] += (delta,)
    return dict(deltas)


def corrected(pairs: Sequence[tuple[Entry, Entry]], differences: Sequence[Difference]) -> list[Delta]:
    """The differences in one column with what Holm's correction says of them, over all comparisons of defenses with
    controls that can be tested."""
    tested = [place for place, ((entry, _), d) in enumerate(zip(pairs, differences, strict=True))
              if not entry.control and d.p is not None]
    adjusted = dict(zip(tested, holm([differences[place].p or 0.0 for place in tested]), strict=True))
    return [marked(control.defense.name, differences[place], adjusted.get(place), len(tested))
            for place, (_, control) in enumerate(pairs)]


def marked(control: str, difference: Difference, p: float | None, comparisons: int) -> Delta:
    """``p``: after correction for so many ``comparisons``, None where it was not tested."""
    sure = "**" if p is not None and p < ALPHA else "*"
    least = None if p is None else detectable(difference, ALPHA / comparisons)
    return Delta(control, difference, sure if difference.excludes_zero else "", p, least)


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
    found = places([points[line.label] for line in complete], columns[0].unit == "share")
    drawn = placings({x.label: points[x.label] for x in complete}, sign > 0) if len(complete) > 1 else {}
    ranked = [replace(x, rank=place, tied=found.count(place) > 1, placing=drawn.get(x.label))
              for x, place in zip(complete, found, strict=True)]
    return ranked + sorted((x for x in lines if x.status != "ok"), key=lambda x: (x.status != "incomplete", x.label))


def places(ordered: Sequence[Tally], share: bool) -> list[int]:
    """Ranks of samples that come best first, of a ``share`` or not: a group is its leader and all up to the next that
    differs from it."""
    found: list[int] = []
    while len(found) < len(ordered):
        leader, *rest = ordered[len(found):]
        differences = paired_differences([(one, leader, share) for one in rest])
        group = next((place for place, d in enumerate(differences, 1) if d.excludes_zero), len(differences) + 1)
        found += [len(found) + 1] * group
    return found


def missing(lines: Sequence[Line], columns: Sequence[Column]) -> list[str]:
    """Why numbers are missing on lines that have others, once for all that are missing on the same lines for one
    reason."""
    ran = [line for line in lines if any(score.value is not None for score in line.scores.values())]
    why: dict[tuple[str, str], list[str]] = {}
    for line in ran:
        for column in columns:
            score = line.scores[column.name]
            if score.value is None:
                why.setdefault((column.name, score.reason), []).append(line.label)
    alike: dict[tuple[str, str], list[str]] = {}
    for (name, reason), labels in why.items():
        alike.setdefault((", ".join(labels) if len(labels) < len(ran) else "any line", reason), []).append(name)
    return [f"{', '.join(names)} of {of}: {reason}" for (of, reason), names in alike.items()]
