"""JPEG: the attacker saves the photos with loss and opens them again.

Against adversarial pictures: Guo et al., "Countering adversarial images using input transformations", ICLR 2018
(arXiv:1711.00117), with quality 75.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.records import ImageSet, Model


@plugin("purifier", "jpeg", track=("customization", "editing"), paper="Guo et al., ICLR 2018, arXiv:1711.00117")
class Jpeg:
    """Saves every photo as JPEG and decodes it again.

    ``quality``: 1 to 95 by Pillow's scale, the one that papers mean; colour is kept at half resolution (4:2:0), as
    photo services do.
    """

    quality: int = 75

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise BenchError(f"purifier.quality={self.quality} is out of range; give 1 to 95.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        import torch

        return replace(photos, pixels=torch.stack([round_trip(photo, self.quality) for photo in photos.pixels]))


def round_trip(photo: Tensor, quality: int) -> Tensor:
    """A photo uint8 [3, h, w] after a JPEG file in memory."""
    from io import BytesIO

    import numpy as np
    import torch
    from PIL import Image

    file = BytesIO()
    Image.fromarray(photo.permute(1, 2, 0).cpu().numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
