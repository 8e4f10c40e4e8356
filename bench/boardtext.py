"""Boards as text: for the terminal, as Markdown, comma-separated, and as JSON. Same input, same bytes."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bench.boards import Boards, Column, Delta, Line, Power, Table
from bench.detection import DetectionBoard, Detector, Mistakes
from bench.stats import Difference, Estimate
from bench.worst_case import Matrix, MatrixRow

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 120
ACROSS = 5
"""Measurements side by side on a terminal."""
DETAILED = 3
"""Purifiers of one attack up to which each has its board on the page; of more, only the unpurified one has."""
DASH = "–"
LEGEND = (
    "Arrows point to where the defender wants to be. Brackets: 95 % intervals over units (subjects, or implanted "
    "models) and seeds, not images: t intervals with clustered standard errors, Wilson's for shares; none is given "
    "below 3 units.",
    "Δ: paired difference to a control at the same budget, on the same units, seeds and samples. * the interval "
    "excludes 0; ** it is beyond 0, too, after Holm's correction over all such comparisons of the column.",
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


# Sheets: what the terminal and Markdown both print


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


def ranking(table: Table) -> Sheet:
    """The column that ranks, with its differences to the controls."""
    column, lines = table.columns[0], ran(table)
    decimals = places([line.scores[column.name].value for line in lines])
    budgets, sizes = any(line.eps is not None for line in lines), not common_size(table)
    certain = any(line.placing is not None for line in lines)
    head = ["rank", "defense", *(["ε"] if budgets else []), heading(column), *(f"Δ {c}" for c in table.controls),
            *(["P(best)", "rank 95 %"] if certain else []), *(["n"] if sizes else []), "cost"]
    rows = []
    for line in lines:
        deltas = {d.control: d for d in line.deltas[column.name]}
        budget = Shown(DASH if line.eps is None else f"{line.eps:g}")
        placing = [Shown(DASH if line.placing is None else f"{line.placing.first:.0%}"), Shown(rank_range(line))]
        rows.append((
            Shown(place(line)), about(line), *([budget] if budgets else []),
            shown_score(line.scores[column.name], decimals),
            *(shown_delta(deltas.get(control), decimals) for control in table.controls),
            *(placing if certain else []), *([Shown(sample_size(line, column))] if sizes else []),
            Shown(seconds(line.seconds)),
        ))
    return Sheet(f"Ranked by {column.name}", tuple(head), tuple(rows))


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


def sheets(table: Table, across: int) -> list[Sheet]:
    ranked = [ranking(table), *others(table, across)] if table.columns and ran(table) else []
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
    protocol = ", ".join(f"{k} {_brief(v)}" for k, v in table.protocol.items())
    size = common_size(table)
    purifier = table.purifier if table.worst_of else f"purifier {table.purifier}"
    parts = [f"data {table.data}", purifier, f"protocol {protocol}" if protocol else "",
             f"n = {size}" if size else "", f"board {table.id[:8]}"]
    return " · ".join(part for part in parts if part)


def _brief(value: object) -> str:
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
    wrong = tuple(row for detector in board.detectors for row in mistake_rows(detector))
    return [rates(board), by_attack(board),
            *([Sheet("Mistakes", ("defense", "mistake", "models", "seeds", "scores", "ASR"), wrong)] if wrong else [])]


def rates(board: DetectionBoard) -> Sheet:
    """Every defense at the common rate of false positives, and by its own rule."""
    rows = tuple((
        named(d), *(shown_score(score, 3) for score in (d.auroc, d.tpr, d.fpr, d.accuracy, d.own_tpr, d.own_fpr)),
        Shown(f"{d.poisoned} + {d.clean}", f"{d.calibration} calibrate"), Shown(seconds(d.seconds)),
    ) for d in board.detectors)
    head = ("defense", "AUROC ↑", "TPR ↑", "FPR ↓", "accuracy ↑", "TPR ↑ (own rule)", "FPR ↓ (own rule)",
            "poisoned + clean", "cost")
    return Sheet("Poisoned models told from clean ones", head, rows)


def by_attack(board: DetectionBoard) -> Sheet:
    rows = tuple((named(d), *(shown_score(d.by_attack[name], 3) if name in d.by_attack else Shown(DASH)
                              for name in board.attacks)) for d in board.detectors)
    return Sheet("TPR ↑ by attack", ("defense", *board.attacks), rows)


def named(detector: Detector) -> Shown:
    said = ["control"] if detector.control else []
    known = [f"knows {', '.join(detector.knows)}"] if detector.knows else []
    return Shown(detector.label, "; ".join([*said, *known]))


def mistake_rows(detector: Detector) -> Iterator[tuple[Shown, ...]]:
    """One per setting: how many of its models were judged wrongly, and which."""
    for m in detector.mistakes:
        limit = DASH if detector.threshold is None else f"threshold {detector.threshold:.3g}"
        yield (Shown(detector.label), Shown(f"{'missed' if m.missed else 'false alarm'}: {m.setting}"),
               Shown(f"{len(m.seeds)} of {m.of}"), Shown(", ".join(map(str, m.seeds))),
               Shown(spread_of(m), limit), Shown(DASH if m.success is None else f"{m.success:.2f}"))


def spread_of(m: Mistakes) -> str:
    low, high = min(m.scores), max(m.scores)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def detection_measures(d: Detector) -> Iterator[tuple[str, str, Estimate]]:
    """Name, better direction and value of everything that a line says."""
    yield from (("auroc", "higher", d.auroc), ("tpr", "higher", d.tpr), ("fpr", "lower", d.fpr),
                ("accuracy", "higher", d.accuracy), ("own_tpr", "higher", d.own_tpr), ("own_fpr", "lower", d.own_fpr))
    yield from ((f"tpr {name}", "higher", score) for name, score in d.by_attack.items())


# Markdown


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_\[\]|~]|:(?=//))", r"\\\1", html.escape(line, quote=False))


def printable(text: str) -> str:
    """Without control characters, which could draw over the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def cell_text(shown: Shown) -> str:
    if not shown.detail or re.fullmatch(r"\[[-+.,\d ]+\]", shown.detail):
        return f"{escaped(shown.main)} {shown.detail}".strip()
    return f"{escaped(shown.main)} *({escaped(shown.detail)})*"


