"""A defense that lives outside the repository: a faint checkerboard over published photos."""

from __future__ import annotations

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Budget, ImageSet


@plugin("defense", "halftone", track=("customization", "editing"), acts_on="images", paper="none; an example")
class Halftone:
    """Adds a checkerboard of half the budget to every published photo.

    ``eps``: levels of an 8-bit image.
    """

    eps: float = 8.0

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255:
            raise BenchError(f"defense.eps={self.eps} is out of range; give a number above 0 and up to 255.")

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects, model, ctx):
        return [self._checker(subject.published) for subject in subjects]

    def _checker(self, photos):
        import torch

        rows, columns = torch.meshgrid(*(torch.arange(n) for n in photos.pixels.shape[-2:]), indexing="ij")
        board = ((rows + columns) % 2 * 2 - 1) * int(self.eps // 2)
        return ImageSet((photos.pixels.int() + board).clamp(0, 255).to(torch.uint8), photos.names, photos.captions)
