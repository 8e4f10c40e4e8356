"""The leaderboard of a suite: read its records, write ``leaderboard.{md,csv,json,html}``, or show it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.allocator import keep_freed_memory
from bench.boarddata import as_json, comma_separated
from bench.boardpage import html_page
from bench.boards import Boards, make_boards
from bench.boardtext import markdown, print_terminal
from bench.errors import BenchError
from bench.files import told, write_atomically
from bench.page.cells import Kept
from bench.results import result_folders
from bench.runs import Run, read_run

__all__ = ["FILES", "PAGE", "Boards", "print_boards", "read_boards", "texts", "write_boards"]
PAGE = "leaderboard.html"
FILES: dict[str, Callable[[Boards, Sequence[Kept]], str]] = {
    "leaderboard.md": lambda boards, kept: markdown(boards),
    "leaderboard.csv": lambda boards, kept: comma_separated(boards),
    "leaderboard.json": lambda boards, kept: as_json(boards),
    PAGE: html_page,
}
"""The files of a leaderboard, and what writes their text."""


def write_boards(folder: Path) -> Boards:
    """Write ``leaderboard.md``, ``.csv``, ``.json`` and ``.html`` beside a suite's cells. Raises BenchError without
    results."""
    boards, found = texts(folder)
    with told("leaderboard", folder):
        for name, text in found.items():
            write_atomically(folder / name, text)
    return boards


def texts(folder: Path, names: Iterable[str] = tuple(FILES)) -> tuple[Boards, dict[str, str]]:
    """The boards of a suite, and the text that each of the files ``names`` would have now."""
    with in_bulk():
        runs, notes = read_runs(folder)
        boards = make_boards(folder.name, list(runs.values()), notes)
        kept = [Kept(path, run.result) for path, run in runs.items()]
        return boards, {name: FILES[name](boards, kept) for name in names}


def read_boards(folder: Path) -> Boards:
    """The boards of the results below ``folder``; a result that cannot be read is named in the notes."""
    with in_bulk():
        runs, notes = read_runs(folder)
        return make_boards(folder.name, list(runs.values()), notes)


@contextmanager
def in_bulk() -> Iterator[None]:
    """Memory as suits millions of records, all of which stay. No search for cycles: records hold none, and every pass
    takes as long as a third of the boards. Nor are pages given back and cleared again, a tenth of the time."""
    enabled = gc.isenabled()
    keep_freed_memory()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_runs(folder: Path) -> tuple[dict[Path, Run], list[str]]:
    """The results below ``folder`` by their own folders, and what is to be said of those that cannot be read. Raises
    BenchError where there are none."""
    if not folder.is_dir():
        raise BenchError(f"leaderboard: there is no suite in {folder}; run one first, or give its folder.")
    runs, notes = {}, []
    for path in result_folders(folder):
        try:
            runs[path] = read_run(path)
        except BenchError as error:
            notes.append(f"Left out: {str(error).replace(f'{folder}/', '')}")
    if not runs and not notes:
        raise BenchError(f"leaderboard: {folder} holds no results yet.")
    return runs, notes


def print_boards(boards: Boards, width: int | None = None, folder: Path | None = None) -> None:
    """Show boards on the terminal, in tables that fit it (at most 120 columns), and where their page lies."""
    print_terminal(boards, width)
    if folder is not None:
        print(f"Page: {folder / PAGE}")
