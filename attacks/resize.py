"""Down and up: the attacker shrinks the photos and enlarges them again, which no fine pattern survives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.records import ImageSet, Model


@plugin("purifier", "resize", track=("customization", "editing"))
class Resize:
    """Shrinks every photo and brings it back to its size, bicubically and with antialiasing both times.

    ``factor``: of each side, more than 0 and at most 1; 0.25 to 0.5 are usual. The small photo is rounded to 8 bits, as
    its file would be.
    """

    factor: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise BenchError(f"purifier.factor={self.factor} is out of range; give more than 0 and at most 1.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        height, width = photos.pixels.shape[2:]
        small = resized(photos.pixels, max(1, round(self.factor * height)), max(1, round(self.factor * width)))
        return replace(photos, pixels=resized(small, height, width))


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Photos uint8 [n, 3, h, w] at another size, uint8."""
    import torch
    from torch.nn.functional import interpolate

    found = interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)