def markdown(boards: Boards) -> str:
    """All boards as one Markdown page."""
    lines = [f"# Leaderboard: {escaped(boards.suite)}", ""]
    for stamp in boards.stamps:
        lines += [f"**{escaped(stamp)}**", ""]
    lines += [overview(boards), ""]
    for board in boards.detections:
        lines += [f"## {escaped(detection_title(board))}", "", *markdown_detection(board)]
    for lead, others, hidden in sections(boards.tables):
        lines += [f"## {escaped(title(lead))}", "", *markdown_table(lead)]
        for table in others:
            lines += [f"### {escaped(short_title(table))}", "", *markdown_table(table)]
        lines += [escaped(left_out(hidden)), ""] if hidden else []
    if boards.notes:
        lines += [*(f"- {escaped(note)}" for note in boards.notes), ""]
    return "\n".join([*lines, "---", "", *(f"{escaped(text)}\n" for text in LEGEND)]).rstrip("\n") + "\n"


def markdown_table(table: Table) -> list[str]:
    lines = [escaped(subtitle(table)), ""]
    for sheet in sheets(table, across=max(len(table.columns), len(table.matrix.columns) if table.matrix else 0)):
        lines += [f"**{escaped(sheet.title)}**", "", *markdown_rows(sheet), ""]
    said = notes(table)
    return lines + [f"- {escaped(note)}" for note in said] + ([""] if said else [])


def markdown_detection(board: DetectionBoard) -> list[str]:
    lines = [escaped(detection_subtitle(board)), ""]
    for sheet in detection_sheets(board):
        lines += [f"**{escaped(sheet.title)}**", "", *markdown_rows(sheet), ""]
    return lines + [f"- {escaped(note)}" for note in board.notes] + ([""] if board.notes else [])


def markdown_rows(sheet: Sheet) -> Iterator[str]:
    yield "| " + " | ".join(map(escaped, sheet.head)) + " |"
    yield "|" + "|".join(" --- " if _left(name) else " ---: " for name in sheet.head) + "|"
    for row in sheet.rows:
        yield "| " + " | ".join(map(cell_text, row)) + " |"


