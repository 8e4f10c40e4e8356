"""What DreamBooth, LoRA and the defenses that imitate them share: class images, batches, the loss, the update.

DreamBooth: Ruiz et al., CVPR 2023 (arXiv:2208.12242). Its loss with prior preservation, in latent space:
L_db(theta) = L_ldm(instance photos, "a photo of sks person") + lambda * L_ldm(class images, "a photo of person").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.codecs import ImageSetCodec
from bench.diffusion.images import to_float
from bench.diffusion.loading import Components, load_pipeline
from bench.diffusion.losses import (
    LatentDistribution,
    encode_ids,
    latent_distribution,
    noise_prediction_errors,
    tokenise,
)
from bench.diffusion.sampling import BATCH, chunks, generate
from bench.errors import BenchError
from bench.records import ImageSet, Model

if TYPE_CHECKING:
    from bench.context import Context

CLASS_IMAGES_VERSION = 1
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Prior:
    """How class images are drawn: how many, and the sampler's steps and guidance."""

    count: int
    steps: int = 50
    guidance: float = 7.5


def instance_prompt(token: str, class_noun: str) -> str:
    """The prompt that DreamBooth ties to the photos."""
    return f"a photo of {token} {class_noun}"


def class_prompt(class_noun: str) -> str:
    """The prompt whose meaning prior preservation keeps."""
    return f"a photo of {class_noun}"


def check_photos(photos: ImageSet, model: Model, where: str) -> None:
    """Photos that a latent model can encode: at least one, square, a multiple of 8 pixels."""
    if len(photos) == 0:
        raise BenchError(f"{where}: no photos were given; at least one is needed.")
    height, width = photos.pixels.shape[2:]
    if height != width or height % 8:
        raise BenchError(f"{where}: photos are {width}x{height} pixels; {model.base.name} needs square photos whose "
                         "side is a multiple of 8. Crop or resize them first.")


def class_images(model: Model, class_noun: str, prior: Prior, size: int, ctx: Context) -> ImageSet:
    """Pictures of the class drawn by the model itself: built once per model, prompt and settings, then shared."""
    prompt = class_prompt(class_noun)
    inputs = {"model": model.digest, "prompt": prompt, "count": prior.count, "steps": prior.steps,
              "guidance": prior.guidance, "size": size}
    return ctx.share("class_images", CLASS_IMAGES_VERSION, inputs,
                     lambda own: _draw_class(model, prompt, prior, size, own), ImageSetCodec())


def _draw_class(model: Model, prompt: str, prior: Prior, size: int, ctx: Context) -> ImageSet:
    pipeline = load_pipeline(model, ctx.device)
    seeds = [ctx.seed("class", place) for place in range(prior.count)]
    parts = chunks(prior.count, BATCH)
    drawn = [
        generate(pipeline, [prompt] * len(seeds[part]), seeds[part], steps=prior.steps, guidance=prior.guidance,
                 size=size)
        for part in ctx.track(parts, "class images", len(parts))
    ]
    return ImageSet(torch.cat(drawn), tuple(f"{place:04d}" for place in range(prior.count)), (prompt,) * prior.count)


@torch.no_grad()
def encode_images(vae: Any, images: ImageSet) -> LatentDistribution:
    """The latents of 8-bit images, encoded once; training samples from them again and again."""
    parts = [latent_distribution(vae, to_float(images.pixels[part]).to(vae.device))
             for part in chunks(len(images), BATCH)]
    return LatentDistribution(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


class Shuffled:
    """An endless stream over ``count`` places: every pass visits each place once, in a new order."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.left = torch.empty(0, dtype=torch.long)

    def take(self, batch: int) -> Tensor:
        """The next ``batch`` places, int64 [batch]."""
        while len(self.left) < batch:
            order = torch.randperm(self.count, generator=self.generator)
            self.left = torch.cat([self.left, order])
        taken, self.left = self.left[:batch], self.left[batch:]
        return taken


@dataclass(frozen=True)
class Examples:
    """Latents of images that share one prompt. ``ids``: its tokens, [1, length]."""

    latents: LatentDistribution
    ids: Tensor

    def draw(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of the latents of some of the images, [n, c, h, w]."""
        return self.latents.pick(places).sample(generator)


def examples(components: Components, images: ImageSet, prompt: str) -> Examples:
    """Encode images and prompt once."""
    return Examples(encode_images(components.vae, images), tokenise(components.tokenizer, [prompt]))


def dreambooth_loss(
    unet: Any, scheduler: Any, instance: Tensor, prior: Tensor | None, states: Tensor, prior_weight: float,
    generator: torch.Generator,
) -> Tensor:
    """L_db of a batch, both halves in one pass through the network.

    ``instance``: latents [n, c, h, w]; ``prior``: latents [m, c, h, w] or None. ``states``: [1 or 2, length, width],
    the instance prompt's and the class prompt's.
    """
    own = states[:1].expand(len(instance), -1, -1)
    if prior is None:
        return noise_prediction_errors(unet, scheduler, instance, own, generator=generator).mean()
    both = torch.cat([instance, prior])
    given = torch.cat([own, states[1:2].expand(len(prior), -1, -1)])
    errors = noise_prediction_errors(unet, scheduler, both, given, generator=generator)
    return errors[: len(instance)].mean() + prior_weight * errors[len(instance):].mean()


class Lesson:
    """Draws DreamBooth batches: photos of one person and, if there is a prior, as many class images."""

    def __init__(
        self, instance: Examples, prior: Examples | None, batch: int, prior_weight: float, generator: torch.Generator,
    ) -> None:
        self.instance, self.prior = instance, prior
        self.batch, self.prior_weight, self.generator = batch, prior_weight, generator
        self._instances = Shuffled(len(instance.latents.mean), generator)
        self._priors = Shuffled(len(prior.latents.mean), generator) if prior else None

    @property
    def ids(self) -> Tensor:
        """Tokens of the instance prompt and, if there is a prior, of the class prompt: [1 or 2, length]."""
        return torch.cat([self.instance.ids, self.prior.ids]) if self.prior else self.instance.ids

    def loss(self, unet: Any, scheduler: Any, states: Tensor) -> Tensor:
        """L_db of the next batch. ``states``: of ``ids``, under the text encoder as it is now."""
        instance = self.instance.draw(self._instances.take(self.batch), self.generator)
        prior = None
        if self.prior and self._priors:
            prior = self.prior.draw(self._priors.take(self.batch), self.generator)
        return dreambooth_loss(unet, scheduler, instance, prior, states, self.prior_weight, self.generator)


def adamw(parameters: Sequence[nn.Parameter], lr: float, fused: bool = True) -> torch.optim.AdamW:
    """The optimiser of the diffusers scripts: betas 0.9 and 0.999, weight decay 0.01, constant rate.

    ``fused`` does a whole step in one kernel and in float32 inside; False rounds after every operation, as
    half-precision training does without it.
    """
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=fused)


