"""Kernel inception distance (Binkowski et al., ICLR 2018): unbiased, so it can be used where pictures are few."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from bench.options import require
from bench.plugin import plugin
from bench.records import Evidence, Measurement

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bench.context import Context
    from bench.set_distance import Distance

    Array = NDArray[np.float64]

UNIT = "squared MMD"


@plugin("metric", "kid", track=("customization", "editing", "backdoor"),
        paper="Binkowski et al., Demystifying MMD GANs, ICLR 2018")
class Kid:
    """Unbiased squared MMD of features with the kernel (x.y / d + 1)^3, over all pairs: customization, generated
    pictures to real photos (sets A and C); editing, edited pictures to benign edits, over pairs of different photos
    only, for a picture and its counterpart from the same seed are no independent draws; backdoor, plain samples to real
    images, with ``kid_rise`` over the clean model's samples from the same seeds.

    ``extractor``: micro-clip, inception, or the folder of a CLIPModel. ``limit``: most pictures a side, for memory.
    ``draws``: of the bootstrap.
    """

    extractor: str = "micro-clip"
    draws: int = 200
    limit: int = 5_000

    def __post_init__(self) -> None:
        for name, low in (("draws", 1), ("limit", 2)):
            require(name, getattr(self, name), low, where="metrics.kid")

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """``kid``, and on the backdoor track ``kid_rise``; intervals over people, or over pictures on one model."""
        from bench.features import extractor
        from bench.set_distance import measure_sets, missing, sets_of

        extract = extractor(self.extractor, ctx.device)
        sets = sets_of(evidence, extract, self.limit)
        facts = {**extract.facts, "kernel": "(x.y/d + 1)^3"}
        if min(len(sets.generated), len(sets.real)) < 2:
            return missing("kid", sets, UNIT, facts, "each side needs at least 2 pictures")
        if not sets.matched:
            return measure_sets("kid", sets, prepare, UNIT, facts, self.draws, ctx.seed("bootstrap"))
        if len(set(sets.of_generated)) < 2:
            return missing("kid", sets, UNIT, facts, "needs pictures of at least 2 photos")
        facts = {**facts, "pairs": "of different photos"}
        made = partial(prepare_matched, sets.of_generated)
        return measure_sets("kid", sets, made, UNIT, facts, self.draws, ctx.seed("bootstrap"))


def prepare(generated: Array, real: Array) -> Distance:
    """The distance of two sets of features [n, d], [m, d] as a function of the pictures' weights."""
    inner_a, inner_b, across = kernel(generated, generated), kernel(real, real), kernel(generated, real)

    def distance(w: Array, v: Array) -> float:
        return pairs(inner_a, w) + pairs(inner_b, v) - 2 * float(w @ across @ v / (w.sum() * v.sum()))

    return distance


def prepare_matched(owners: Sequence[str], generated: Array, real: Array) -> Distance:
    """As ``prepare``, of two sets [n, d] whose pictures i both come of photo ``owners[i]`` and weigh the same: only
    pairs of different photos count, within and across. 0 where both sets are the same."""
    import numpy as np

    names = np.array(owners)
    apart = (names[:, None] != names[None, :]).astype(np.float64)
    across = kernel(generated, real)
    joint = (kernel(generated, generated) + kernel(real, real) - across - across.T) * apart

    def distance(w: Array, _: Array) -> float:
        total = float(w @ apart @ w)
        return float(w @ joint @ w) / total if total > 0 else float("nan")

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
