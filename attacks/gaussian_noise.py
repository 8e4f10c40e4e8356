"""Gaussian noise: the attacker drowns a fine pattern in a random one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from bench.context import Context
    from bench.records import ImageSet, Model


@plugin("purifier", "gaussian_noise", track=("customization", "editing"))
class GaussianNoise:
    """Adds independent normal noise to every channel of every pixel, cuts to the range and rounds to 8 bits.

    ``sigma``: its standard deviation where black is 0 and white is 1; 0.05 is 12.75 levels. A photo's noise depends on
    its name, not on its company.
    """

    sigma: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1:
            raise BenchError(f"purifier.sigma={self.sigma} is out of range; give more than 0 and at most 1.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        import torch

        shape = photos.pixels.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=ctx.generator(name)) for name in photos.names])
        noisy = photos.pixels + 255 * self.sigma * noise
        return replace(photos, pixels=noisy.round().clamp(0, 255).to(torch.uint8))
