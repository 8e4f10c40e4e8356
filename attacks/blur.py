"""Gaussian blur: the attacker smooths the photos."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.records import ImageSet, Model

REACH = 4.0
"""The kernel ends at this many standard deviations."""


@plugin("purifier", "blur", track=("customization", "editing"))
class Blur:
    """Convolves every photo with a Gaussian.

    ``sigma``: its standard deviation in pixels, more than 0. It is no kernel size: published scripts pass "kernel size
    5" where sigma is expected, or let a library draw sigma between 0.1 and 2, so their numbers cannot be carried over.
    Beyond the border the photo continues with its edge pixels.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 100:
            raise BenchError(f"purifier.sigma={self.sigma} is out of range; give more than 0 and at most 100 pixels.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        import torch

        smooth = blurred(photos.pixels.double(), self.sigma)
        return replace(photos, pixels=smooth.round().clamp(0, 255).to(torch.uint8))


def blurred(x: Tensor, sigma: float) -> Tensor:
    """``x`` [n, c, h, w] after a Gaussian of standard deviation ``sigma`` pixels, along rows and then columns."""
    from torch.nn.functional import conv2d, pad

    kernel = gaussian(sigma).to(x)
    reach, channels = len(kernel) // 2, x.shape[1]
    x = pad(x, (reach,) * 4, mode="replicate")
    x = conv2d(x, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return conv2d(x, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)


def gaussian(sigma: float) -> Tensor:
    """Weights exp(-d^2 / 2 sigma^2) of whole distances d up to 4 sigma, scaled to sum to 1."""
    import torch

    reach = max(1, math.ceil(REACH * sigma))
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * sigma**2))
    return weights / weights.sum()
