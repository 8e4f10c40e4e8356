"""What protection does to the published photos: PSNR, SSIM and the largest change, measured on the saved files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Budget, Evidence, ImageSet, Measurement, Row

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context


@plugin("metric", "image_quality", track=("customization", "editing"),
        paper="Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE TIP 2004")
class ImageQuality:
    """``psnr`` (dB) and ``ssim`` of the protected photos against the originals, and ``linf``, the largest change of any
    channel of any pixel in 0-255 levels. Without values, and so unranked, when a photo exceeds its budget.

    SSIM uses the original's 11-pixel Gaussian window; on 64-pixel photos that is a sixth of the picture.
    """

    def measure(self, evidence: Evidence, ctx: Context) -> list[Measurement]:
        """Means over photos with intervals over subjects; ``linf`` is the maximum."""
        from bench.measuring import photo_pairs, require_photos
        from bench.picture_distance import WINDOW, peak_ratio, similarity

        shown = require_photos(evidence, "image_quality")
        linf, psnr, ssim = [], [], []
        for person, before, after in photo_pairs(shown, "protected"):
            pair = before.pixels, after.pixels
            linf += _rows(person, after, largest_change(*pair).tolist(), "")
            psnr += _rows(person, after, peak_ratio(*pair), "identical: PSNR is infinite")
            ssim += _rows(person, after, similarity(*pair), f"smaller than {WINDOW} pixels")
        return summarise(linf, psnr, ssim, shown.budget)


def summarise(linf: list[Row], psnr: list[Row], ssim: list[Row], budget: Budget | None) -> list[Measurement]:
    """The three measurements; all without a value if the largest change exceeds the budget."""
    from bench.measuring import mean_of
    from bench.picture_distance import SSIM_FACTS

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


def _rows(subject: str, photos: ImageSet, values: list[float | None] | list[float], reason: str) -> list[Row]:
    return [Row(f"{subject}/{name}", subject, value, "" if value is not None else reason)
            for name, value in zip(photos.names, values, strict=True)]
