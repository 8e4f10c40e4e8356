"""What a command line makes of a suite: ``only.`` leaves cells out, ``also.`` adds to them.

``only.attack=zero_shot`` keeps the cells with that attack. ``also.defense=mine`` stands one more defense beside those
of every block, with ``also.defense.eps=8`` for options of its own. Neither changes what any other cell is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from bench.errors import BenchError, unknown
from bench.planner import METRICS, Planned, choices

ONLY, ALSO = "only.", "also."
ADDED = ("defense", "attack", "purifier", METRICS)
"""Kinds that a suite can be given more of."""
Point = list[str]
"""A cell's overrides."""


@dataclass(frozen=True)
class Suite:
    """The words of a command line: ``typed`` go over the blocks, ``only`` and ``also`` follow, by key."""

    typed: tuple[str, ...]
    only: Mapping[str, list[str]] = field(default_factory=dict)
    also: Mapping[str, list[str]] = field(default_factory=dict)


def read_words(words: Sequence[str]) -> Suite:
    """Sort the words; refuses to add what no cell has a choice of."""
    bare = [word.lstrip("+") for word in words]
    only, also = (choices([word.removeprefix(start) for word in bare if word.startswith(start)])
                  for start in (ONLY, ALSO))
    for key in also:
        if kind_of(key) not in ADDED:
            raise unknown("key", key, "also", ADDED)
    for kind in dict.fromkeys(map(kind_of, also)):
        if kind not in also:
            raise BenchError(f"also.{kind}: options for no {kind}; choose one, also.{kind}=<name>.")
    typed = [word for word, plain in zip(words, bare, strict=True) if not plain.startswith((ONLY, ALSO))]
    return Suite(tuple(typed), only, also)


def kind_of(word: str) -> str:
    """What an override or its key is about: ``defense`` of ``defense.eps=8``."""
    return re.split(r"[.=]", word, maxsplit=1)[0]


def kept(points: Sequence[Point], suite: Suite, defaults: Mapping[str, str]) -> list[Point]:
    """The points with a value of ``only`` for each of its keys. ``defaults``: values of keys that a point leaves."""
    left = list(points)
    for key, words in suite.only.items():
        before, left = left, [point for point in left if word_of(point, key, defaults) in words]
        if not left:
            found = {word_of(point, key, defaults).partition("=")[2] for point in before}
            raise unknown("choice", " or ".join(w.partition("=")[2] for w in words), f"only.{key}", found)
    return left


def word_of(point: Sequence[str], key: str, defaults: Mapping[str, str]) -> str:
    """The point's own last word on a key, or the default."""
    own = [word for word in point if word.partition("=")[0].lstrip("+") == key]
    return own[-1].lstrip("+") if own else f"{key}={defaults.get(key, '')}"


def extended(points: Sequence[Point], suite: Suite) -> list[Point]:
    """The points with every metric of ``also``, and after them, for each of its other kinds, each point with its choice
    and options of that kind replaced."""
    measured = [with_metrics(point, suite.also) for point in points]
    found = list(measured)
    for kind in ADDED[:-1]:
        axes = [words for key, words in suite.also.items() if kind_of(key) == kind]
        if axes:
            found += [[*(w for w in point if kind_of(w) != kind), *own] for point in found for own in product(*axes)]
    return [list(point) for point in dict.fromkeys(map(tuple, found))]


def with_metrics(point: Point, also: Mapping[str, list[str]]) -> Point:
    """The point with more metrics in its list; one without a list has all metrics that fit anyway."""
    names = [word.partition("=")[2].strip("[]") for word in also.get(METRICS, [])]
    options = [words[-1] for key, words in also.items() if key.startswith(f"{METRICS}.")]
    if not names:
        return point
    return [_longer(word, names) if word.startswith(f"{METRICS}=") else word for word in point] + options


def _longer(word: str, names: Sequence[str]) -> str:
    listed = word.partition("=")[2].strip("[]").split(",")
    return f"{METRICS}=[{','.join(dict.fromkeys([*filter(None, listed), *names]))}]"


def fitting(planned: Sequence[Planned], points: Sequence[Point], suite: Suite) -> list[Planned]:
    """The plan without added cells that are n/a: a suite's own n/a say something, these do not. ``points``: the suite's
    own. Refuses what fits nowhere."""
    own = {tuple(with_metrics(point, suite.also)) for point in points}
    left = [p for p in planned if p.todo != "n/a" or p.cell.overrides in own]
    lost = [p for p in planned if p.todo == "n/a" and p.cell.overrides not in own]
    for word in (word for kind in ADDED[:-1] for word in suite.also.get(kind, [])):
        reasons = dict.fromkeys(p.reason for p in lost if word in p.cell.overrides)
        if reasons and not any(word in p.cell.overrides for p in left):
            raise BenchError(f"also.{word} fits no cell of this grid: {'; '.join(reasons)}.")
    return left
