"""Kernel inception distance (Binkowski et al., ICLR 2018): unbiased, so it can be used where pictures are few."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Evidence, Measurement

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bench.context import Context
    from bench.set_distance import Distance

    Array = NDArray[np.float64]

UNIT = "squared MMD"


@plugin("metric", "kid", track=("customization", "backdoor"),
        paper="Binkowski et al., Demystifying MMD GANs, ICLR 2018")
class Kid:
    """Unbiased squared MMD of features with the kernel (x.y / d + 1)^3, over all pairs: customization, generated
    pictures to real photos (sets A and C); backdoor, plain samples to real images, with ``kid_rise`` over the clean
    model's samples from the same seeds.

    ``extractor``: micro-clip, inception, or the folder of a CLIPModel. ``limit``: most pictures a side, for memory.
    ``draws``: of the bootstrap.
    """

    extractor: str = "micro-clip"
    draws: int = 200
    limit: int = 5_000

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """``kid``, and on the backdoor track ``kid_rise``; intervals over people, or over pictures on one model."""
        from bench.features import extractor
        from bench.set_distance import measure_sets, missing, sets_of

        extract = extractor(self.extractor, ctx.device)
        sets = sets_of(evidence, extract, self.limit)
        facts = {**extract.facts, "kernel": "(x.y/d + 1)^3"}
        if min(len(sets.generated), len(sets.real)) < 2:
            return missing("kid", sets, UNIT, facts, "each side needs at least 2 pictures")
        return measure_sets("kid", sets, prepare, UNIT, facts, self.draws, ctx.seed("bootstrap"))


def prepare(generated: Array, real: Array) -> Distance:
    """The distance of two sets of features [n, d], [m, d] as a function of the pictures' weights."""
    inner_a, inner_b, across = kernel(generated, generated), kernel(real, real), kernel(generated, real)

    def distance(w: Array, v: Array) -> float:
        return pairs(inner_a, w) + pairs(inner_b, v) - 2 * float(w @ across @ v / (w.sum() * v.sum()))

    return distance


def kernel(a: Array, b: Array) -> Array:
    """(x.y / d + 1)^3 of every row of a [n, d] with every row of b [m, d]: [n, m]."""
    values: Array = (a @ b.T / a.shape[1] + 1) ** 3
    return values


def pairs(inner: Array, w: Array) -> float:
    """The mean of ``inner`` [n, n] over pairs of different pictures, a pair counted w_i w_j times.

    Leaving out i = j is what makes the estimate unbiased; a picture drawn twice in a bootstrap is no pair either.
    NaN where only one picture is left.
    """
    import numpy as np

    own = w * w
    total = w.sum() ** 2 - own.sum()
    return float((w @ inner @ w - own @ np.diag(inner)) / total) if total > 0 else float("nan")
