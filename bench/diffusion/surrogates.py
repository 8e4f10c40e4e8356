"""What protections against fine-tuning share: the defender's own fine-tuned copies of the model, and pixel gradients.

A protection raises some loss of each photo in the photo's pixels, under weights that are frozen meanwhile. Everything
random is drawn from the subject's own generator before the first photo is computed, so neither the size of a batch nor
the company or order of subjects changes a result (beyond rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.diffusion.finetuning import (
    Examples,
    Lesson,
    Prior,
    Surrogate,
    check_photos,
    class_images,
    class_prompt,
    encode_images,
    examples,
    instance_prompt,
)
from bench.diffusion.images import quantise_within, to_float
from bench.diffusion.loading import Components, load_components
from bench.diffusion.losses import (
    LatentDistribution,
    draw_timesteps,
    latent_distribution,
    noise_prediction_errors,
    normal,
    shown_beside,
    tokenise,
)
from bench.diffusion.sampling import chunks
from bench.records import Budget, ImageSet, Model, Subject

if TYPE_CHECKING:
    from bench.context import Context

Losses = Callable[[Tensor, slice], Tensor]
"""``losses(pixels, part)``: each photo's own loss [m] of the photos ``part`` of a set, pixels [m, 3, h, w]."""


def protect_each(
    subjects: Sequence[Subject], budget: Budget, model: Model, ctx: Context, what: str,
    perturb: Callable[[Subject, Tensor], Tensor],
) -> list[ImageSet]:
    """Set B of each subject after ``perturb(subject, x)``: photos in [-1, 1] in, photos within the budget out."""
    for subject in subjects:
        for photos in (subject.clean, subject.published):
            check_photos(photos, model, f"defense {what}, {subject.name}")
    found = []
    for subject in ctx.track(subjects, what, len(subjects)):
        x = to_float(subject.published.pixels).to(ctx.device)
        pixels = quantise_within(subject.published.pixels, perturb(subject, x), budget)
        found.append(replace(subject.published, pixels=pixels))
    return found


def pixel_gradient(x: Tensor, losses: Losses, batch: int) -> Tensor:
    """d/dx of each photo's own loss, [n, 3, h, w], ``batch`` photos at a time."""
    gradients = []
    for part in chunks(len(x), batch):
        pixels = x[part].detach().requires_grad_(True)
        gradients.append(torch.autograd.grad(losses(pixels, part).sum(), pixels)[0])
    return torch.cat(gradients)


@dataclass(frozen=True)
class Draws:
    """One round's randomness for n photos. ``posterior``, ``noise``: [n, c, h, w]; ``timesteps``: int64 [n]."""

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor

    def latents(self, found: LatentDistribution, part: slice) -> Tensor:
        """A sample of the encoder's posterior of the photos ``part``: z = mean + std * noise."""
        return found.mean + found.std * self.posterior[part]


def latent_shape(vae: Any, x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of the latents of photos ``x``."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, x.shape[2] // factor, x.shape[3] // factor


def draw(vae: Any, scheduler: Any, x: Tensor, generator: torch.Generator) -> Draws:
    """Posterior noise, noise and timestep of every photo of ``x``."""
    shape = (len(x), *latent_shape(vae, x))
    posterior, noise = (normal(shape, generator, x) for _ in range(2))
    return Draws(posterior, noise, draw_timesteps(scheduler, len(x), generator).to(x.device))


def denoising_losses(vae: Any, unet: Any, scheduler: Any, states: Tensor, draws: Draws) -> Losses:
    """L_ldm of each photo: || n - eps_theta(z_t, t, c) ||^2, mean over the latent. ``states``: [1, length, width]."""

    def losses(pixels: Tensor, part: slice) -> Tensor:
        latents = draws.latents(latent_distribution(vae, pixels), part).to(states.dtype)
        return noise_prediction_errors(
            unet, scheduler, latents, states.expand(len(pixels), -1, -1), generator=torch.Generator(),
            timesteps=draws.timesteps[part], noise=draws.noise[part].to(states.dtype),
            beside=shown_beside(vae, unet, latents),
        )

    return losses


@dataclass(frozen=True)
class Teaching:
    """How a surrogate learns: ``batch`` photos and, if ``prior_weight`` > 0, as many class images a step.

    ``lr``: of its AdamW. ``clip``: norm limit of the gradient. ``class_images``, ``class_steps``: pictures of the
    class, drawn once per model.
    """

    lr: float
    batch: int = 1
    prior_weight: float = 1.0
    class_images: int = 200
    class_steps: int = 50
    train_text_encoder: bool = True
    token: str = "sks"
    clip: float | None = 1.0


@dataclass
class Studio:
    """The model that a defender works on, and everything that the subjects of one run share."""

    model: Model
    teaching: Teaching
    ctx: Context
    components: Components
    fused: bool = True
    priors: dict[tuple[str, int], Examples] = field(default_factory=dict)

    @property
    def vae(self) -> Any:
        return self.components.vae

    @property
    def scheduler(self) -> Any:
        return self.components.scheduler

    def surrogate(self, components: Components | None = None) -> Surrogate:
        """A trainable copy of the model that stays in memory for the whole run; without ``components`` a new one."""
        own = load_components(self.model, self.ctx.device) if components is None else components
        return Surrogate(own, self.teaching.lr, self.teaching.clip, self.teaching.train_text_encoder, self.fused)

    def ids(self, subject: Subject) -> Tensor:
        """Tokens of "a photo of sks person", [1, length]."""
        return tokenise(self.components.tokenizer, [instance_prompt(self.teaching.token, subject.class_noun)])

    def prior(self, subject: Subject) -> Examples | None:
        """Latents and prompt of the class images, encoded once per class and size; None without prior preservation."""
        if self.teaching.prior_weight == 0:
            return None
        noun, size = subject.class_noun, subject.published.pixels.shape[-1]
        if (noun, size) not in self.priors:
            how = Prior(self.teaching.class_images, self.teaching.class_steps)
            images = class_images(self.model, noun, how, size, self.ctx)
            self.priors[noun, size] = examples(self.components, images, class_prompt(noun))
        return self.priors[noun, size]

    def lesson(self, subject: Subject, latents: LatentDistribution, generator: torch.Generator) -> Lesson:
        """DreamBooth batches of photos with these latents."""
        known = Examples(latents, self.ids(subject))
        return Lesson(known, self.prior(subject), self.teaching.batch, self.teaching.prior_weight, generator)

    def clean_lesson(self, subject: Subject, generator: torch.Generator) -> Lesson:
        """DreamBooth batches of the clean set A."""
        return self.lesson(subject, encode_images(self.vae, subject.clean), generator)

    @torch.no_grad()
    def encode(self, x: Tensor) -> LatentDistribution:
        """The latents of photos in [-1, 1]; no gradient."""
        return latent_distribution(self.vae, x)


def open_studio(model: Model, teaching: Teaching, ctx: Context) -> Studio:
    """Load the model once."""
    return Studio(model, teaching, ctx, load_components(model, ctx.device))


def weights_of(surrogate: Surrogate) -> list[Tensor]:
    """A copy of a surrogate's weights, to return to."""
    return [p.detach().clone() for p in surrogate.parameters]

