"""Intervals and comparisons over units of statistics: subjects, or implanted models, never single images.

An interval is the mean ± t times its clustered standard error. For a mean the bootstrap over whole units has that
error in closed form, up to the factor k / (k - 1) that it lacks; its percentiles with 8 units cover 88 % instead of
95 %, Student's t with k - 1 degrees of freedom covers what it says. Where units were met with several seeds, and the
seeds move them together more than chance would, both are clusters. Ranks are resampled: units and seeds, jointly for
all lines, by draws that are made once, so that everything here is deterministic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
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
POWER = 0.8
"""How surely a difference that the power note names would have been found."""
TOGETHER = 0.01
"""p below which seeds are taken to move all units together. They should not, for stages draw anew for every unit and
seed; so this guards against what is plain to see. To add the seeds' variance untested would double the width with two
seeds, and a false alarm makes it five times as wide. What may be missed with two or three seeds, an effect as large as
the units' own, leaves a coverage of 83 %."""
ROUNDING = 1e-12
"""Spread, relative to the values, that is no more than the rounding of sums."""

Key = tuple[str, str, str]
"""Unit, seed and name of a sample."""


@dataclass(frozen=True)
class Point:
    """One sample. ``unit``: the cluster it belongs to; ``sample``: what to match it by, within unit and ``seed``;
    ``seed``: of a run that met several units, "" where each unit has a seed of its own."""

    unit: str
    sample: str
    value: float
    seed: str = ""


@dataclass(frozen=True, eq=False)
class Layout:
    """What samples belong to. ``cells``: the pairs of unit and seed that there are, as places in ``units`` and
    ``seeds``; ``members``: of each cell the places of its samples. One object for equal ``keys``."""

    keys: tuple[Key, ...]
    units: tuple[str, ...]
    seeds: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]
    members: tuple[tuple[int, ...], ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.members))

    @cached_property
    def places(self) -> dict[Key, int]:
        return {key: place for place, key in enumerate(self.keys)}


@dataclass(frozen=True, eq=False)
class Tally:
    """The values of samples, in the order of a layout."""

    layout: Layout
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def sums(self) -> tuple[float, ...]:
        """By cell. fsum is exact, so the order of samples changes no bit."""
        return tuple(math.fsum([self.values[place] for place in of]) for of in self.layout.members)


