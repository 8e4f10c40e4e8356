"""The leaderboard of a suite: read its records, write ``leaderboard.{md,csv,json}``, or show it on the terminal."""

from __future__ import annotations

from pathlib import Path

from bench.boards import Boards, make_boards
from bench.boardtext import as_json, comma_separated, markdown, print_terminal
from bench.errors import BenchError
from bench.files import told, write_atomically
from bench.results import result_folders
from bench.runs import read_run

__all__ = ["Boards", "print_boards", "read_boards", "write_boards"]


def write_boards(folder: Path) -> Boards:
    """Write ``leaderboard.md``, ``.csv`` and ``.json`` beside a suite's cells. Raises BenchError without results."""
    boards = read_boards(folder)
    with told("leaderboard", folder):
        write_atomically(folder / "leaderboard.md", markdown(boards))
        write_atomically(folder / "leaderboard.csv", comma_separated(boards))
        write_atomically(folder / "leaderboard.json", as_json(boards))
    return boards


def read_boards(folder: Path) -> Boards:
    """The boards of the results below ``folder``; a result that cannot be read is named in the notes."""
    if not folder.is_dir():
        raise BenchError(f"leaderboard: there is no suite in {folder}; run one first, or give its folder.")
    runs, notes = [], []
    for path in result_folders(folder):
        try:
            runs.append(read_run(path))
        except BenchError as error:
            notes.append(f"Left out: {str(error).replace(f'{folder}/', '')}")
    if not runs and not notes:
        raise BenchError(f"leaderboard: {folder} holds no results yet.")
    return make_boards(folder.name, runs, notes)


def print_boards(boards: Boards, width: int | None = None) -> None:
    """Show boards on the terminal, in tables that fit it (at most 120 columns)."""
    print_terminal(boards, width)
