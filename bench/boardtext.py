"""Boards as text: for the terminal, and as Markdown. Same input, same bytes."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.boards import Boards, Table
from bench.detection import DetectionBoard
from bench.sheets import (
    DASH,
    LEGEND,
    Sheet,
    Shown,
    detection_sheets,
    detection_subtitle,
    detection_title,
    left_out,
    notes,
    overview,
    printable,
    sections,
    sheets,
    short_title,
    subtitle,
    title,
)

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 120
NARROW, WIDE = (3, 1), (5, 3)
"""Of a terminal: measurements side by side, and differences to controls beside the ranking."""


# Markdown


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_\[\]|~]|:(?=//))", r"\\\1", html.escape(line, quote=False))


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
    for sheet in sheets(table, *(WIDE if console.width >= 105 else NARROW)):
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
