"""How intervals of means were made before `bench.stats` made t intervals: percentiles of a bootstrap over units.

Nothing computes a new interval so. Results that were recorded with such intervals can still be checked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from bench.records import Row
from bench.stats import FEWEST, LEVEL, wilson

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 4000


def percentile_interval(rows: Sequence[Row], over_samples: bool, share: bool) -> tuple[float | None, float | None]:
    """The ends for the mean over rows that have a value, None below three units. Whole clusters, or single rows if
    ``over_samples``, were resampled with replacement. ``share``: of hits the interval also covered Wilson's."""
    import numpy as np

    units: dict[str, list[float]] = {}
    for row in rows:
        if row.value is not None:
            units.setdefault(row.sample if over_samples else row.cluster, []).append(row.value)
    if len(units) < FEWEST:
        return None, None
    sums = np.array([math.fsum(units[name]) for name in sorted(units)])
    counts = np.array([float(len(units[name])) for name in sorted(units)])
    weights = _weights(len(units))
    found = np.quantile((weights @ sums) / (weights @ counts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = float(found[0]), float(found[1])
    values = [value for unit in units.values() for value in unit]
    if share and all(value in (0.0, 1.0) for value in values):
        below, above = wilson(round(sum(values)), len(values))
        return min(low, below), max(high, above)
    return low, high


@cache
def _weights(units: int) -> NDArray[np.float64]:
    """How often each unit was drawn: [resamples, units]."""
    import numpy as np

    content = hashlib.sha256(f"units/{units}/{RESAMPLES}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(content[:16], "big")))
    return generator.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)
