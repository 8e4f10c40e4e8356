"""Geometry of what the page draws: intervals as whiskers, and one number against another with the Pareto frontier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from bench.stats import Estimate

WIDTH, MARGIN = 120.0, 5.0
"""Of a whisker, in its own units; points never lie on its edge."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Scale:
    """A line through numbers: ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Whisker:
    """A point with its interval on a column's common scale. ``reference``: where 0, or the control, lies."""

    at: float
    low: float | None
    high: float | None
    reference: float | None


def scale_of(values: Iterable[float | None], start: float, end: float, margin: float = 0.0) -> Scale:
    """One that holds all ``values`` and, on both sides, ``margin`` times their range."""
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    room = (high - low) * margin or (0.0 if high > low else max(abs(low), 1e-9) * 0.5)
    return Scale(low - room, high + room, start, end)


def whiskers(scores: Sequence[Estimate | None], reference: float | None) -> list[Whisker | None]:
    """One per score that has a value."""
    numbers = [n for score in scores if score for n in (score.value, score.low, score.high)]
    scale = scale_of([*numbers, reference], MARGIN, WIDTH - MARGIN)
    return [whisker(score, scale, reference) if score else None for score in scores]


def whisker(score: Estimate, scale: Scale, reference: float | None) -> Whisker | None:
    if score.value is None:
        return None
    low, high, line = (None if n is None else scale.at(n) for n in (score.low, score.high, reference))
    return Whisker(scale.at(score.value), low, high, line)


# One number against another


@dataclass(frozen=True)
class Candidate:
    """A line to plot: ``across`` and ``up`` as they were measured."""

    label: str
    control: bool
    across: float
    up: Estimate


@dataclass(frozen=True)
class Axis:
    """``words``: what it shows; ``better``: what lies at its far end; ``higher``: whether numbers grow to it."""

    words: str
    better: str
    higher: bool


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A line on a plot. ``text_x``, ``text_y``, ``anchor``: of its label, None where there is no room for one; ``far``:
    it needs a line to its point."""

    label: str
    control: bool
    frontier: bool
    x: float
    y: float
    low: float | None
    high: float | None
    text_x: float | None = None
    text_y: float | None = None
    anchor: str = "start"
    far: bool = False


@dataclass(frozen=True)
class Plot:
    """Better is up and to the right. ``steps``: the frontier, as the points of a line."""

    across: Axis
    up: Axis
    marks: tuple[Mark, ...]
    steps: str
    across_ticks: tuple[Tick, ...]
    up_ticks: tuple[Tick, ...]
    unlabelled: tuple[str, ...]
    width: int = 900
    height: int = 470
    left: int = 64
    right: int = 884
    top: int = 28
    bottom: int = 418


def frontier(candidates: Sequence[Candidate], across: Axis, up: Axis) -> set[str]:
    """Labels of those that no other beats in one number without losing in the other."""
    def gains(candidate: Candidate) -> tuple[float, float]:
        value = candidate.up.value or 0.0
        return (candidate.across if across.higher else -candidate.across, value if up.higher else -value)

    found = {candidate.label: gains(candidate) for candidate in candidates}
    return {label for label, (x, y) in found.items()
            if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in found.values())}


def make_plot(candidates: Sequence[Candidate], across: Axis, up: Axis) -> Plot | None:
    """None where there is nothing to weigh: fewer than three lines, or all alike in one of the numbers."""
    if len(candidates) < 3 or min(_kinds(candidates)) < 2:
        return None
    frame = Plot(across, up, (), "", (), (), ())
    xs = scale_of([c.across for c in candidates], *_ends(across, frame.left, frame.right), margin=0.08)
    reach = [n for c in candidates for n in (c.up.value, c.up.low, c.up.high)]
    ys = scale_of(reach, *_ends(up, frame.bottom, frame.top), margin=0.04)
    leading = frontier(candidates, across, up)
    marks = [_mark(c, c.label in leading, xs, ys) for c in candidates if c.up.value is not None]
    placed = tuple(label_marks(marks, frame))
    steps = sorted((m.x, m.y) for m in placed if m.frontier)
    return Plot(across, up, placed, _stairs(steps), _ticks(xs), _ticks(ys),
                tuple(m.label for m in placed if m.text_x is None))


def _kinds(candidates: Sequence[Candidate]) -> tuple[int, int]:
    return len({round(c.across, 9) for c in candidates}), len({c.up.value for c in candidates})


def _ends(axis: Axis, worse: float, better: float) -> tuple[float, float]:
    return (worse, better) if axis.higher else (better, worse)


def _mark(candidate: Candidate, leads: bool, xs: Scale, ys: Scale) -> Mark:
    up = candidate.up
    low, high = (None if n is None else ys.at(n) for n in (up.low, up.high))
    return Mark(candidate.label, candidate.control, leads, xs.at(candidate.across), ys.at(up.value or 0.0), low, high)


def _stairs(steps: Sequence[tuple[float, float]]) -> str:
    """What the points attain: down to the level of the next one on the right, then along it."""
    corners = [steps[0]] if steps else []
    for (before, _), (x, y) in pairwise(steps):
        corners += [(before, y), (x, y)]
    return " ".join(f"{x:g},{y:g}" for x, y in corners)


def _ticks(scale: Scale) -> tuple[Tick, ...]:
    """At four to eight round numbers."""
    rough = (scale.high - scale.low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    decimals = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return tuple(Tick(scale.at(i * step), f"{i * step:.{decimals}f}") for i in range(first, last + 1))


# Labels

LETTER, LINE = 7.4, 14.0
"""Of a label's text: width of a letter, on average, and height."""
NEAR = ((9.0, 4.0, "start"), (-9.0, 4.0, "end"), (0.0, -10.0, "middle"), (0.0, 19.0, "middle"), (8.0, -8.0, "start"),
        (8.0, 16.0, "start"), (-8.0, -8.0, "end"), (-8.0, 16.0, "end"))
