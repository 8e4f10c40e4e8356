"""Control: random noise at the same budget as the defense that it stands beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch

    from bench.context import Context
    from bench.records import ImageSet, Model, Subject


@plugin("defense", "noise", track=("customization", "editing"), acts_on="images", control=True)
class SignNoise:
    """Control: every channel of every pixel moves up or down by the whole budget, by a fair coin.

    A protection that does not beat this row has not been shown to do more than add noise. ``eps`` in 0-255 levels;
    an 8-bit file moves by floor(eps), less where it would leave the range of the image.
    """

    eps: float = 16.0

    def __post_init__(self) -> None:
        Budget(self.eps)

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        return [add_sign_noise(s.published, self.eps, ctx.generator(s.name)) for s in subjects]


def add_sign_noise(photos: ImageSet, eps: float, generator: torch.Generator) -> ImageSet:
    """Photos uint8 [n, 3, h, w] plus or minus floor(eps) levels."""
    import torch

    coin = torch.randint(2, photos.pixels.shape, generator=generator, dtype=torch.int32)
    moved = photos.pixels.int() + (2 * coin - 1) * math.floor(eps)
    return replace(photos, pixels=moved.clamp(0, 255).to(torch.uint8))
