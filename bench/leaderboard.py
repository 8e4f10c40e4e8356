"""The leaderboard of a suite: read its records, write ``leaderboard.{md,csv,json,html}``, or show it."""

from __future__ import annotations

from pathlib import Path

from bench.boardpage import html_page
from bench.boards import Boards, make_boards
from bench.boardtext import as_json, comma_separated, markdown, print_terminal
from bench.errors import BenchError
from bench.files import told, write_atomically
from bench.page.cells import Kept
from bench.results import result_folders
from bench.runs import Run, read_run

__all__ = ["PAGE", "Boards", "print_boards", "read_boards", "write_boards"]
PAGE = "leaderboard.html"


def write_boards(folder: Path) -> Boards:
    """Write ``leaderboard.md``, ``.csv``, ``.json`` and ``.html`` beside a suite's cells. Raises BenchError without
    results."""
    runs, notes = read_runs(folder)
    boards = make_boards(folder.name, list(runs.values()), notes)
    kept = [Kept(path, run.result) for path, run in runs.items()]
    with told("leaderboard", folder):
        write_atomically(folder / "leaderboard.md", markdown(boards))
        write_atomically(folder / "leaderboard.csv", comma_separated(boards))
        write_atomically(folder / "leaderboard.json", as_json(boards))
        write_atomically(folder / PAGE, html_page(boards, kept))
    return boards


def read_boards(folder: Path) -> Boards:
    """The boards of the results below ``folder``; a result that cannot be read is named in the notes."""
    runs, notes = read_runs(folder)
    return make_boards(folder.name, list(runs.values()), notes)


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


def print_boards(boards: Boards, width: int | None = None) -> None:
    """Show boards on the terminal, in tables that fit it (at most 120 columns)."""
    print_terminal(boards, width)
