"""Progress of long work: a bar with an ETA on a terminal; elsewhere one line in the log now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.context import Progress

EVERY = 20.0
"""Seconds between lines where there is no terminal."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def shown(title: str = "") -> Iterator[Progress]:
    """A progress callable for a ``with`` block: drawn on standard error if that is a terminal, else logged."""
    if not sys.stderr.isatty():
        yield Lines(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Drawn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())
    with Drawn(*columns, console=Console(stderr=True), transient=True) as drawn:
        yield Bars(title, drawn)


@dataclass
class Bars:
    """One bar per kind of work; a bar goes when its work is done."""

    title: str
    drawn: object
    tasks: dict[str, int] = field(default_factory=dict)

    def __call__(self, what: str, done: int, total: int) -> None:
        from rich.markup import escape
        from rich.progress import Progress as Drawn
        from rich.progress import TaskID

        assert isinstance(self.drawn, Drawn)
        if what not in self.tasks:
            text = escape(f"{self.title}: {what}" if self.title else what)
            self.tasks[what] = self.drawn.add_task(text, total=total)
        self.drawn.update(TaskID(self.tasks[what]), completed=done, total=total)
        if done >= total:
            self.drawn.remove_task(TaskID(self.tasks.pop(what)))


@dataclass
class Lines:
    """A line in the log every ``every`` seconds of work, with how long it may still take."""

    title: str
    every: float = EVERY
    started: dict[str, tuple[float, int]] = field(default_factory=dict)
    said: float = field(default_factory=time.monotonic)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        since, first = self.started.setdefault(what, (now, done))
        if done >= total:
            self.started.pop(what)
        elif now - self.said >= self.every:
            self.said = now
            log.info("%s%s: %d of %d%s", f"{self.title}: " if self.title else "", what, done, total,
                     eta(now - since, done - first, total - done))


def eta(elapsed: float, done: int, left: int) -> str:
    """", about 1:05 left", from the pace so far; "" before there is one. Seconds."""
    if done <= 0:
        return ""
    minutes, seconds = divmod(round(elapsed / done * left), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f", about {clock} left"
