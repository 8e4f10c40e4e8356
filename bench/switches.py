"""What single switches of a defense do: lines of one board that differ in one option which is on or off.

Two intervals that overlap say little about a difference when both lines met the same photos with the same seeds. So
where a board holds a defense with and without one of its parts, the paired difference is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from bench.results import CellRecord, ModelRecord
from bench.stats import Difference, Tally, holm, paired_differences


@dataclass(frozen=True)
class Variant:
    """One line of a board: a cell of it, and the samples of the measurement that ranks."""

    label: str
    cell: CellRecord
    points: Tally
    share: bool


@dataclass(frozen=True)
class Switch:
    """The line ``on`` minus the line ``off``, which lacks ``option`` alone. ``mark`` as of differences to controls,
    Holm's correction over all switches of the board."""

    option: str
    off: str
    on: str
    difference: Difference
    mark: str = ""


def find_switches(lines: Sequence[Variant], alpha: float) -> tuple[Switch, ...]:
    """All of a board, by label; none for lines without a common sample."""
    pairs = [(option, off, on) for off, on in permutations(lines, 2) if (option := switched_on(off.cell, on.cell))]
    found = [Switch(option, off.label, on.label, difference) for (option, off, on), difference in zip(
        pairs, paired_differences([(on.points, off.points, on.share) for _, off, on in pairs]), strict=True)]
    made = sorted((s for s in found if s.difference.value is not None), key=lambda s: (s.off, s.option, s.on))
    return tuple(marked(made, alpha))


def switched_on(off: CellRecord, on: CellRecord) -> str:
    """The one option that is off in the first defense, on in the second and all that tells them apart; "" if there is
    no such option."""
    one, other = off.defense, on.defense
    if (one.name, one.version, _digest(off.surrogate)) != (other.name, other.version, _digest(on.surrogate)):
        return ""
    names = one.parameters.keys() | other.parameters.keys()
    differing = [name for name in names if one.parameters.get(name) != other.parameters.get(name)]
    if len(differing) != 1:
        return ""
    values = one.parameters.get(differing[0]), other.parameters.get(differing[0])
    return differing[0] if values[0] is False and values[1] is True else ""


def _digest(model: ModelRecord | None) -> str:
    return model.digest if model else ""


def marked(switches: Sequence[Switch], alpha: float) -> list[Switch]:
    """With ``*`` where the interval excludes 0, and ``**`` where it is beyond 0 after correction, too."""
    tested = [place for place, switch in enumerate(switches) if switch.difference.p is not None]
    adjusted = dict(zip(tested, holm([switches[place].difference.p or 0.0 for place in tested]), strict=True))
    return [replace(switch, mark=("**" if adjusted.get(place, 1.0) < alpha else "*")
                    if switch.difference.excludes_zero else "") for place, switch in enumerate(switches)]