def _left(name: str) -> bool:
    return name in ("rank", "defense", "status", "reason", "n", "mistake", "seeds", "option", "against", "measurement")


# Terminal


def print_terminal(boards: Boards, width: int | None = None) -> None:
    """Print all boards, at most 120 columns wide."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=min(width or Console().width, WIDEST), highlight=False)
    console.print(Text(f"Leaderboard: {printable(boards.suite)}  ({overview(boards)})", style="bold"))
    for stamp in boards.stamps:
        console.print(Text(printable(stamp), style="bold yellow"))
    for board in boards.detections:
        print_detection(board, console)
    for lead, others, hidden in sections(boards.tables):
        for table in (lead, *others):
            print_table(table, console)
        if hidden:
            console.print(Text(printable(left_out(hidden)), style="dim"))
    for text in [*boards.notes, "", *LEGEND]:
        console.print(Text(printable(text), style="dim"))


def print_table(table: Table, console: Console) -> None:
    from rich.text import Text

    console.print()
    console.rule(Text(printable(title(table)), style="bold cyan"), align="left")
    console.print(Text(printable(subtitle(table)), style="dim"))
    for sheet in sheets(table, ACROSS if console.width >= 105 else 3):
        console.print(drawn(sheet))
    for note in notes(table):
        console.print(Text(f"{DASH} {printable(note)}", style="dim"))


def print_detection(board: DetectionBoard, console: Console) -> None:
    from rich.text import Text

    console.print()
    console.rule(Text(printable(detection_title(board)), style="bold cyan"), align="left")
    console.print(Text(printable(detection_subtitle(board)), style="dim"))
    for sheet in detection_sheets(board):
        console.print(drawn(sheet))
    for note in board.notes:
        console.print(Text(f"{DASH} {printable(note)}", style="dim"))


def drawn(sheet: Sheet) -> Any:
    """A sheet for rich; texts are taken literally, never as markup."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(title=Text(printable(sheet.title), style="italic"), title_justify="left", box=box.SIMPLE_HEAD,
                padding=(0, 1, 0, 0), show_edge=False)
    for name in sheet.head:
        grid.add_column(Text(printable(name)), justify="left" if _left(name) else "right", overflow="fold",
                        max_width=28 if name == "defense" else None)
    for row in sheet.rows:
        grid.add_row(*(Text.assemble(printable(cell.main), *([("\n" + printable(cell.detail), "dim")]
                                                              if cell.detail else [])) for cell in row))
    return grid


# Data


HEAD = (
    "board", "part", "track", "model", "data", "attack", "purifier", "defense", "surrogate", "control", "knows", "eps",
    "status", "rank",
    "tied", "p_best", "rank_mean", "rank_low", "rank_high",
    "reason", "seeds", "measurement", "unit", "better", "value", "low", "high", "n", "units",
    "missing_because", "seconds", "protocol_hash",
)
DELTA_HEAD = ("control_name", "difference", "difference_low", "difference_high", "difference_units", "p", "mark",
              "p_holm", "detectable")