"""Where a label may stand, best first: offsets from its point, and what of the text lies there."""
TURN, FARTHEST, MOST = 15, 260, 40
"""Degrees between the directions, and the distance, in which a place is looked for that needs a line to its point; and
labels on one plot."""


def label_marks(marks: Sequence[Mark], frame: Plot) -> list[Mark]:
    """Marks with their labels where these cover no point and no other label; the frontier chooses first, then
    controls."""
    taken: list[Box] = [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for m in marks]
    found = {mark.label: mark for mark in marks}
    for mark in sorted(marks, key=lambda m: (not m.frontier, not m.control, m.y, m.label))[:MOST]:
        found[mark.label], box = labelled(mark, frame, taken)
        taken += [box] if box else []
    return [found[mark.label] for mark in marks]


def labelled(mark: Mark, frame: Plot, taken: Sequence[Box]) -> tuple[Mark, Box | None]:
    """The mark with its label at the first free place, and what that covers."""
    for dx, dy, anchor in _around():
        box = _box(mark, dx, dy, anchor)
        if _inside(box, frame) and not any(_overlap(box, other) for other in taken):
            x, y = round(mark.x + dx, 1), round(mark.y + dy, 1)
            return replace(mark, text_x=x, text_y=y, anchor=anchor, far=math.hypot(dx, dy) > 2 * LINE), box
    return mark, None


@cache
def _around() -> tuple[tuple[float, float, str], ...]:
    """Near places, then wider and wider circles."""
    circles = [(distance, math.radians(angle)) for distance in range(28, FARTHEST, 14) for angle in range(0, 360, TURN)]
    return (*NEAR, *((distance * math.cos(angle), distance * math.sin(angle),
                      "start" if math.cos(angle) > 0.2 else "end" if math.cos(angle) < -0.2 else "middle")
                     for distance, angle in circles))


def _box(mark: Mark, dx: float, dy: float, anchor: str) -> Box:
    wide = len(mark.label) * LETTER
    left = mark.x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return left, mark.y + dy - LINE + 3, left + wide, mark.y + dy + 3


def _inside(box: Box, frame: Plot) -> bool:
    return box[0] >= frame.left and box[2] <= frame.width and box[1] >= 0 and box[3] <= frame.bottom


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
