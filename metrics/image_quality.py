"""What protection does to the published photos: PSNR, SSIM and the largest change, measured on the saved files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Budget, CustomizationEvidence, Evidence, ImageSet, Measurement, Row

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context

WINDOW = 11
"""Side of SSIM's Gaussian window (sigma 1.5), the original's."""
SSIM_FACTS = {"window": f"gaussian, {WINDOW} pixels, sigma 1.5", "data_range": 1}


@plugin("metric", "image_quality", track=("customization",),
        paper="Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE TIP 2004")
class ImageQuality:
    """``psnr`` (dB) and ``ssim`` of the protected photos against the originals, and ``linf``, the largest change of any
    channel of any pixel in 0-255 levels. Without values, and so unranked, when a photo exceeds its budget.

    SSIM uses the original's 11-pixel Gaussian window; on 64-pixel photos that is a sixth of the picture.
    """

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over photos with intervals over subjects; ``linf`` is the maximum."""
        if not isinstance(evidence, CustomizationEvidence):
            raise BenchError("image_quality: needs the evidence of a customization cell.")
        linf, psnr, ssim = [], [], []
        for subject in evidence.subjects:
            after, before = evidence.protected[subject.name], subject.published
            linf += _rows(subject.name, after, largest_change(before.pixels, after.pixels).tolist(), "")
            psnr += _rows(subject.name, after, peak_ratio(before.pixels, after.pixels), "identical: PSNR is infinite")
            ssim += _rows(subject.name, after, similarity(before.pixels, after.pixels), f"smaller than {WINDOW} pixels")
        return summarise(linf, psnr, ssim, evidence.budget)


def summarise(linf: list[Row], psnr: list[Row], ssim: list[Row], budget: Budget | None) -> list[Measurement]:
    """The three measurements; all without a value if the largest change exceeds the budget."""
    from bench.measuring import mean_of

    worst = max((row.value or 0.0 for row in linf), default=0.0)
    if budget is not None and worst > budget.eps:
        reason = f"invalid: the largest change is {worst:g} levels, over the budget of {budget.eps:g}"
        return [Measurement(name, None, len(linf), unit, better, reason=reason, rows=tuple(rows))
                for name, unit, better, rows in (("psnr", "dB", True, psnr), ("ssim", "", True, ssim),
                                                 ("linf", "levels", False, linf))]
    return [
        mean_of("psnr", psnr, "dB", True, {"peak": 255}),
        mean_of("ssim", ssim, "", True, SSIM_FACTS),
        Measurement("linf", worst, len(linf), "levels", False, protocol={"measured": "maximum"}, rows=tuple(linf)),
    ]


def largest_change(before: Tensor, after: Tensor) -> Tensor:
    """The largest change of each photo, uint8 [n, 3, h, w], in levels: float64 [n]."""
    return (after.int() - before.int()).abs().flatten(1).amax(1).double()


def peak_ratio(before: Tensor, after: Tensor) -> list[float | None]:
    """PSNR = 10 log10(255^2 / MSE) of each photo in dB, None where nothing changed."""
    import math

    errors = (after.double() - before.double()).square().flatten(1).mean(1).tolist()
    return [10 * math.log10(255**2 / error) if error else None for error in errors]


def similarity(before: Tensor, after: Tensor) -> list[float | None]:
    """SSIM of each photo, None where the window is larger than the photo."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    from bench.diffusion.images import to_unit

    if min(before.shape[2:]) < WINDOW:
        return [None] * len(before)
    values = structural_similarity_index_measure(
        to_unit(after), to_unit(before), gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none")
    found: list[float | None] = list(values.tolist())  # type: ignore[union-attr]
    return found


def _rows(subject: str, photos: ImageSet, values: list[float | None] | list[float], reason: str) -> list[Row]:
    return [Row(f"{subject}/{name}", subject, value, "" if value is not None else reason)
            for name, value in zip(photos.names, values, strict=True)]
