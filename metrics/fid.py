"""Frechet inception distance (Heusel et al., NeurIPS 2017), on the features of a stated extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.options import require
from bench.plugin import plugin
from bench.records import EditingEvidence, Evidence, Measurement

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bench.context import Context
    from bench.set_distance import Distance, Sets

    Array = NDArray[np.float64]

UNIT = "squared feature distance"


@plugin("metric", "fid", track=("customization", "backdoor"),
        paper="Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017")
class Fid:
    """Frechet distance of features: customization, generated pictures to real photos (sets A and C); backdoor, plain
    samples to real images, with ``fid_rise`` over the clean model's samples from the same seeds.

    ``extractor``: micro-clip, inception, or the folder of a CLIPModel. ``components``: only the leading principal
    components of the real features, 0 for all dimensions. There is no value unless both sets have more pictures than
    dimensions: below that the covariances are singular and the number is mostly bias. ``draws``: of the bootstrap.
    Values with different extractors, components or counts must not be compared.
    """

    extractor: str = "micro-clip"
    components: int = 0
    draws: int = 200
    limit: int = 50_000

    def __post_init__(self) -> None:
        for name, low in (("components", 0), ("draws", 1), ("limit", 2)):
            require(name, getattr(self, name), low, where="metrics.fid")

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """``fid``, and on the backdoor track ``fid_rise``; intervals over people, or over pictures on one model."""
        from bench.features import extractor
        from bench.set_distance import measure_sets, missing, sets_of

        if isinstance(evidence, EditingEvidence):
            raise BenchError("fid: needs the evidence of a customization or of a backdoor cell.")
        extract = extractor(self.extractor, ctx.device)
        sets = sets_of(evidence, extract, self.limit)
        facts: dict[str, Any] = {**extract.facts, "components": self.components}
        if reason := self._too_few(sets):
            return missing("fid", sets, UNIT, facts, reason)
        return measure_sets("fid", sets, self.prepare, UNIT, facts, self.draws, ctx.seed("bootstrap"), floor=0)

    def prepare(self, generated: Array, real: Array) -> Distance:
        """The distance of two sets of features as a function of the pictures' weights."""
        if self.components:
            axes = principal_axes(real, self.components)
            generated, real = generated @ axes, real @ axes
        return lambda w, v: frechet(*moments(generated, w), *moments(real, v))

    def _too_few(self, sets: Sets) -> str:
        width = sets.real.shape[1]
        if not 0 <= self.components <= width:
            raise BenchError(f"fid: components={self.components} is out of range; {self.extractor} has {width} "
                             f"(0 for all).")
        dimensions, n, m = self.components or width, len(sets.generated), len(sets.real)
        if min(n, m) > dimensions:
            return ""
        return (f"{n} generated and {m} real pictures do not span {dimensions} feature dimensions; more than "
                f"{dimensions} of each are needed (see kid, or lower fid.components)")


def moments(features: Array, weights: Array) -> tuple[Array, Array]:
    """Mean [d] and unbiased covariance [d, d] of features [n, d], row i counted ``weights[i]`` times."""
    total = weights.sum()
    mean = weights @ features / total
    centred = features - mean
    covariance = (weights[:, None] * centred).T @ centred / (total - 1)
    return mean, covariance


def frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. eq. 6.

    The trace of the square root is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric, so its eigenvalues
    are real and no complex part has to be thrown away.
    """
    import numpy as np

    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)
    offset = mean_a - mean_b
    distance = offset @ offset + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(inner).sum()
    return max(0.0, float(distance))  # rounding can leave -1e-14


def principal_axes(features: Array, count: int) -> Array:
    """The ``count`` leading principal axes of features [n, d], as columns [d, count]."""
    import numpy as np

    _, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
    return vectors[:, ::-1][:, :count]
