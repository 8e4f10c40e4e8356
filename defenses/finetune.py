"""Clean fine-tuning: the control that every model-side defense has to beat.

The suspicious network is trained on with the ordinary noise-prediction loss on clean images, nothing else. Settings
follow the fine-tuning parts of Elijah (AAAI 2024: 11 epochs) and Diff-Cleanse (2024: Adam, 2e-4, batch 128, cosine
decay without warm-up, gradient clip 1), whose other parts, an inverted trigger or pruning, are what this leaves out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.identity import digest
from bench.options import check_training
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from bench.context import Context

@plugin("defense", "finetune", track=("backdoor",), acts_on="model", needs=("clean_data",), control=True)
class FineTune:
    """Trains a suspicious model further on clean images with its ordinary loss, and does nothing else.

    ``steps``: number of updates, None for ``epochs`` passes over the defender's images. On text-to-image models the
    UNet is trained on images and their captions; use a far lower ``lr`` there (1e-5). ``mixed_precision``: compute in
    bfloat16.
    """

    epochs: int = 11
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 0
    grad_clip: float = 1.0
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        check_training(self)

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        """The same model with a trained UNet. ``secret`` is not used."""
        from bench.diffusion.loading import save_part
        from bench.diffusion.training import Plan, count_steps, fit, mixed, shuffled_batches

        unet, loss_of = _unconditional(suspicious, data, ctx) if "unconditional" in suspicious.capabilities \
            else _captioned(suspicious, data, ctx)
        rows = shuffled_batches(len(data), self.batch, ctx.generator("batches"))
        plan = Plan(count_steps(self.steps, self.epochs, len(data), self.batch), self.lr, self.warmup,
                    clip=self.grad_clip)

        def batch_loss() -> Tensor:
            with mixed(ctx.device, self.mixed_precision):
                return loss_of(next(rows))

        fit(unet, batch_loss, plan, ctx, "finetune")
        part = save_part(unet, ctx.folder, "unet")
        parts = {**suspicious.parts, "unet": part}
        return replace(suspicious, parts=parts, digest=digest([suspicious.digest, ctx.key]))


def _unconditional(model: Model, data: ImageSet, ctx: Context) -> tuple[Any, Callable[[Tensor], Tensor]]:
    from bench.diffusion.images import to_float
    from bench.diffusion.loading import load_unconditional
    from bench.diffusion.losses import noise_prediction_loss

    unet, scheduler = load_unconditional(model, ctx.device)
    size = unet.config.sample_size
    if tuple(data.pixels.shape[2:]) != (size, size):
        raise BenchError(f"finetune: clean images are {list(data.pixels.shape[2:])} pixels, but the model draws "
                         f"{size}; set data.size={size}.")
    noises = ctx.generator("noise")

    def loss(rows: Tensor) -> Tensor:
        images = mirrored(to_float(data.pixels[rows]), noises).to(ctx.device)
        return noise_prediction_loss(unet, scheduler, images, None, generator=noises)

    return unet, loss


def _captioned(model: Model, data: ImageSet, ctx: Context) -> tuple[Any, Callable[[Tensor], Tensor]]:
    import torch

    from bench.diffusion.images import to_float
    from bench.diffusion.loading import load_components
    from bench.diffusion.losses import encode_latents, encode_prompts, noise_prediction_loss

    if not data.captions:
        raise BenchError("finetune: a text-to-image model is trained on captioned images, but the data has no "
                         "captions; put a .txt beside each image.")
    parts = load_components(model, ctx.device)
    noises = ctx.generator("noise")

    def loss(rows: Tensor) -> Tensor:
        with torch.no_grad():
            latents = encode_latents(parts.vae, to_float(data.pixels[rows]).to(ctx.device), noises)
            states = encode_prompts(parts.tokenizer, parts.text_encoder, [data.captions[int(i)] for i in rows])
        return noise_prediction_loss(parts.unet, parts.scheduler, latents, states, generator=noises)

    return parts.unet, loss


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [n, 3, h, w] flipped left to right with probability one half."""
    import torch

    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)
