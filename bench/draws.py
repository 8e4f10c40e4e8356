"""Draws with replacement, made once and shared by all that resample: what comes of them is deterministic."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
RESAMPLES = 4000


@cache
def weights_of(units: int, resamples: int) -> Floats:
    """How often each unit was drawn: [resamples, units]."""
    import numpy as np

    drawn = _generator("units", units, resamples).multinomial(units, np.full(units, 1 / units), size=resamples)
    return _shared(drawn)


@cache
def other_weights(units: int, resamples: int) -> Floats:
    """As ``weights_of``, drawn independently of them."""
    import numpy as np

    drawn = _generator("other units", units, resamples).multinomial(units, np.full(units, 1 / units), size=resamples)
    return _shared(drawn)


def _shared(draws: Ints) -> Floats:
    """Draws that many computations use, so that none may change them."""
    import numpy as np

    made = draws.astype(np.float64)
    made.flags.writeable = False
    return made


def percentiles(drawn: Floats, level: float) -> tuple[float, float]:
    """The ends of the middle part, a share of ``level``."""
    import numpy as np

    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _generator(*names: str | int) -> np.random.Generator:
    import numpy as np

    content = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(content[:16], "big")))
