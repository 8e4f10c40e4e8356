"""Boards as printed tables, and the words around them: what the terminal, Markdown and the page share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from bench.boards import Boards, Delta, Line, Power, Table
from bench.detection import DetectionBoard, Detector, Mistakes
from bench.entries import Column
from bench.stats import Difference, Estimate
from bench.worst_case import Matrix, MatrixRow

DETAILED = 3
"""Purifiers of one attack up to which each has its board on the page; of more, only the unpurified one has."""
DASH = "–"
LEGEND = (
    "Arrows point to where the defender wants to be. Brackets: 95 % intervals over units (subjects, or implanted "
    "models) and seeds, not images: t intervals with clustered standard errors, Wilson's for shares; none is given "
    "below 3 units.",
    "Δ: paired difference to a control at the same budget, on the same units, seeds and samples. * the interval "
    "excludes 0 (where all units agree exactly, at least six do); ** it is beyond 0, too, after Holm's correction over "
    "all such comparisons of the column.",
    "Defenses share a rank (=) with the first of their group where the interval of their paired difference includes 0; "
    "that is not corrected for the number of lines. Ranks are given under full coverage and one protocol only. "
    "P(best) and rank 95 %: how often the line comes first, and between which ranks it lies, when units and seeds are "
    "resampled for all lines together. cost: seconds of the defense's own stage, when it was built.",
)


@dataclass(frozen=True)
class Shown:
    """A cell of a printed table: what counts, and what stands below or behind it."""

    main: str
    detail: str = ""


@dataclass(frozen=True)
class Sheet:
    """A printed table."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]


# Numbers


def places(values: Sequence[float | None]) -> int:
    """Decimals that show three digits of the largest of ``values``."""
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    return 3 if largest == 0 else min(7, max(0, 2 - math.floor(math.log10(largest))))


def number(value: float, decimals: int, signed: bool = False) -> str:
    text = f"{value:+,.{decimals}f}" if signed else f"{value:,.{decimals}f}"
    return text if float(text.replace(",", "")) else text.lstrip("+-")


def interval(low: float | None, high: float | None, decimals: int, signed: bool = False) -> str:
    if low is None or high is None:
        return ""
    return f"[{number(low, decimals, signed)}, {number(high, decimals, signed)}]"


def shown_score(score: Estimate, decimals: int) -> Shown:
    if score.value is None:
        return Shown(DASH)
    return Shown(number(score.value, decimals), interval(score.low, score.high, decimals))


def shown_delta(delta: Delta | None, decimals: int) -> Shown:
    found = delta.difference if delta else Difference(None, None, None, 0, 0)
    if delta is None or found.value is None:
        return Shown(DASH)
    main = f"{number(found.value, decimals, signed=True)} {delta.mark}".strip()
    return Shown(main, interval(found.low, found.high, decimals, signed=True))


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 0.05:
        return "< 0.1 s"
    return f"{value:.1f} s" if value < 9.95 else f"{value:,.0f} s"


