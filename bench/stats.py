"""Intervals and comparisons over units of statistics: subjects, or implanted models, never single images.

Everything is deterministic: data of equally many units are resampled by the same draws, made once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 4000
LEVEL = 0.95
FEWEST = 3
"""Units below which no interval is claimed: two points say nothing about the spread of a population."""
Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""
EXACT = 14
"""Units up to which the sign-flip test goes through all 2^k signs."""


@dataclass(frozen=True)
class Point:
    """One sample. ``unit``: the cluster it belongs to; ``sample``: what to match it by, within the unit."""

    unit: str
    sample: str
    value: float


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` samples of ``units`` units, with its 95 % interval; ``reason``: why there is none."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    units: int
    reason: str = ""


@dataclass(frozen=True)
class Difference:
    """The mean paired difference, a minus b. ``wins``: share of resamplings in which it is below 0; ``p``: two-sided
    sign-flip test over units. ``n``, ``units``: what could be matched."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    units: int
    wins: float | None = None
    p: float | None = None
    reason: str = ""

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(points: Sequence[Point], resamples: int = RESAMPLES, share: bool = False) -> Estimate:
    """The mean over samples, and its percentile interval when whole units are resampled with replacement.

    ``share``: every value is 0 or 1; the interval then also covers Wilson's, so that twenty hits in twenty are no
    certainty.
    """
    if not points:
        return Estimate(None, None, None, 0, 0, "no values")
    sums, counts = _by_unit(points)
    value, units = math.fsum(p.value for p in points) / len(points), len(sums)
    if units < FEWEST:
        return Estimate(value, None, None, len(points), units, too_few(units))
    low, high = _percentiles(_resampled_means(sums, counts, resamples))
    if share and all(p.value in (0.0, 1.0) for p in points):
        below, above = wilson(round(sum(p.value for p in points)), len(points))
        low, high = min(low, below), max(high, above)
    return Estimate(value, low, high, len(points), units)


