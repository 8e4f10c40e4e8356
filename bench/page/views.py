"""What stands on the page and in which order: boards by track and question, as grids that a template can draw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from bench import sheets
from bench.boards import Boards, Line, Table
from bench.detection import DetectionBoard
from bench.entries import DEFENSE_STAGES, Column
from bench.page.plots import Axis, Candidate, Plot, Whisker, make_plot, whiskers
from bench.results import MEASURE, Result
from bench.sheets import DASH, Sheet, Shown
from bench.stats import Difference, Estimate
from bench.worst_case import ALL_ATTACKS, Matrix

QUESTIONS = {
    "worst": ("Worst case", "Of every sample, the attacker keeps the attack and the purifier that served best."),
    "mean": ("Mean", "Every attack and purifier counts the same. Ordered, not ranked."),
    "transfer": ("Transfer", "Photos protected on one model, attacked on another."),
    "trained": ("Attacks that train", "The attacker fits a model to the photos."),
    "zero_shot": ("Zero-shot attacks", "The attacker conditions a stock model on the photos and trains nothing."),
    "edits": ("Edits", "The attacker edits a photo that was published."),
    "detection": ("Detection", "Which models are poisoned?"),
    "repair": ("Repair", "What is left of the backdoor, and of the model, after the defense."),
}
"""In the order of the page: title, and what is asked."""
TRACKS = ("customization", "editing", "backdoor")
VISIBLE, USEFUL = ("lpips", "ssim", "feature_distance", "psnr"), ("utility", "clip_score", "fid", "kid")
"""Measurements of how much a perturbation shows, and of what a repaired model is still worth; the first that tells
lines apart is plotted."""
NUMBER = re.compile(r"^(?:< )?([-+]?[\d,]*\.?\d+)")
WIDE = 1000
"""Measurements side by side: the page scrolls them inside their own box."""


class Row(Protocol):
    """What a board's line and a detector share."""

    @property
    def label(self) -> str: ...
    @property
    def control(self) -> bool: ...
    @property
    def knows(self) -> tuple[str, ...]: ...
    @property
    def cells(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Head:
    """Of a column. ``explained``: what the reader sees when pointing at it."""

    text: str
    numeric: bool
    explained: str = ""


@dataclass(frozen=True)
class Item:
    """A cell of a grid. ``order``: what it is sorted by, "" for last, whatever the direction."""

    main: str
    detail: str = ""
    order: float | str = ""
    whisker: Whisker | None = None


@dataclass(frozen=True)
class GridRow:
    """``cells``: the ids of what it unfolds to."""

    items: tuple[Item, ...]
    control: bool = False
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """``named``: the column that holds the row's label; ``sorted_by``, ``ascending``: how it comes."""

    title: str
    head: tuple[Head, ...]
    rows: tuple[GridRow, ...]
    named: int = 0
    sorted_by: int | None = None
    ascending: bool = True


@dataclass(frozen=True)
class Board:
    """One article of the page."""

    anchor: str
    title: str
    subtitle: str
    grids: tuple[Grid, ...]
    more: tuple[Grid, ...] = ()
    plot: Plot | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Question:
    name: str
    boards: list[Board] = field(default_factory=list)

    @property
    def title(self) -> str:
        return QUESTIONS[self.name][0]

    @property
    def asked(self) -> str:
        return QUESTIONS[self.name][1]


@dataclass(frozen=True)
class Track:
    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Known:
    """What boards look up: ``cells`` by id; how ``visible`` protection is; ``titles`` by the id of a table."""

    cells: Mapping[str, Result]
    visible: Mapping[tuple[str, ...], Mapping[str, Estimate]]
    titles: Mapping[str, str]


def make_tracks(boards: Boards, cells: Mapping[str, Result]) -> list[Track]:
    """Everything on the page but the cells themselves, which are looked up by id."""
    found: dict[str, dict[str, Question]] = {}

    def put(track: str, question: str, board: Board) -> None:
        asked = found.setdefault(track, {}).setdefault(question, Question(question))
        asked.boards.append(board)

    for detection in boards.detections:
        put(detection.track, "detection", detection_board(detection))
    known = Known(cells, visibility(boards.tables), titles_of(boards.tables))
    for lead, others, hidden in sheets.sections(boards.tables):
        for table in (lead, *others):
            left_out = [sheets.left_out(hidden)] if hidden and table is lead else []
            for question, board in boards_of(table, known, left_out):
                put(table.track, question, board)
    names = [*TRACKS, *(track for track in found if track not in TRACKS)]
    return [Track(name, in_order(found[name])) for name in names if name in found]


def in_order(questions: Mapping[str, Question]) -> tuple[Question, ...]:
    return tuple(questions[name] for name in QUESTIONS if name in questions)


def titles_of(tables: Sequence[Table]) -> dict[str, str]:
    """By id; equal ones are told apart by the data, or the parts of the protocol, in which their boards differ."""
    alike: dict[tuple[str, bool, str], list[Table]] = {}
    for table in tables:
        alike.setdefault((table.track, bool(table.worst_of), plain_title(table)), []).append(table)
    return {table.id: ", ".join([title, *apart(table, of)]) for (*_, title), of in alike.items() for table in of}


def plain_title(table: Table) -> str:
    title = f"{table.attack} on {table.model}"
    return title if table.worst_of or table.unpurified else f"{title}, {sheets.short_title(table)}"


def apart(table: Table, twins: Sequence[Table]) -> list[str]:
    said = [f"data {table.data}"] if len({twin.data for twin in twins}) > 1 else []
    return said + [f"{name} {sheets.brief(value)}" for name, value in table.protocol.items()
                   if any(twin.protocol.get(name) != value for twin in twins)]


def boards_of(table: Table, known: Known, notes: Sequence[str]) -> Iterator[tuple[str, Board]]:
    """The board of a table under the question that it answers, and what it says of further ones."""
    yield question_of(table, known.cells), table_board(table, known, notes)
    if table.matrix and table.matrix.rows:
        yield "mean", mean_board(table, table.matrix, known)
    if carried := transfer(table):
        said = "Lines whose photos were protected on another model, beside the same defense on the attacked one."
        board = table_board(carried, replace(known, visible={}), [said, "Ranks are those of the whole board."],
                            kind="transfer")
        yield "transfer", replace(board, more=())


def question_of(table: Table, cells: Mapping[str, Result]) -> str:
    if table.worst_of:
        return "worst"
    if table.track == "customization":
        return "zero_shot" if is_zero_shot(table, cells) else "trained"
    return "edits" if table.track == "editing" else "repair"


def is_zero_shot(table: Table, cells: Mapping[str, Result]) -> bool:
    """Whether the attack conditions a model on photos through an adapter."""
    known = (cells[id] for line in table.lines for id in line.cells if id in cells)
    needs = next((result.cell.attack.facts.get("needs") or () for result in known), ())
    return any(str(need).startswith("ip_") for need in needs)


def transfer(table: Table) -> Table | None:
    """The lines that were protected elsewhere, with their namesakes and controls. The worst case over attackers has
    its own matrix of who protected where."""
    carried = {line.name for line in table.lines if line.surrogate}
    if table.attack == ALL_ATTACKS or table.worst_of or not carried:
        return None
    lines = tuple(line for line in table.lines if line.control or line.name in carried)
    return replace(table, lines=lines, switches=(), notes=())


# Grids


def table_board(table: Table, known: Known, notes: Sequence[str], kind: str = "board") -> Board:
    lines = {line.label: line for line in table.lines}
    first, *rest = sheets.sheets(table, WIDE)
    ranked = bool(table.columns and sheets.ran(table))
    grids = [ranking_grid(first, table, known.cells) if ranked else plain_grid(first, lines)]
    return Board(f"{kind}-{table.id}", known.titles[table.id], sheets.subtitle(table), tuple(grids),
                 tuple(plain_grid(sheet, lines) for sheet in rest), plot_of(table, known.visible),
                 (*sheets.notes(table), *notes))


def ranking_grid(sheet: Sheet, table: Table, cells: Mapping[str, Result]) -> Grid:
    """The sheet that ranks, with intervals drawn, what defenses know, and what else a cell cost."""
    lines = {line.label: line for line in table.lines}
    grid, column = plain_grid(sheet, lines), table.columns[0]
    shown = [lines[row.items[grid.named].main] for row in grid.rows]
    drawn = {sheets.heading(column): whiskers([line.scores[column.name] for line in shown],
                                                 control_value(table, column))}
    for control in table.controls:
        drawn[f"Δ {control}"] = whiskers([delta_of(line, column, control) for line in shown], 0.0)
    rows = [replace(row, items=tuple(
        replace(item, whisker=drawn[head.text][i]) if head.text in drawn else item
        for head, item in zip(grid.head, row.items, strict=True))) for i, row in enumerate(grid.rows)]
    grid = replace(grid, rows=tuple(rows))
    if any(line.knows for line in shown):
        grid = inserted(grid, grid.named + 1, Head("knows", False, "what a defense is told besides photos or model"),
                        [Item(", ".join(line.knows) or DASH, order=", ".join(line.knows)) for line in shown])
    for head, costs in more_costs(shown, cells):
        grid = inserted(grid, len(grid.head), head, costs)
    return grid


def control_value(table: Table, column: Column) -> float | None:
    """Of the first control, to compare the others with."""
    names = table.controls[:1]
    return next((line.scores[column.name].value for line in table.lines if line.name in names), None)


def delta_of(line: Line, column: Column, control: str) -> Estimate | None:
    found = next((delta.difference for delta in line.deltas[column.name] if delta.control == control), None)
    return as_estimate(found) if found else None


def as_estimate(difference: Difference) -> Estimate:
    return Estimate(difference.value, difference.low, difference.high, difference.n, difference.units)


def inserted(grid: Grid, at: int, head: Head, items: Sequence[Item]) -> Grid:
    rows = tuple(replace(row, items=(*row.items[:at], item, *row.items[at:]))
                 for row, item in zip(grid.rows, items, strict=True))
    return replace(grid, head=(*grid.head[:at], head, *grid.head[at:]), rows=rows)


def more_costs(lines: Sequence[Line], cells: Mapping[str, Result]) -> Iterator[tuple[Head, list[Item]]]:
    """Peak memory of the defense's own stage, and seconds of what the attacker does, where they were measured."""
    runs = [[cells[id] for id in line.cells if id in cells] for line in lines]
    peaks = [max((s.peak_mb for r in of for s in r.cost if s.stage in DEFENSE_STAGES and s.peak_mb), default=None)
             for of in runs]
    if any(peaks):
        yield (Head("memory", True, "peak memory of the defense's own stage"),
               [Item(DASH if peak is None else f"{peak:,.0f} MB", order=order_of(peak)) for peak in peaks])
    spent = [mean_of(attack_seconds(r) for r in of if r.status == "ok") for of in runs]
    if any(spent):
        yield (Head("attack cost", True, "seconds of all other stages but measuring, mean over cells"),
               [Item(sheets.seconds(one), order=order_of(one)) for one in spent])


def order_of(value: float | None) -> float | str:
    return "" if value is None else value


def attack_seconds(result: Result) -> float:
    return sum(s.seconds for s in result.cost if s.stage not in (*DEFENSE_STAGES, MEASURE))


def mean_of(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def plain_grid(sheet: Sheet, lines: Mapping[str, Row]) -> Grid:
    """A sheet with its rows' labels looked up: what is said beside a label becomes the row's own marks."""
    named = sheet.head.index("defense") if "defense" in sheet.head else 0
    texts = [[row[i].main for row in sheet.rows] for i in range(len(sheet.head))]
    numeric = [i != named and all(text == DASH or NUMBER.match(text) for text in column)
               for i, column in enumerate(texts)]
    ranked = sheet.head[0] == "rank"
    head = tuple(Head(text, numeric[i], explained(text, ranked)) for i, text in enumerate(sheet.head))
    rows = []
    for row in sheet.rows:
        line = lines.get(row[named].main)
        items = tuple(item_of(shown, numeric[i], i == named and line is not None) for i, shown in enumerate(row))
        rows.append(GridRow(items, bool(line and line.control), line.cells if line else ()))
    return Grid(sheet.title, head, tuple(rows), named, 0 if ranked else None)


EXPLAINED = {
    "rank": "1 is best; = is shared, for the difference may be chance",
    "ε": "largest change of a pixel, in 0–255 levels",
    "P(best)": "share of resamplings in which the line comes first",
    "rank 95 %": "between which ranks the line lies when units and seeds are resampled",
    "cost": "seconds of the defense's own stage, when it was built",
}


def explained(heading: str, ranked: bool) -> str:
    """``ranked``: whether it stands over a ranking, whose differences are to controls."""
    if ranked and heading.startswith("Δ "):
        return f"paired difference to {heading.removeprefix('Δ ')}, on the same units, seeds and samples"
    return EXPLAINED.get(heading, "")


def item_of(shown: Shown, numeric: bool, named: bool) -> Item:
    if numeric:
        found = NUMBER.match(shown.main)
        return Item(shown.main, shown.detail, float(found[1].replace(",", "")) if found else "")
    return Item(shown.main, "" if named else shown.detail, "" if shown.main == DASH else shown.main.lower())


def mean_board(table: Table, matrix: Matrix, known: Known) -> Board:
    """Lines by their mean over purifiers or attackers, beside their worst."""
    lines = {line.label: line for line in table.lines}
    shown = sorted((row for row in matrix.rows if row.cells[-2].value is not None),
                   key=lambda row: (row.cells[-2].value or 0.0) * (-1 if matrix.higher_is_better else 1))
    means = [row.cells[-2] for row in shown]
    decimals = sheets.places([mean.value for mean in means])
    drawn = whiskers(means, next((row.cells[-2].value for row in shown if row.clean), None))
    rows = []
    for row, line in zip(shown, drawn, strict=True):
        mean, worst = (score_item(score, decimals) for score in row.cells[-2:])
        own = lines.get(row.label)
        items = (Item(row.label, order=row.label.lower()), replace(mean, whisker=line), worst)
        rows.append(GridRow(items, row.control, own.cells if own else ()))
    over = f"mean over {len(matrix.columns) - 2} {matrix.over}s: {', '.join(matrix.columns[:-2])}"
    grid = Grid(f"Ordered by the mean of {matrix.measurement}", mean_head(matrix), tuple(rows), 0, 1,
                not matrix.higher_is_better)
    return Board(f"mean-{table.id}", known.titles[table.id], f"data {table.data} · {over}", (grid,))


def mean_head(matrix: Matrix) -> tuple[Head, ...]:
    arrow = "↑" if matrix.higher_is_better else "↓"
    unit = f" ({matrix.unit})" if matrix.unit else ""
    return (Head("defense", False),
            Head(f"mean {matrix.measurement} {arrow}{unit}", True, f"every {matrix.over} counts the same"),
            Head(f"worst {arrow}", True, f"of every sample under the {matrix.over} that served the attacker best"))


def score_item(score: Estimate, decimals: int) -> Item:
    shown = sheets.shown_score(score, decimals)
    return Item(shown.main, shown.detail, order_of(score.value))


def detection_board(board: DetectionBoard) -> Board:
    detectors = {d.label: d for d in board.detectors}
    first, *rest = sheets.detection_sheets(board)
    grid = plain_grid(first, detectors)
    whole = {"AUROC ↑": [d.auroc for d in board.detectors], "TPR ↑": [d.tpr for d in board.detectors],
             "FPR ↓": [d.fpr for d in board.detectors]}
    drawn = {name: whiskers(scores, 0.5 if name.startswith("AUROC") else board.rate if "FPR" in name else None)
             for name, scores in whole.items()}
    rows = tuple(replace(row, items=tuple(
        replace(item, whisker=drawn[head.text][i]) if head.text in drawn else item
        for head, item in zip(grid.head, row.items, strict=True))) for i, row in enumerate(grid.rows))
    grid = replace(grid, rows=rows)
    if any(d.knows for d in board.detectors):
        grid = inserted(grid, 1, Head("knows", False, "what a defense is told besides the model"),
                        [Item(", ".join(d.knows) or DASH, order=", ".join(d.knows)) for d in board.detectors])
    return Board(f"detection-{board.id}", f"Poisoned models on {board.model}", sheets.detection_subtitle(board),
                 (grid,), tuple(plain_grid(sheet, detectors) for sheet in rest), notes=tuple(board.notes))


# Plots


def visibility(tables: Iterable[Table]) -> dict[tuple[str, ...], dict[str, Estimate]]:
    """How much each defense's perturbation shows, where any unpurified board of the same photos says it: a worst case
    over purifiers measures pictures after them."""
    found: dict[tuple[str, ...], dict[str, Estimate]] = {}
    for table in tables:
        if table.unpurified:
            for line in table.lines:
                own = found.setdefault((table.track, table.data, table.model, line.label), {})
                for name in VISIBLE:
                    if name in line.scores and line.scores[name].value is not None:
                        own.setdefault(name, line.scores[name])
    return found


def plot_of(table: Table, beside: Mapping[tuple[str, ...], Mapping[str, Estimate]]) -> Plot | None:
    """Protection against visibility; removal against utility."""
    if not table.columns or table.columns[0].higher_is_better is None:
        return None
    photos, ranked = table.track in TRACKS[:2], table.columns[0]
    lines = [line for line in table.lines if line.status == "ok" and line.scores[ranked.name].value is not None]
    up = Axis(sheets.heading(ranked), "better protected" if photos else "backdoor removed",
              bool(ranked.higher_is_better))
    for name in VISIBLE if photos else USEFUL:
        column = next((c for c in table.columns if c.name == name), None)
        higher = column.higher_is_better if column else name in ("ssim", "psnr")
        scores = [line.scores[name] if column else beside.get((table.track, table.data, table.model, line.label),
                                                             {}).get(name) for line in lines]
        across = Axis(name + (f" ({column.unit})" if column and column.unit else "" if column else " as published"),
                      "less visible" if photos else "more useful", bool(higher))
        plot = make_plot([Candidate(line.label, line.control, score.value, line.scores[ranked.name])
                          for line, score in zip(lines, scores, strict=True)
                          if score and score.value is not None], across, up)
        if plot:
            return plot
    return None