def printable(text: str) -> str:
    """Without control characters, which could draw over the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


# Sheets


def heading(column: Column) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[column.higher_is_better]
    return f"{column.name}{arrow}" + (f" ({column.unit})" if column.unit else "")


def about(line: Line) -> Shown:
    """Label, and what a reader must know of the line."""
    said = ["control"] if line.control else []
    return Shown(line.label, "; ".join([*said, *([f"knows {', '.join(line.knows)}"] if line.knows else [])]))


def place(line: Line) -> str:
    return DASH if line.rank is None else f"{line.rank}{'=' if line.tied else ''}"


def rank_range(line: Line) -> str:
    if line.placing is None:
        return DASH
    low, high = line.placing.low, line.placing.high
    return f"{low}" if low == high else f"{low}{DASH}{high}"


def ran(table: Table) -> list[Line]:
    """Lines with a number; the others stand among those that are not ranked."""
    return [line for line in table.lines if line.status in ("ok", "incomplete")
            and (line.status == "ok" or any(score.value is not None for score in line.scores.values()))]


def sample_size(line: Line, column: Column) -> str:
    score = line.scores[column.name]
    units = f"{score.units} unit{'s' if score.units != 1 else ''}"
    return f"{score.n} of {units}, seed{'s' if len(line.seeds) > 1 else ''} {', '.join(map(str, line.seeds))}"


def common_size(table: Table) -> str:
    """What all lines rest on, when it is the same."""
    found = {sample_size(line, table.columns[0]) for line in ran(table)} if table.columns else set()
    return found.pop() if len(found) == 1 else ""


def ranking(table: Table, controls: Sequence[str]) -> Sheet:
    """The column that ranks, with its differences to ``controls``."""
    column, lines = table.columns[0], ran(table)
    decimals = places([line.scores[column.name].value for line in lines])
    budgets, sizes = any(line.eps is not None for line in lines), not common_size(table)
    certain = any(line.placing is not None for line in lines)
    head = ["rank", "defense", *(["ε"] if budgets else []), heading(column), *(f"Δ {c}" for c in controls),
            *(["P(best)", "rank 95 %"] if certain else []), *(["n"] if sizes else []), "cost"]
    rows = []
    for line in lines:
        deltas = {d.control: d for d in line.deltas[column.name]}
        budget = Shown(DASH if line.eps is None else f"{line.eps:g}")
        placing = [Shown(DASH if line.placing is None else f"{line.placing.first:.0%}"), Shown(rank_range(line))]
        rows.append((
            Shown(place(line)), about(line), *([budget] if budgets else []),
            shown_score(line.scores[column.name], decimals),
            *(shown_delta(deltas.get(control), decimals) for control in controls),
            *(placing if certain else []), *([Shown(sample_size(line, column))] if sizes else []),
            Shown(seconds(line.seconds)),
        ))
    return Sheet(f"Ranked by {column.name}", tuple(head), tuple(rows))


def differences(table: Table, across: int) -> Iterator[Sheet]:
    """The differences to the controls by themselves, ``across`` to a sheet."""
    column, lines = table.columns[0], ran(table)
    decimals = places([line.scores[column.name].value for line in lines])
    deltas = {line.label: {d.control: d for d in line.deltas[column.name]} for line in lines}
    for start in range(0, len(table.controls), across):
        part = table.controls[start:start + across]
        rows = tuple((about(line), *(shown_delta(deltas[line.label].get(c), decimals) for c in part)) for line in lines)
        yield Sheet(f"Differences in {column.name}" + (" (continued)" if start else ""),
                    ("defense", *(f"Δ {c}" for c in part)), rows)


def others(table: Table, across: int) -> Iterator[Sheet]:
    """The other measurements, ``across`` to a sheet, in the order of the ranking."""
    lines = ran(table)
    rest = [c for c in table.columns[1:] if any(line.scores[c.name].value is not None for line in lines)
            and not is_common(c, lines)]
    for start in range(0, len(rest), across):
        part = rest[start:start + across]
        decimals = {c.name: places([line.scores[c.name].value for line in lines]) for c in part}
        rows = tuple((about(line), *(shown_score(line.scores[c.name], decimals[c.name]) for c in part))
                     for line in lines)
        yield Sheet("Other measurements" + (" (continued)" if start else ""),
                    ("defense", *map(heading, part)), rows)


def is_common(column: Column, lines: Sequence[Line]) -> bool:
    """Whether a measurement without a better direction says the same of every line: of the photos, say, or of what the
    attacker gets without any defense."""
    first, *others = (line.scores[column.name] for line in lines)
    return bool(others) and column.higher_is_better is None and all(score == first for score in others)


def common(table: Table) -> Sheet | None:
    """What is the same for every line, said once."""
    lines = ran(table)
    found = [c for c in table.columns[1:] if lines and lines[0].scores[c.name].value is not None
             and is_common(c, lines)]
    rows = tuple((Shown(heading(c)), shown_score(score, places([score.value])))
                 for c in found for score in [lines[0].scores[c.name]])
    return Sheet("The same for every line", ("measurement", "value"), rows) if rows else None


def unranked(table: Table) -> Sheet | None:
    """Lines without a rank, and why; of a worst case those of one reason together, for they may be many."""
    lines = [line for line in table.lines if line.status != "ok"]
    if not lines:
        return None
    rows = [(about(line), Shown(line.status), Shown(line.reason)) for line in lines]
    if table.worst_of:
        reasons = dict.fromkeys((line.status, line.reason) for line in lines)
        rows = [(Shown(", ".join(line.label for line in lines if (line.status, line.reason) == (status, reason))),
                 Shown(status), Shown(reason)) for status, reason in reasons]
    return Sheet("Not ranked", ("defense", "status", "reason"), tuple(rows))


def matrix_sheets(matrix: Matrix, across: int) -> Iterator[Sheet]:
    """Defenses by purifiers or attackers, ``across`` of them to a sheet."""
    decimals = places([score.value for row in matrix.rows for score in row.cells])
    arrow = "↑" if matrix.higher_is_better else "↓"
    for start in range(0, len(matrix.columns), across):
        part = slice(start, start + across)
        rows = tuple((matrix_label(row), *(shown_score(score, decimals) for score in row.cells[part]))
                     for row in matrix.rows)
        yield Sheet(f"{matrix.measurement} {arrow} under each {matrix.over}" + (" (continued)" if start else ""),
                    ("defense", *matrix.columns[part]), rows)


def switch_sheet(table: Table) -> Sheet | None:
    """What single options of the defenses do."""
    if not table.switches:
        return None
    column = table.columns[0]
    decimals = places([line.scores[column.name].value for line in ran(table)])
    rows = tuple((Shown(s.on), Shown(s.option), Shown(s.off),
                  shown_delta(Delta(s.off, s.difference, s.mark), decimals)) for s in table.switches)
    return Sheet("What single options do", ("defense", "option", "against", f"Δ {heading(column)}"), rows)


def matrix_label(row: MatrixRow) -> Shown:
    return Shown(row.label, "clean photos" if row.clean else "control" if row.control else "")


def sheets(table: Table, across: int, beside: int | None = None) -> list[Sheet]:
    """``across``: measurements side by side. ``beside``: controls for whose differences there is room beside the
    ranking (None: for all); where there are more, the differences get sheets of their own."""
    ranked: list[Sheet] = []
    if table.columns and ran(table):
        apart = beside is not None and len(table.controls) > beside
        ranked = [ranking(table, () if apart else table.controls), *(differences(table, across) if apart else ()),
                  *others(table, across)]
    matrix = matrix_sheets(table.matrix, across) if table.matrix else ()
    last = [sheet for sheet in (common(table), unranked(table)) if sheet]
    switches = switch_sheet(table)
    return [*ranked[:1], *matrix, *([switches] if switches else []), *ranked[1:], *last]


def notes(table: Table) -> list[str]:
    seen = [power_note(table.power, table.columns[0])] if table.power else []
    return [*seen, *(table.matrix.notes if table.matrix else ()), *table.notes]


def power_note(power: Power, column: Column) -> str:
    """What a difference this n could have seen."""
    decimals = places([power.corrected])
    corrected, least, most, single = (number(value, decimals) for value in (
        power.corrected, power.least, power.most, power.single))
    many = f"the {power.comparisons} comparisons" if power.comparisons > 1 else "the one comparison"
    spread = f" (median; {least} to {most} by line)" if least != most else ""
    whole = f", {single} without correction" if power.comparisons > 1 else ""
    return (f"Power: with {power.units} units and the spread seen here, a difference in {column.name} to a control of "
            f"{corrected}{spread} would have been found with 80 % probability after correction for {many}{whole}; "
            "smaller ones may be there, unseen.")


def sections(tables: Sequence[Table]) -> Iterator[tuple[Table, list[Table], list[str]]]:
    """Boards as a reader wants them: the one that leads, those that follow under its heading, and the purifiers whose
    boards are left to the data files. Boards without a worst case stand alone."""
    for _, of in groupby(tables, key=lambda table: table.family or table.id):
        family = list(of)
        if not family[0].worst_of:
            yield from ((table, [], []) for table in family)
            continue
        leads = [table for table in family if table.worst_of]
        rest = [table for table in family if not table.worst_of]
        few = len(rest) <= DETAILED
        shown = [table for table in rest if few or table.unpurified]
        yield leads[0], [*leads[1:], *shown], [table.purifier for table in rest if table not in shown]


def left_out(purifiers: Sequence[str]) -> str:
    return f"The boards under {', '.join(purifiers)} are in leaderboard.csv and leaderboard.json."


def title(table: Table) -> str:
    return f"{table.track}: {table.attack} on {table.model}"


def short_title(table: Table) -> str:
    """Under the heading of its family."""
    return table.purifier if table.worst_of else f"purifier {table.purifier}"


def subtitle(table: Table) -> str:
    protocol = ", ".join(f"{k} {brief(v)}" for k, v in table.protocol.items())
    size = common_size(table)
    purifier = table.purifier if table.worst_of else f"purifier {table.purifier}"
    parts = [f"data {table.data}", purifier, f"protocol {protocol}" if protocol else "",
             f"n = {size}" if size else "", f"board {table.id[:8]}"]
    return " · ".join(part for part in parts if part)


def brief(value: object) -> str:
    return f"({len(value)})" if isinstance(value, (list, tuple)) else str(value)


def overview(boards: Boards) -> str:
    total = sum(boards.counts.values())
    parts = [f"{boards.counts[status]} {status}" for status in ("ok", "n/a", "failed") if boards.counts.get(status)]
    return f"{total} cell{'s' if total != 1 else ''}: {', '.join(parts)}"


# Detection


def detection_title(board: DetectionBoard) -> str:
    return f"{board.track}: which models are poisoned? {board.model}"


def detection_subtitle(board: DetectionBoard) -> str:
    return (f"data {board.data} · positive = poisoned · thresholds aim at {board.rate:.0%} false positives on clean "
            f"models that are not scored · 95 % intervals over models · board {board.id[:8]}")


def detection_sheets(board: DetectionBoard) -> list[Sheet]:
    return [rates(board), own_rates(board), by_attack(board), *(mistakes(d) for d in board.detectors if d.mistakes)]


def rates(board: DetectionBoard) -> Sheet:
    """Every defense at the common rate of false positives."""
    rows = tuple((named(d), *(shown_score(score, 3) for score in (d.auroc, d.tpr, d.fpr, d.accuracy)),
                  Shown(f"{d.poisoned} + {d.clean}", f"{d.calibration} calibrate"), Shown(seconds(d.seconds)))
                 for d in board.detectors)
    head = ("defense", "AUROC ↑", "TPR ↑", "FPR ↓", "accuracy ↑", "poisoned + clean", "cost")
    return Sheet("Poisoned models told from clean ones", head, rows)


def own_rates(board: DetectionBoard) -> Sheet:
    """Every defense at its own threshold, which saw none of these clean models."""
    rows = tuple((named(d), shown_score(d.own_tpr, 3), shown_score(d.own_fpr, 3)) for d in board.detectors)
    return Sheet("By the defense's own rule", ("defense", "TPR ↑", "FPR ↓"), rows)


def by_attack(board: DetectionBoard) -> Sheet:
    rows = tuple((named(d), *(shown_score(d.by_attack[name], 3) if name in d.by_attack else Shown(DASH)
                              for name in board.attacks)) for d in board.detectors)
    return Sheet("TPR ↑ by attack", ("defense", *board.attacks), rows)


def named(detector: Detector) -> Shown:
    said = ["control"] if detector.control else []
    known = [f"knows {', '.join(detector.knows)}"] if detector.knows else []
    return Shown(detector.label, "; ".join([*said, *known]))


def mistakes(detector: Detector) -> Sheet:
    """A row per setting: how many of its models were judged wrongly, and which."""
    limit = "" if detector.threshold is None else f", threshold {detector.threshold:.3g}"
    rows = tuple((Shown(f"{'missed' if m.missed else 'false alarm'}: {m.setting}"), Shown(f"{len(m.seeds)} of {m.of}"),
                  Shown(", ".join(map(str, m.seeds))), Shown(spread_of(m)),
                  Shown(DASH if m.success is None else f"{m.success:.2f}")) for m in detector.mistakes)
    return Sheet(f"Mistakes of {detector.label}{limit}", ("mistake", "models", "seeds", "scores", "ASR"), rows)


def spread_of(m: Mistakes) -> str:
    low, high = min(m.scores), max(m.scores)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