def comma_separated(boards: Boards) -> str:
    """One row per board, defense, measurement and control; a row without control for lines that have none. Of a matrix
    a row per defense and column, of an option a row per pair of lines."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*HEAD, *DELTA_HEAD])
    for table in boards.tables:
        for line in table.lines:
            writer.writerows(csv_rows(table, line))
        writer.writerows(csv_matrix(table, table.matrix) if table.matrix else ())
        writer.writerows(csv_switches(table))
    for board in boards.detections:
        writer.writerows(csv_detection(board))
    return out.getvalue()


def csv_detection(board: DetectionBoard) -> Iterator[list[object]]:
    """A row per defense and measurement."""
    for d in board.detectors:
        for name, better, score in detection_measures(d):
            known = {"board": board.id, "part": "detection", "track": board.track, "model": board.model,
                     "data": board.data, "defense": d.label, "control": int(d.control), "knows": " ".join(d.knows),
                     "measurement": name, "unit": "share", "better": better, "value": score.value, "low": score.low,
                     "high": score.high, "n": score.n, "units": score.units, "missing_because": score.reason,
                     "seconds": d.seconds}
            yield [_data(known.get(column)) for column in (*HEAD, *DELTA_HEAD)]


def csv_matrix(table: Table, matrix: Matrix) -> Iterator[list[object]]:
    better = "higher" if matrix.higher_is_better else "lower"
    for row in matrix.rows:
        for column, score in zip(matrix.columns, row.cells, strict=True):
            known = {"board": table.id, "part": "matrix", "track": table.track, "model": table.model,
                     "data": table.data, "attack": table.attack, "purifier": table.purifier, "defense": row.label,
                     matrix.over: column, "control": int(row.control), "measurement": matrix.measurement,
                     "unit": matrix.unit, "better": better, "value": score.value, "low": score.low,
                     "high": score.high, "n": score.n, "units": score.units, "missing_because": score.reason}
            yield [_data(known.get(name)) for name in (*HEAD, *DELTA_HEAD)]


def csv_switches(table: Table) -> Iterator[list[object]]:
    """A row per option that two lines differ in; ``control_name`` is the line without it."""
    for switch in table.switches:
        column, d = table.columns[0], switch.difference
        known = {"board": table.id, "part": f"option {switch.option}", "track": table.track, "model": table.model,
                 "data": table.data, "attack": table.attack, "purifier": table.purifier, "defense": switch.on,
                 "measurement": column.name, "unit": column.unit, "control_name": switch.off, "difference": d.value,
                 "difference_low": d.low, "difference_high": d.high, "difference_units": d.units, "p": d.p,
                 "mark": switch.mark}
        yield [_data(known.get(name)) for name in (*HEAD, *DELTA_HEAD)]


def csv_rows(table: Table, line: Line) -> Iterator[list[object]]:
    """A row per measurement and control."""
    where = list(map(_data, [
        table.id, "board", table.track, table.model, table.data, table.attack, table.purifier, line.label,
        line.surrogate, int(line.control), " ".join(line.knows), line.eps, line.status, line.rank, int(line.tied),
        *placing_data(line), line.reason, " ".join(map(str, line.seeds))]))
    if not table.columns:
        yield [*where, *[""] * (len(HEAD) - len(where) + len(DELTA_HEAD))]
    for column in table.columns:
        score = line.scores[column.name]
        better = {True: "higher", False: "lower", None: ""}[column.higher_is_better]
        what = list(map(_data, [column.name, column.unit, better, score.value, score.low, score.high, score.n,
                                score.units, score.reason, line.seconds, column.protocol_hash]))
        for more in csv_deltas(line.deltas[column.name]):
            yield [*where, *what, *map(_data, more)]


def csv_deltas(deltas: Sequence[Delta]) -> Iterator[list[object]]:
    """What the differences to controls add to a row; one row without them where there are none."""
    if not deltas:
        yield [None] * len(DELTA_HEAD)
    for delta in deltas:
        d = delta.difference
        yield [delta.control, d.value, d.low, d.high, d.units, d.p, delta.mark, delta.p_holm, delta.detectable]


def placing_data(line: Line) -> list[float | None]:
    found = line.placing
    return [found.first, found.mean, found.low, found.high] if found else [None] * 4


def as_json(boards: Boards) -> str:
    """Everything that the boards say, a line per board."""
    parts = _rounded(boards)
    if not boards.detections:
        parts.pop("detections")
    tables = ",\n".join(_dumped(table) for table in parts.pop("tables"))
    return _dumped(parts)[:-1] + f',"tables":[\n{tables}\n]}}\n'


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    """Plain JSON with floats to 6 digits: the last bits of a resampled mean depend on the machine's linear algebra."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return {name: _rounded(getattr(value, name)) for name in _names(value.__class__)}


@cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _data(value: object) -> object:
    """A cell of the CSV; text that a spreadsheet would run as a formula is quoted."""
    if isinstance(value, str):
        return f"'{value}" if value[:1] in ("=", "+", "@", "\t", "\r") else value
    return "" if value is None else _rounded(value)
