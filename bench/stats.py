"""Intervals and comparisons over units of statistics: subjects, or implanted models, never single images.

An interval is the mean ± t times its clustered standard error. For a mean the bootstrap over whole units has that
error in closed form, up to the factor k / (k - 1) that it lacks; its percentiles with 8 units cover 88 % instead of
95 %, Student's t with k - 1 degrees of freedom covers what it says. Where units were met with several seeds, and the
seeds move them together more than chance would, both are clusters. Everything here is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from operator import gt
from typing import TYPE_CHECKING, TypeVar

from bench.draws import RESAMPLES, other_weights, percentiles, weights_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Places = NDArray[np.intp]
T = TypeVar("T")
LEVEL, ALPHA = 0.95, 0.05
"""Of intervals, and of tests."""
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
    def sampled(self) -> bool:
        """Whether these are samples with names, not one value for each seed."""
        return any(name for _, _, name in self.keys)

    @cached_property
    def places(self) -> dict[Key, int]:
        return {key: place for place, key in enumerate(self.keys)}

    @cached_property
    def by_unit(self) -> tuple[Places, Places]:
        """An order of the cells in which those of a unit stand together, and where each unit starts in it."""
        return _grouped([unit for unit, _ in self.cells])

    @cached_property
    def by_seed(self) -> tuple[Places, Places]:
        """The same by seed."""
        return _grouped([seed for _, seed in self.cells])


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
        values = self.values
        return tuple([math.fsum([values[place] for place in of]) for of in self.layout.members])

    def at(self, layout: Layout, places: Sequence[int]) -> Tally:
        """The values at ``places``, which are those of ``layout``."""
        return self if layout is self.layout else Tally(layout, tuple([self.values[place] for place in places]))


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
        """Whether the interval does. One without any width says that all units agree, which few units do by chance."""
        outside = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return outside and (self.error != 0 or self.p is None or self.p < ALPHA)


@dataclass(frozen=True)
class Spread:
    """The standard error of a mean, and its degrees of freedom."""

    error: float
    freedom: float


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
    layout, of_a, of_b = _shared_places(a.layout, b.layout)
    return a.at(layout, of_a), b.at(layout, of_b)


@lru_cache(4096)
def _shared_places(a: Layout, b: Layout) -> tuple[Layout, tuple[int, ...], tuple[int, ...]]:
    """The layout of the keys that both have, in a's order, and where these stand in each."""
    if a is b:
        return a, (), ()
    of_a = tuple(place for key, place in a.places.items() if key in b.places)
    keys = tuple(a.keys[place] for place in of_a)
    return a if keys == a.keys else layout_of(keys), of_a, tuple(b.places[key] for key in keys)


def by_layout(layouts: Sequence[Layout], make: Callable[[Layout, list[int]], Iterable[T]]) -> list[T]:
    """What ``make`` gives for each place in ``layouts``; it is asked once for all places of one layout."""
    places: dict[Layout, list[int]] = {}
    for place, layout in enumerate(layouts):
        places.setdefault(layout, []).append(place)
    made = {place: one for layout, of in places.items() for place, one in zip(of, make(layout, of), strict=True)}
    return [made[place] for place in range(len(layouts))]


def _grouped(names: Sequence[int]) -> tuple[Places, Places]:
    import numpy as np

    order = np.argsort(names, kind="stable")
    return order, np.searchsorted(np.asarray(names)[order], np.arange(max(names) + 1))


# Intervals


def mean_interval(points: Sampled, share: bool = False) -> Estimate:
    """The mean over samples, and its t interval over clusters.

    ``share``: the values are shares, so the interval stays within 0 and 1; of hits (0 or 1) it is Wilson's, with the
    number of samples that independent ones would need for the same error, so that twenty hits in twenty are no
    certainty.
    """
    return mean_intervals([(tally(points), share)])[0]