Sampled = Tally | Sequence[Point]


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
    """The mean paired difference, a minus b. ``p``: two-sided t test that it is 0; ``error``: its standard error, with
    ``freedom`` degrees of freedom. ``n``, ``units``: what could be matched."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    units: int
    p: float | None = None
    error: float | None = None
    freedom: float | None = None
    reason: str = ""

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Spread:
    """The standard error of a mean, and its degrees of freedom."""

    error: float
    freedom: float


@dataclass(frozen=True)
class Placing:
    """The rank of a line when units and seeds are resampled: ``first``: the share of draws in which it comes first, a
    tie being shared; ``mean`` rank; ``low`` and ``high``: the ranks between which it is in 95 % of draws."""

    first: float
    mean: float
    low: int
    high: int


# Samples


@lru_cache(4096)
def layout_of(keys: tuple[Key, ...]) -> Layout:
    units, seeds = (sorted({key[part] for key in keys}) for part in (0, 1))
    places = ({name: i for i, name in enumerate(names)} for names in (units, seeds))
    unit_at, seed_at = places
    members: dict[tuple[int, int], list[int]] = {}
    for place, (unit, seed, _) in enumerate(keys):
        members.setdefault((unit_at[unit], seed_at[seed]), []).append(place)
    cells = sorted(members)
    return Layout(keys, tuple(units), tuple(seeds), tuple(cells), tuple(tuple(members[cell]) for cell in cells))


def tally(points: Sampled) -> Tally:
    if isinstance(points, Tally):
        return points
    return Tally(layout_of(tuple((p.unit, p.seed, p.sample) for p in points)), tuple(p.value for p in points))


def matched(a: Tally, b: Tally) -> tuple[Tally, Tally]:
    """Both, of the samples that both have."""
    if a.layout is b.layout:
        return a, b
    other = b.layout.places
    both = [(place, other[key]) for key, place in a.layout.places.items() if key in other]
    layout = layout_of(tuple(a.layout.keys[place] for place, _ in both))
    return (Tally(layout, tuple(a.values[place] for place, _ in both)),
            Tally(layout, tuple(b.values[place] for _, place in both)))


# Intervals


def mean_interval(points: Sampled, share: bool = False) -> Estimate:
    """The mean over samples, and its t interval over clusters.

    ``share``: the values are shares, so the interval stays within 0 and 1; of hits (0 or 1) it is Wilson's, with the
    number of samples that independent ones would need for the same error, so that twenty hits in twenty are no
    certainty.
    """
    of = tally(points)
    if not of.values:
        return Estimate(None, None, None, 0, 0, "no values")
    n, units = len(of), len(of.layout.units)
    value = math.fsum(of.values) / n
    if units < FEWEST:
        return Estimate(value, None, None, n, units, too_few(units))
    found = spread(of.layout, of.sums, value, max(map(abs, of.sums)))
    if share and set(of.values) <= {0.0, 1.0}:
        return Estimate(value, *clustered_wilson(round(sum(of.values)), n, units, found), n, units)
    half = t_point(found.freedom) * found.error
    low, high = value - half, value + half
    if share:
        low, high = max(low, min(0.0, value)), min(high, max(1.0, value))
    return Estimate(value, low, high, n, units)


def spread(layout: Layout, sums: Sequence[float], mean: float, scale: float) -> Spread:
    """Of the mean over all samples, from the ``sums`` of the layout's cells. ``scale``: of the sums that rounding acted
    on.

    One way: units are independent, whatever happens within one. With S units and T seeds, the variance is that of
    two crossed random effects, (MS_units + MS_seeds - MS_both) / n with Satterthwaite's degrees of freedom, where the
    seeds' mean square passes the F test against MS_both at ``TOGETHER``, and MS_units / n where it does not.
    """
    n, s, t = len(layout.keys), len(layout.units), len(layout.seeds)
    by_unit, by_seed, squares = [0.0] * s, [0.0] * t, 0.0
    for (unit, seed), total, count in zip(layout.cells, sums, layout.counts, strict=True):
        off = total - mean * count
        if abs(off) > ROUNDING * scale:
            by_unit[unit] += off
            by_seed[seed] += off
            squares += off * off
    of_units, of_seeds = (math.fsum(x * x for x in of) for of in (by_unit, by_seed))
    units = s / (s - 1) * of_units / n**2
    if t == 1:
        return Spread(math.sqrt(units), s - 1)
    seeds = t / (t - 1) * of_seeds / n**2
    left = squares - of_units / t - of_seeds / s
    both = s * t / ((s - 1) * (t - 1)) * left / n**2 if left > ROUNDING * squares else 0.0
    if not seeds_matter(seeds, both, s, t):
        return Spread(math.sqrt(units), s - 1)
    variance = units + seeds - both
    parts = units**2 / (s - 1) + seeds**2 / (t - 1) + both**2 / ((s - 1) * (t - 1))
    return Spread(math.sqrt(variance), min(max(variance**2 / parts, min(s, t) - 1), s + t - 2))


def seeds_matter(seeds: float, both: float, s: int, t: int) -> bool:
    from scipy.special import fdtrc

    if seeds <= both:
        return False
    return both == 0 or bool(fdtrc(t - 1, (s - 1) * (t - 1), seeds / both) < TOGETHER)


@cache
def t_point(freedom: float, below: float = (1 + LEVEL) / 2) -> float:
    """The point of Student's t distribution with a share of ``below`` below it."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, below))


def clustered_wilson(hits: int, n: int, units: int, found: Spread) -> tuple[float, float]:
    """Wilson's interval for hits in clusters: with the number of independent samples that would have the same standard
    error, at most ``n``, and Student's t where that is below n (Korn and Graubard 1998 do so for the exact interval).
    Where all samples agree nothing is known of their dependence, and they count as independent."""
    share = hits / n
    alike = share * (1 - share) / found.error**2 if found.error else math.inf
    if hits in (0, n) or units == n or alike >= n:
        return wilson(hits, n)
    return _score_interval(share, alike, t_point(found.freedom))


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
    low, high = _score_interval(hits / n, n, z)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def _score_interval(share: float, n: float, z: float) -> tuple[float, float]:
    spread = z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# Comparisons


def paired_difference(a: Sampled, b: Sampled) -> Difference:
    """The mean of a - b over samples that both have (same unit, seed and sample), with the interval of such a mean."""
    one, other = matched(tally(a), tally(b))
    layout, n, units = one.layout, len(one), len(one.layout.units)
    if not n:
        return Difference(None, None, None, 0, 0, reason="no sample in common")
    sums = [x - y for x, y in zip(one.sums, other.sums, strict=True)]
    value = math.fsum(sums) / n
    if units < FEWEST:
        return Difference(value, None, None, n, units, reason=too_few(units))
    found = spread(layout, sums, value, max(map(abs, (*one.sums, *other.sums))))
    half = t_point(found.freedom) * found.error
    return Difference(value, value - half, value + half, n, units, p_value(value, found, units), found.error,
                      found.freedom)


