"""What verifying a results folder came to: which parts were compared, which do not agree, and the grade."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.reproduce import Rerun
from bench.results import Result

CLAIMED, CONSISTENT, REPRODUCED = "claimed", "consistent", "reproduced"
NO_IMAGES = "images that are not in the folder"


@dataclass(frozen=True)
class Problem:
    """What does not agree. ``file``: relative to the folder that was verified; ``cell``: its identity, if it is of
    one."""

    file: str
    cell: str
    what: str
    expected: str = ""
    found: str = ""

    def line(self) -> str:
        """One line for people."""
        where = f"{self.file}: cell {self.cell}: " if self.cell and self.cell not in self.file else f"{self.file}: "
        told = f" (expected {self.expected}, found {self.found})" if self.expected or self.found else ""
        return f"{where}{self.what}{told}"


@dataclass
class Report:
    """What came out for one suite. ``checked``: what was compared, and how often. ``unchecked``: what could not be, and
    for how many. ``notes``: what a reader should know and that is no fault."""

    folder: Path
    cells: dict[Path, Result] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    unchecked: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    reruns: list[Rerun] = field(default_factory=list)

    @property
    def grade(self) -> str:
        if self.problems:
            return CLAIMED
        return REPRODUCED if any(rerun.agrees for rerun in self.reruns) else CONSISTENT

    def wrong(self, file: Path, cell: str, what: str, expected: object = "", found: object = "") -> None:
        place = file.relative_to(self.folder) if file.is_relative_to(self.folder) else file
        self.problems.append(Problem(place.as_posix(), cell, what, str(expected), str(found)))

    def compare(self, what: str, file: Path, cell: str, problem: str, expected: object, found: object) -> None:
        """Count a check, and a problem where the two differ."""
        self.checked[what] += 1
        if expected != found:
            self.wrong(file, cell, problem, expected, found)


def told(report: Report) -> Iterator[str]:
    """What a report says, line by line, the grade last."""
    yield from (f"not checked: {number} {what}" for what, number in report.unchecked.items())
    yield from (f"note: {note}" for note in report.notes)
    checked = ", ".join(f"{number} {what}" for what, number in report.checked.items())
    yield f"checked: {checked or 'nothing'}"
    for rerun in report.reruns:
        yield f"ran again: cell {rerun.cell} ({rerun.title}): {rerun.summary()}"
    yield from (f"problem: {problem.line()}" for problem in report.problems)
    counts = Counter(result.status for result in report.cells.values())
    cells = ", ".join(f"{number} {status}" for status, number in counts.items()) or "no cell that can be read"
    wrong = f", {len(report.problems)} problems" if report.problems else ""
    yield f"{report.folder}: {report.grade} ({cells}{wrong})"
