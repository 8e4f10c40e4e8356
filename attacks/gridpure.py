"""GrIDPure: many light purifications of small overlapping windows instead of one strong one of the whole photo.

Zhao et al., "Can protective perturbation safeguard personal data from being exploited by Stable Diffusion?", CVPR 2024
(arXiv:2312.00084). Written from the paper and from facts about the released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.regeneration import Regenerator
    from bench.records import ImageSet, Model

STEP = 8
"""Windows are multiples of this many pixels, the factor of Stable Diffusion's autoencoder."""


@plugin(
    "purifier", "gridpure", track=("customization", "editing"), needs=("text_to_image", "text_encoder"),
    paper="GrIDPure, CVPR 2024, arXiv:2312.00084", official_code="https://github.com/ZhengyueZhao/GrIDPure",
)
class GridPure:
    """Repeats: noise and denoise every window lightly, average where windows overlap, blend with the photo before.

    x_{i+1} = (1 - ``gamma``) * purified(x_i) + ``gamma`` * x_i, ``iterations`` times. ``window``, ``stride``: in
    pixels; a window is cut to the photo's side, and the last of a row ends at the border. A further window is made of
    the photo's four corners, which otherwise only one window would cover. ``strength``: share of the chain that is
    added as noise each time (published: 10 of 1000 steps). ``steps``: sampler steps of a whole chain; each time takes
    its share of them, at least one (published: all 10). ``prompt``: what the model is told that it sees. A photo's
    noise depends on its name, not on its company.

    Deviations: the released code denoises pixels with an unconditional ImageNet model, ancestrally. Here every window
    passes the attacked model's autoencoder each time, encoded to the mean, and the sampler is DDIM without noise. So
    every iteration costs detail that it would not cost there, above all with small windows. Photos stay floats between
    the iterations.
    """

    window: int = 256
    stride: int = 128
    strength: float = 0.01
    steps: int = 1000
    iterations: int = 20
    gamma: float = 0.1
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.window < STEP or self.window % STEP:
            raise BenchError(f"purifier.window={self.window} does not fit; give a positive multiple of {STEP} pixels.")
        if not 1 <= self.stride <= self.window:
            raise BenchError(f"purifier.stride={self.stride} is out of range; give 1 to the window's {self.window}.")
        for name in ("steps", "iterations"):
            if getattr(self, name) < 1:
                raise BenchError(f"purifier.{name}={getattr(self, name)} is out of range; give at least 1.")
        for name in ("strength", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise BenchError(f"purifier.{name}={getattr(self, name)} is out of range; give 0 to 1.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        from bench.diffusion.finetuning import check_photos
        from bench.diffusion.images import to_float, to_uint8
        from bench.diffusion.regeneration import open_regenerator

        check_photos(photos, model, "purifier gridpure")
        engine = open_regenerator(model, self.prompt, 1.0, ctx.device)
        x = to_float(photos.pixels).to(ctx.device)
        side = min(self.window, x.shape[-1])
        own = [ctx.generator(name) for name in photos.names]
        for _ in ctx.track(range(self.iterations), "gridpure", self.iterations):
            merged = in_windows(x, side, self.stride, lambda cut: self._purified(engine, cut, own))
            x = (1 - self.gamma) * merged + self.gamma * x
        return replace(photos, pixels=to_uint8(x))

    def _purified(self, engine: Regenerator, cut: Tensor, own: list[torch.Generator]) -> Tensor:
        """Windows [n, k, 3, s, s] after a little noise, each photo's from its own generator, and denoising."""
        import torch

        from bench.diffusion.regeneration import regenerate

        shape = (cut.shape[1], *engine.latent_shape(cut.shape[-1]))
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in own])
        level = round(self.strength * engine.chain)
        return regenerate(engine, cut.flatten(0, 1), noise, level, self.steps).view_as(cut)


def in_windows(x: Tensor, side: int, stride: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Photos [n, 3, h, w] of which every window was changed: the mean of all windows that cover a place.

    ``change`` maps the windows of all photos, [n, k, 3, side, side], the collage of corners last.
    """
    import torch

    half = side // 2
    edges = (slice(0, half), slice(-half, None))
    corners = [(..., rows, columns) for rows in edges for columns in edges]
    boxes = [(..., slice(top, top + side), slice(left, left + side))
             for top in starts(x.shape[2], side, stride) for left in starts(x.shape[3], side, stride)]
    collage = x.new_empty((*x.shape[:2], side, side))
    for corner in corners:
        collage[corner] = x[corner]
    changed = change(torch.stack([*(x[box] for box in boxes), collage], dim=1))
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for place, box in enumerate(boxes):
        total[box] += changed[:, place]
        count[box] += 1
    for corner in corners:
        total[corner] += changed[:, -1][corner]
        count[corner] += 1
    return total / count


def starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin along one axis, so that the last one ends at the border."""
    found = list(range(0, length - side + 1, stride))
    return found if found[-1] == length - side else [*found, length - side]
