"""DiffPure: the attacker noises the photos a little and lets a diffusion model take noise and protection away together.

Nie et al., "Diffusion models for adversarial purification", ICML 2022 (arXiv:2205.07460).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin

if TYPE_CHECKING:
    from bench.context import Context
    from bench.records import ImageSet, Model


@plugin(
    "purifier", "diffpure", track=("customization", "editing"), needs=("text_to_image", "text_encoder"),
    paper="DiffPure, ICML 2022, arXiv:2205.07460", official_code="https://github.com/NVlabs/DiffPure",
)
class DiffPure:
    """Image-to-image with the attacked model itself: encode, add noise, denoise, decode.

    ``strength``: the share of the model's chain that is added as noise; 0.1 is t = 100 of 1000, the usual setting, and
    0 is the autoencoder's round trip alone. ``steps``: sampler steps of a whole chain; strength 0.1 takes a tenth of
    them, and at least one. ``prompt``, ``guidance``: what the model is asked for; 1 is no guidance.

    Deviations: DiffPure denoises pixels with an unconditional ImageNet model and a stochastic solver. An attacker of
    latent models has the latent model at hand, so the photo also passes its autoencoder, which purifies by itself
    (compare ``strength=0``), and the solver is DDIM without noise. The encoder's mean is taken, not a draw.
    A photo's noise depends on its name, not on its company.
    """

    strength: float = 0.1
    steps: int = 50
    prompt: str = ""
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise BenchError(f"purifier.strength={self.strength} is out of range; give 0 to 1.")
        if self.steps < 1:
            raise BenchError(f"purifier.steps={self.steps} is out of range; give at least 1.")
        if not 1 <= self.guidance <= 100:
            raise BenchError(f"purifier.guidance={self.guidance} is out of range; give 1 (none) to 100.")

    def purify(self, photos: ImageSet, model: Model, ctx: Context) -> ImageSet:
        import torch

        from bench.diffusion.finetuning import check_photos
        from bench.diffusion.images import to_float, to_uint8
        from bench.diffusion.regeneration import open_regenerator, regenerate

        check_photos(photos, model, "purifier diffpure")
        engine = open_regenerator(model, self.prompt, self.guidance, ctx.device)
        shape = engine.latent_shape(photos.pixels.shape[-1])
        noise = torch.stack([torch.randn(shape, generator=ctx.generator(name)) for name in photos.names])
        level = round(self.strength * engine.chain)
        return replace(photos, pixels=to_uint8(regenerate(engine, to_float(photos.pixels), noise, level, self.steps)))
