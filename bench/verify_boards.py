"""A suite's leaderboard against the one that its cells give now."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench.findings import NO_IMAGES, Report

CLOSE = 5e-6
"""Relative: the last digits of resampled means depend on the machine's linear algebra."""
NUMBER = re.compile(r"(-?\d+\.\d+(?:e[+-]?\d+)?)")
UNSAID = object()
"""Stands for a key that a mapping lacks."""


def check_boards(report: Report) -> None:
    """The leaderboard's files against those that the cells give now."""
    from bench.leaderboard import FILES, PAGE, texts

    present = [name for name in FILES if (report.folder / name).is_file()]
    if PAGE in present and report.unchecked[NO_IMAGES]:
        present.remove(PAGE)
        report.unchecked[f"{PAGE} (it shows images that are not in the folder)"] += 1
    if not present or not report.cells:
        report.unchecked["leaderboard (its files are not there)"] += 1
        return
    _, again = texts(report.folder, present)
    stale = [name for name in present if not same_board(report, name, again[name])]
    if stale:
        report.notes.append(f"{', '.join(stale)}: if a newer version changed how boards are made, `bench leaderboard "
                            f"{report.folder}` writes them again from the cells.")


def same_board(report: Report, name: str, again: str) -> bool:
    """Whether a file of the leaderboard is what the cells give; names the first place where it is not."""
    file = report.folder / name
    report.checked["files of the leaderboard"] += 1
    old = file.read_text(errors="replace")
    if old == again:
        return True
    difference = json_difference(report, file, old, again) if file.suffix == ".json" else text_difference(old, again)
    if difference:
        report.wrong(file, "", f"does not follow from the cells, first at {difference[0]}", *difference[1:])
    return not difference


def json_difference(report: Report, file: Path, old: str, again: str) -> tuple[str, str, str] | None:
    """Place, what is expected and what is found. What an older file does not say yet is noted, and is no difference."""
    try:
        found = list(_differences(json.loads(again), json.loads(old), ""))
    except ValueError as error:
        return "its start", "JSON", str(error)
    unsaid = sorted({where.rpartition(".")[2] for where, _, said in found if said is UNSAID})
    if unsaid:
        report.notes.append(f"{file.name}: written by a version that did not yet say: {', '.join(unsaid)}.")
    return next(((where, _cut(right), _cut(said)) for where, right, said in found if said is not UNSAID), None)


def _differences(right: Any, said: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(right, dict) and isinstance(said, dict):
        for key in [*right, *(key for key in said if key not in right)]:
            yield from _differences(right.get(key, UNSAID), said.get(key, UNSAID), f"{where}.{key}".lstrip("."))
    elif isinstance(right, list) and isinstance(said, list) and len(right) == len(said):
        for place, (one, other) in enumerate(zip(right, said, strict=True)):
            yield from _differences(one, other, f"{where}[{place}]")
    elif right != said and not (isinstance(right, float) and isinstance(said, (int, float)) and _close(right, said)):
        yield where, right, said


def _cut(value: Any) -> str:
    return "nothing" if value is UNSAID else json.dumps(value, ensure_ascii=False)[:80]


def text_difference(old: str, new: str) -> tuple[str, str, str] | None:
    """The first line in which two texts differ, and from a little before that place what is expected and found."""
    for number, (right, said) in enumerate(zip_longest(new.splitlines(), old.splitlines(), fillvalue=""), 1):
        one, other = NUMBER.split(right), NUMBER.split(said)
        place = next((i for i, pair in enumerate(zip_longest(one, other, fillvalue="")) if not _same_part(*pair)), None)
        if place is not None:
            start = "".join(one[:place])[-30:]
            expected, found = ((start + "".join(parts[place:]))[:80] for parts in (one, other))
            return f"line {number}", expected, found
    return None


def _same_part(right: str, said: str) -> bool:
    if right == said:
        return True
    try:
        return _close(float(right), float(said))
    except ValueError:
        return False


def _close(right: float, said: float) -> bool:
    return math.isclose(right, said, rel_tol=CLOSE)