def auroc(negatives: Sequence[float], positives: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """How often a positive's score exceeds a negative's, ties counting half: the area under the ROC curve.

    Pair i (negative i, positive i) is one unit and is resampled whole; the interval also covers Wilson's for as many
    trials, so that perfect separation of twenty pairs is no certainty.
    """
    import numpy as np

    if len(negatives) != len(positives):
        raise ValueError(f"auroc: {len(negatives)} negatives but {len(positives)} positives; they are pairs")
    if not negatives:
        return Estimate(None, None, None, 0, 0, "no values")
    low, high, n = np.asarray(negatives)[:, None], np.asarray(positives)[None, :], len(negatives)
    won = (high > low) + 0.5 * (high == low)
    value = float(won.mean())
    if n < FEWEST:
        return Estimate(value, None, None, n, n, too_few(n))
    weights = _weights(n, resamples)
    below, above = _percentiles(((weights @ won) * weights).sum(1) / n**2)
    exact = wilson(round(value * n), n)
    return Estimate(value, min(below, exact[0], value), max(above, exact[1], value), n, n)


def auroc_of_groups(negatives: Sequence[float], positives: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """As :func:`auroc`, of two groups that are no pairs: each is resampled by itself, and the interval also covers
    Newcombe's, so that perfect separation is no certainty. ``units``: of both groups together."""
    import numpy as np

    low, high = np.asarray(negatives, float)[:, None], np.asarray(positives, float)[None, :]
    n, units = min(low.size, high.size), low.size + high.size
    if not n:
        return Estimate(None, None, None, units, units, "no positives" if low.size else "no negatives")
    won = (high > low) + 0.5 * (high == low)
    value = float(won.mean())
    if n < FEWEST:
        return Estimate(value, None, None, units, units, too_few(n))
    drawn = ((_weights(low.size, resamples) @ won) * _other_weights(high.size, resamples)).sum(1) / won.size
    below, above = _percentiles(drawn)
    exact = newcombe(value, low.size, high.size)
    return Estimate(value, min(below, exact[0], value), max(above, exact[1], value), units, units)


def newcombe(area: float, negatives: int, positives: int, z: float = Z) -> tuple[float, float]:
    """The interval of an area under a ROC curve by Newcombe (Statistics in Medicine 2006, method 5): a score interval
    with Hanley and McNeil's variance, both group sizes in its exponential terms replaced by their mean."""
    extra = (negatives + positives) / 2 - 1

    def outside(t: float) -> bool:
        terms = 1 + extra * (1 - t) / (2 - t) + extra * t / (1 + t)
        return (area - t) ** 2 > z * z * t * (1 - t) * terms / (negatives * positives)

    return _edge(outside, 0.0, area), _edge(outside, 1.0, area)


def _edge(outside: Callable[[float], bool], out: float, within: float) -> float:
    """Where ``outside`` turns false between two points, by halving."""
    for _ in range(60):
        middle = (out + within) / 2
        out, within = (middle, within) if outside(middle) else (out, middle)
    return within


def too_few(units: int) -> str:
    return f"{units} unit{'s' if units != 1 else ''}: no interval is claimed below {FEWEST}"


def wilson(hits: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), for independent trials."""
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"wilson: {hits} hits in {n} trials")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def paired_difference(a: Sequence[Point], b: Sequence[Point], resamples: int = RESAMPLES) -> Difference:
    """The mean of a - b over samples that both have (same unit, same sample), resampled by unit."""
    other = {(p.unit, p.sample): p.value for p in b}
    matched = [Point(p.unit, p.sample, p.value - other[p.unit, p.sample]) for p in a if (p.unit, p.sample) in other]
    if not matched:
        return Difference(None, None, None, 0, 0, reason="no sample in common")
    sums, counts = _by_unit(matched)
    value, units = math.fsum(p.value for p in matched) / len(matched), len(sums)
    if units < FEWEST:
        return Difference(value, None, None, len(matched), units, reason=too_few(units))
    drawn = _resampled_means(sums, counts, resamples)
    low, high = _percentiles(drawn)
    wins = float((drawn < 0).mean() + (drawn == 0).mean() / 2)
    return Difference(value, low, high, len(matched), units, wins, sign_flip(sums))


def sign_flip(sums: NDArray[np.float64]) -> float:
    """Two-sided p of the hypothesis that each unit's difference was as likely to have the other sign (Fisher 1935).

    Exact up to 14 units: with k units it cannot be below 2 / 2^k, so three units never suffice for 0.05.
    """
    import numpy as np

    totals = np.abs(_signs(len(sums)) @ sums)
    return float((totals >= abs(sums.sum()) * (1 - 1e-12) - 1e-15).mean())


@cache
def _signs(k: int) -> NDArray[np.float64]:
    """All signs of k units, or 20000 draws of them: [draws, k]."""
    import numpy as np

    if k <= EXACT:
        signs = (np.arange(2**k)[:, None] >> np.arange(k)) % 2 * 2 - 1
    else:
        signs = _generator("signs", k).integers(0, 2, (20000, k)) * 2 - 1
        signs[0] = 1  # the data themselves count as one of the draws, so that p is never 0
    return _shared(signs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def share_of_wins(rows: Mapping[str, Sequence[Point]], lower_is_better: bool, resamples: int = RESAMPLES,
                  ) -> dict[str, float]:
    """How often each of ``rows`` comes first when the units that all of them have are resampled together; a tie is
    shared. Empty with fewer than 3 common units."""
    import numpy as np

    tables = {name: _unit_means(points) for name, points in rows.items()}
    common = sorted(set.intersection(*(set(t) for t in tables.values()))) if tables else []
    if len(common) < FEWEST:
        return {}
    values = np.array([[tables[name][unit] for unit in common] for name in rows])
    weights = _weights(len(common), resamples)
    scores = weights @ values.T * (1 if lower_is_better else -1)
    best = np.isclose(scores, scores.min(axis=1, keepdims=True), rtol=0, atol=1e-12)
    shares = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    return {name: float(share) for name, share in zip(rows, shares, strict=True)}


def _unit_means(points: Sequence[Point]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for point in points:
        grouped.setdefault(point.unit, []).append(point.value)
    return {unit: math.fsum(values) / len(values) for unit, values in grouped.items()}


def _by_unit(points: Sequence[Point]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of each unit, in the order of their names, whatever the order of ``points``."""
    import numpy as np

    grouped: dict[str, list[float]] = {}
    for point in points:
        grouped.setdefault(point.unit, []).append(point.value)
    units = sorted(grouped)
    # fsum is exact, so the order of samples changes no bit.
    return (np.array([math.fsum(grouped[u]) for u in units]), np.array([float(len(grouped[u])) for u in units]))


def _resampled_means(sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int) -> NDArray[np.float64]:
    weights = _weights(len(sums), resamples)
    means: NDArray[np.float64] = (weights @ sums) / (weights @ counts)
    return means


@cache
def _weights(units: int, resamples: int) -> NDArray[np.float64]:
    """How often each unit was drawn: [resamples, units]."""
    import numpy as np

    drawn = _generator("units", units, resamples).multinomial(units, np.full(units, 1 / units), size=resamples)
    return _shared(drawn)


@cache
def _other_weights(units: int, resamples: int) -> NDArray[np.float64]:
    """As ``_weights``, drawn independently of them."""
    import numpy as np

    drawn = _generator("other units", units, resamples).multinomial(units, np.full(units, 1 / units), size=resamples)
    return _shared(drawn)


def _shared(draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draws that many computations use, so that none may change them."""
    import numpy as np

    made = draws.astype(np.float64)
    made.flags.writeable = False
    return made


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _generator(*names: str | int) -> np.random.Generator:
    import numpy as np

    content = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(content[:16], "big")))
