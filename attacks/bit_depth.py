"""Bit depth: the attacker keeps few levels of every channel.

Xu et al., "Feature squeezing", NDSS 2018 (arXiv:1704.01155); 3 bits as in Guo et al., ICLR 2018 (arXiv:1711.00117).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from bench.context import Context
    from bench.records import ImageSet, Model


@plugin("purifier", "bit_depth", track=("customization", "editing"), paper="Feature squeezing, arXiv:1704.01155")
class BitDepth:
    """Rounds every channel to the nearest of 2^``bits`` evenly spaced levels, black and white among them.

    ``bits``: 1 to 8; 8 changes nothing.
    """

    bits: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise BenchError(f"purifier.bits={self.bits} is out of range; give 1 to 8.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        import torch

        top = 2**self.bits - 1
        coarse = (photos.pixels.double() / 255 * top).round() / top
        return replace(photos, pixels=(coarse * 255).round().to(torch.uint8))