def p_value(mean: float, found: Spread, units: int) -> float:
    """Two-sided, of the hypothesis that the mean is 0. Without any spread the t test says nothing: then it is that of
    the signs, 2 / 2^units where all are alike."""
    from scipy.special import stdtr

    if found.error == 0:
        return 1.0 if mean == 0 else 2.0 ** (1 - units)
    return float(2 * stdtr(found.freedom, -abs(mean) / found.error))


def detectable(difference: Difference, level: float) -> float | None:
    """The smallest difference that a two-sided t test at ``level`` would have found with 80 % power, given the spread
    that was observed."""
    if difference.error is None or difference.freedom is None:
        return None
    return _shift(difference.freedom, level) * difference.error


@cache
def _shift(freedom: float, level: float) -> float:
    """How many standard errors a mean must lie from 0: the noncentral t's parameter."""
    from scipy.special import nctdtrinc

    return float(nctdtrinc(freedom, 1 - POWER, t_point(freedom, 1 - level / 2)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def placings(rows: Mapping[str, Sampled], lower_is_better: bool, resamples: int = RESAMPLES) -> dict[str, Placing]:
    """The rank of each of ``rows`` when the units and the seeds that all of them have are resampled, together for all.
    Empty with fewer than 3 common units."""
    import numpy as np

    tallies = {name: tally(points) for name, points in rows.items()}
    totals, counts, layout = _common(list(tallies.values()))
    if layout is None or len(layout.units) < FEWEST:
        return {}
    drawn = _drawn(layout, totals, counts, resamples) * (1 if lower_is_better else -1)
    ranks = _ranks(drawn)
    best = ranks == 1
    shares = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    low, high = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="inverted_cdf")
    return {name: Placing(float(first), float(mean), int(at), int(to))
            for name, first, mean, at, to in zip(rows, shares, ranks.mean(axis=0), low, high, strict=True)}


def _common(tallies: Sequence[Tally]) -> tuple[NDArray[np.float64], NDArray[np.float64], Layout | None]:
    """Sums and counts of each tally in the pairs of unit and seed that all have, and a layout of these pairs."""
    import numpy as np

    tables = [{(of.layout.units[u], of.layout.seeds[s]): (total, count) for (u, s), total, count
               in zip(of.layout.cells, of.sums, of.layout.counts, strict=True)} for of in tallies]
    pairs = sorted(set.intersection(*map(set, tables))) if tables else []
    if not pairs:
        return np.zeros((0, 0)), np.zeros((0, 0)), None
    found = np.array([[table[pair] for pair in pairs] for table in tables])
    return found[..., 0], found[..., 1], layout_of(tuple((unit, seed, "") for unit, seed in pairs))


def _drawn(
    layout: Layout, totals: NDArray[np.float64], counts: NDArray[np.float64], resamples: int,
) -> NDArray[np.float64]:
    """Resampled means [resamples, rows]. Over units alone they vary too little, by (k - 1) / k, and are widened; with
    seeds resampled, too, they vary rather too much (Owen 2007)."""
    import numpy as np

    k = len(layout.units)
    weights = _weights(k, resamples)[:, [unit for unit, _ in layout.cells]]
    if len(layout.seeds) > 1:
        weights = weights * _other_weights(len(layout.seeds), resamples)[:, [seed for _, seed in layout.cells]]
    whole, sizes = totals.sum(axis=1) / counts.sum(axis=1), weights @ counts.T
    means = np.where(sizes > 0, weights @ totals.T / np.where(sizes > 0, sizes, 1.0), whole)
    widened: NDArray[np.float64] = whole + (means - whole) * (math.sqrt(k / (k - 1)) if len(layout.seeds) == 1 else 1.0)
    return widened


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ranks [draws, rows] from 1, lower scores first; equal ones share the lower rank."""
    import numpy as np

    order = np.argsort(scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=1)
    new = np.ones(scores.shape, bool)
    new[:, 1:] = np.diff(ordered, axis=1) > ROUNDING
    places = np.maximum.accumulate(np.where(new, np.arange(1, scores.shape[1] + 1), 1), axis=1)
    ranks = np.empty_like(places)
    np.put_along_axis(ranks, order, places, axis=1)
    return ranks


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