def mean_intervals(asked: Sequence[tuple[Tally, bool]]) -> list[Estimate]:
    """As :func:`mean_interval`, of many; those of one layout are computed together."""
    return by_layout([of.layout for of, _ in asked], lambda layout, at: _means(layout, [asked[i] for i in at]))


def _means(layout: Layout, asked: Sequence[tuple[Tally, bool]]) -> Iterator[Estimate]:
    import numpy as np

    n, units = len(layout.keys), len(layout.units)
    if not n:
        yield from (Estimate(None, None, None, 0, 0, "no values") for _ in asked)
        return
    values = [math.fsum(of.values) / n for of, _ in asked]
    if units < FEWEST:
        yield from (Estimate(value, None, None, n, units, too_few(units)) for value in values)
        return
    sums = np.array([of.sums for of, _ in asked])
    for (of, share), value, found in zip(asked, values, spreads(layout, sums, values, np.abs(sums).max(axis=1)),
                                         strict=True):
        if share and set(of.values) <= {0.0, 1.0}:
            low, high = clustered_wilson(round(sum(of.values)), n, units, found)
        else:
            low, high = t_interval(value, found, 0.0, 1.0) if share else t_interval(value, found)
        yield Estimate(value, low, high, n, units)


def t_interval(value: float, found: Spread, least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
    """Within what is possible, ``least`` to ``most``, unless the value itself is not."""
    half = t_point(found.freedom) * found.error
    return max(value - half, min(least, value)), min(value + half, max(most, value))


def spreads(layout: Layout, sums: Floats, means: Sequence[float], scales: Floats) -> list[Spread]:
    """Of means over all samples of one layout, from the ``sums`` [means, cells]. ``scales``: of the sums that rounding
    acted on.

    One way: units are independent, whatever happens within one. With S units and T seeds, the variance is that of
    two crossed random effects, (MS_units + MS_seeds - MS_both) / n with Satterthwaite's degrees of freedom, where the
    seeds' mean square passes the F test against MS_both at ``TOGETHER``, and MS_units / n where it does not.
    """
    import numpy as np

    n, s, t = len(layout.keys), len(layout.units), len(layout.seeds)
    off = sums - np.outer(means, layout.counts)
    off[np.abs(off) <= ROUNDING * scales[:, None]] = 0.0
    of_units, of_seeds = ((np.add.reduceat(off[:, order], starts, axis=1) ** 2).sum(axis=1)
                          for order, starts in (layout.by_unit, layout.by_seed))
    units = s / (s - 1) * of_units / n**2
    if t == 1:
        return [Spread(math.sqrt(one), s - 1) for one in units.tolist()]
    seeds = t / (t - 1) * of_seeds / n**2
    squares = (off**2).sum(axis=1)
    left = squares - of_units / t - of_seeds / s
    both = np.where(left > ROUNDING * squares, s * t / ((s - 1) * (t - 1)) * left / n**2, 0.0)
    return [_crossed(*of, s, t) for of in zip(
        seeds_matter(seeds, both, s, t).tolist(), units.tolist(), seeds.tolist(), both.tolist(), strict=True)]


def _crossed(matter: bool, units: float, seeds: float, both: float, s: int, t: int) -> Spread:
    """From the parts of the variance, with S units and T seeds; ``matter``: whether these do."""
    if not matter:
        return Spread(math.sqrt(units), s - 1)
    variance = units + seeds - both
    parts = units**2 / (s - 1) + seeds**2 / (t - 1) + both**2 / ((s - 1) * (t - 1))
    return Spread(math.sqrt(variance), min(max(variance**2 / parts, min(s, t) - 1), s + t - 2))


def seeds_matter(seeds: Floats, both: Floats, s: int, t: int) -> NDArray[np.bool_]:
    """Of many pairs of mean squares, whether the seeds' passes the F test against what is left."""
    import numpy as np
    from scipy.special import fdtrc

    ratios = np.divide(seeds, both, out=np.zeros_like(seeds), where=both > 0)
    found: NDArray[np.bool_] = (both == 0) | (fdtrc(t - 1, (s - 1) * (t - 1), ratios) < TOGETHER)
    return (seeds > both) & found


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
    weights = weights_of(n, resamples)
    below, above = percentiles(((weights @ won) * weights).sum(1) / n**2, LEVEL)
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
    drawn = ((weights_of(low.size, resamples) @ won) * other_weights(high.size, resamples)).sum(1) / won.size
    below, above = percentiles(drawn, LEVEL)
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


def paired_difference(a: Sampled, b: Sampled, share: bool = False) -> Difference:
    """The mean of a - b over samples that both have (same unit, seed and sample), with the interval of such a mean.

    ``share``: the values are shares, so the interval stays within -1 and 1; of hits (0 or 1) its standard error is at
    least what independent samples would have, so that three models that agree in all samples are no certainty.
    """
    return paired_differences([(tally(a), tally(b), share)])[0]


def paired_differences(pairs: Sequence[tuple[Tally, Tally, bool]]) -> list[Difference]:
    """As :func:`paired_difference`, of many; those of one layout are computed together."""
    both = [(*matched(a, b), share) for a, b, share in pairs]
    return by_layout([one.layout for one, _, _ in both],
                     lambda layout, at: _differences(layout, [both[i] for i in at]))


def _differences(layout: Layout, pairs: Sequence[tuple[Tally, Tally, bool]]) -> Iterator[Difference]:
    import numpy as np

    n, units = len(layout.keys), len(layout.units)
    if not n:
        yield from (Difference(None, None, None, 0, 0, reason="no sample in common") for _ in pairs)
        return
    a, b = (np.array([of.sums for of in side]) for side in ([one for one, _, _ in pairs], [one for _, one, _ in pairs]))
    values = [math.fsum(of) / n for of in (a - b).tolist()]
    if units < FEWEST:
        yield from (Difference(value, None, None, n, units, reason=too_few(units)) for value in values)
        return
    scales = np.maximum(np.abs(a).max(axis=1), np.abs(b).max(axis=1))
    found = [at_least_independent(one, *pair) for one, pair in
             zip(spreads(layout, a - b, values, scales), pairs, strict=True)]
    for value, spread, p, (_, _, share) in zip(values, found, p_values(values, found, units), pairs, strict=True):
        low, high = t_interval(value, spread, -1.0, 1.0) if share else t_interval(value, spread)
        yield Difference(value, low, high, n, units, p, spread.error, spread.freedom)


def at_least_independent(found: Spread, a: Tally, b: Tally, share: bool) -> Spread:
    """Of hits, with no smaller error than :func:`matched_error`."""
    if not share or not {*a.values, *b.values} <= {0.0, 1.0}:
        return found
    more, fewer = (sum(map(gt, *of)) for of in ((a.values, b.values), (b.values, a.values)))
    return replace(found, error=max(found.error, matched_error(more, fewer, len(a))))


def matched_error(more: int, fewer: int, n: int) -> float:
    """The standard error of a difference of shares over ``n`` matched samples, independent ones, of which ``more`` hit
    in the first alone and ``fewer`` in the second alone; half a sample is added to each of the four kinds of pairs
    (Agresti and Min 2005), so it is never 0."""
    total, both, apart = n + 2, more + fewer + 1, more - fewer
    return math.sqrt(both - apart**2 / total) / total


def p_values(means: Sequence[float], found: Sequence[Spread], units: int) -> list[float]:
    """Two-sided, of the hypothesis that each mean is 0. Without any spread the t test says nothing: then it is that of
    the signs, 2 / 2^units where all are alike."""
    import numpy as np
    from scipy.special import stdtr

    sizes, errors = np.abs(means), np.array([spread.error for spread in found])
    tails = stdtr([spread.freedom for spread in found], -sizes / np.where(errors > 0, errors, 1.0))
    alike = np.where(sizes == 0, 1.0, 2.0 ** (1 - units))
    p: list[float] = np.where(errors > 0, 2 * tails, alike).tolist()
    return p


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