def restart(optimizer: torch.optim.Optimizer) -> None:
    """Forget the moments, in place, as a freshly built optimiser would."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def update(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float | None = 1.0,
) -> None:
    """One step down ``loss``; ``clip``: the largest norm of the whole gradient, None for no limit."""
    loss.backward()  # type: ignore[no-untyped-call]
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients, in a fixed order."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Recipe:
    """How an attacker's training runs. ``precision``: ``fp32``, or ``bf16`` for mixed precision with fp32 weights."""

    steps: int
    lr: float
    precision: str = "fp32"
    clip: float = 1.0


def train(components: Components, lesson: Lesson, recipe: Recipe, ctx: Context, what: str) -> list[float]:
    """Train what requires gradients in the UNet and the text encoder; returns the loss of every step.

    The prompts' states are computed once when the text encoder is frozen.
    """
    unet, encoder = components.unet, components.text_encoder
    parameters = trainable(unet, encoder)
    optimizer = adamw(parameters, recipe.lr)
    learns_text = any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        fixed = encode_ids(encoder, lesson.ids)
    losses: list[Tensor] = []
    for _ in ctx.track(range(recipe.steps), what, recipe.steps):
        with torch.autocast(fixed.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            states = encode_ids(encoder, lesson.ids) if learns_text else fixed
            loss = lesson.loss(unet, components.scheduler, states)
        _require_finite(loss, what, recipe.lr)
        update(loss, optimizer, parameters, recipe.clip)
        losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []


def _require_finite(loss: Tensor, what: str, lr: float) -> None:
    if not torch.isfinite(loss):
        raise BenchError(f"{what}: the loss is {float(loss)}; lower lr={lr}.")


class Surrogate:
    """The defender's own copy of the attacker's model, trained and copied in place.

    ``lr``: of its AdamW. ``clip``: norm limit of the gradient, None for none. ``fused``: see :func:`adamw`.
    """

    def __init__(
        self, components: Components, lr: float, clip: float | None, train_text_encoder: bool, fused: bool = True,
    ) -> None:
        self.unet, self.text_encoder = components.unet, components.text_encoder
        self.scheduler, self.clip = components.scheduler, clip
        modules = [self.unet, self.text_encoder] if train_text_encoder else [self.unet]
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = adamw(self.parameters, lr, fused)

    @torch.no_grad()
    def copy_from(self, weights: Sequence[Tensor]) -> None:
        """Take over weights, in place."""
        torch._foreach_copy_(self.parameters, list(weights))

    def states(self, ids: Tensor) -> Tensor:
        """Prompt states under the text encoder as it is now."""
        return encode_ids(self.text_encoder, ids)

    def learn(self, lesson: Lesson, steps: int, fresh: bool = True) -> None:
        """``steps`` DreamBooth steps; the weights are frozen before and after.

        ``fresh``: with a fresh optimiser; False goes on with the moments of the steps before.
        """
        if fresh:
            restart(self.optimizer)
        self._require_grad(True)
        for _ in range(steps):
            loss = lesson.loss(self.unet, self.scheduler, self.states(lesson.ids))
            update(loss, self.optimizer, self.parameters, self.clip)
        self._require_grad(False)

    def _require_grad(self, wanted: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)
