"""How sure a rank is: ranks when units and seeds are resampled, jointly for all lines of a board."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from bench.draws import RESAMPLES, other_weights, weights_of
from bench.stats import FEWEST, LEVEL, ROUNDING, Layout, Sampled, Tally, layout_of, tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Placing:
    """The rank of a line when units and seeds are resampled: ``first``: the share of draws in which it comes first, a
    tie being shared; ``mean`` rank; ``low`` and ``high``: the ranks between which it is in 95 % of draws."""

    first: float
    mean: float
    low: int
    high: int


def placings(rows: Mapping[str, Sampled], lower_is_better: bool, resamples: int = RESAMPLES) -> dict[str, Placing]:
    """The rank of each of ``rows`` when the units and the seeds that all of them have are resampled, together for all.
    Empty with fewer than 3 common units."""
    totals, counts, layout = _common([tally(points) for points in rows.values()])
    if layout is None or len(layout.units) < FEWEST:
        return {}
    drawn = _drawn(layout, totals, counts, resamples) * (1 if lower_is_better else -1)
    ranks = _ranks(drawn)
    best = ranks == 1
    shares = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
    low, high = (_rank_at(ranks, share) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {name: Placing(float(first), float(mean), int(at), int(to))
            for name, first, mean, at, to in zip(rows, shares, ranks.mean(axis=0), low, high, strict=True)}


def _rank_at(ranks: Ints, share: float) -> Ints:
    """By row the lowest rank that at least ``share`` of the draws do not exceed."""
    import numpy as np

    place = math.ceil(share * len(ranks)) - 1
    found: Ints = np.partition(ranks, place, axis=0)[place]
    return found


def _common(tallies: Sequence[Tally]) -> tuple[Floats, Floats, Layout | None]:
    """Sums and counts of each tally in the pairs of unit and seed that all have, and a layout of these pairs."""
    import numpy as np

    if len({of.layout for of in tallies}) == 1:
        layout = tallies[0].layout
        return (np.array([of.sums for of in tallies]), np.array([layout.counts] * len(tallies), float),
                layout if layout.keys else None)
    tables = [{(of.layout.units[u], of.layout.seeds[s]): (total, count) for (u, s), total, count
               in zip(of.layout.cells, of.sums, of.layout.counts, strict=True)} for of in tallies]
    pairs = sorted(set.intersection(*map(set, tables))) if tables else []
    if not pairs:
        return np.zeros((0, 0)), np.zeros((0, 0)), None
    found = np.array([[table[pair] for pair in pairs] for table in tables])
    return found[..., 0], found[..., 1], layout_of(tuple((unit, seed, "") for unit, seed in pairs))


def _drawn(layout: Layout, totals: Floats, counts: Floats, resamples: int) -> Floats:
    """Resampled means [resamples, rows]. Over units alone they vary too little, by (k - 1) / k, and are widened; with
    seeds resampled, too, they vary rather too much (Owen 2007)."""
    import numpy as np

    k = len(layout.units)
    weights = _cell_weights(k, len(layout.seeds), layout.cells, resamples)
    whole, sizes = totals.sum(axis=1) / counts.sum(axis=1), weights @ counts.T
    means = np.where(sizes > 0, weights @ totals.T / np.where(sizes > 0, sizes, 1.0), whole)
    widened: Floats = whole + (means - whole) * (math.sqrt(k / (k - 1)) if len(layout.seeds) == 1 else 1.0)
    return widened


def _ranks(scores: Floats) -> Ints:
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


@lru_cache(16)
def _cell_weights(units: int, seeds: int, cells: tuple[tuple[int, int], ...], resamples: int) -> Floats:
    """How often each pair of unit and seed was drawn: [resamples, cells]."""
    weights = weights_of(units, resamples)[:, [unit for unit, _ in cells]]
    return weights if seeds == 1 else weights * other_weights(seeds, resamples)[:, [seed for _, seed in cells]]
