"""ASPL, the main method of Anti-DreamBooth: perturb photos against a surrogate that keeps learning them.

Van Le et al., "Anti-DreamBooth: Protecting users from personalized text-to-image synthesis", ICCV 2023
(arXiv:2303.15433): alternating surrogate and perturbation learning. Written from the paper and from
facts about the released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, unknown
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.finetuning import Examples, Surrogate
    from bench.diffusion.loading import Components
    from bench.records import ImageSet, Model, Subject


class Variant(Enum):
    """``described``: what the paper says. ``released``: what its code does."""

    described = "described"
    released = "released"


@plugin(
    "defense", "aspl", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    knows=("prompt",), paper="Anti-DreamBooth, ICCV 2023, arXiv:2303.15433",
    official_code="https://github.com/VinAIResearch/Anti-DreamBooth",
)
class Aspl:
    """Maximises the noise-prediction loss on the photos of a DreamBooth surrogate that alternately learns them.

    Repeated ``outer_steps`` times: a copy of the surrogate takes ``surrogate_steps`` DreamBooth
    steps on the clean set A; ``pgd_steps`` projected gradient steps raise the loss of set B under that copy; the
    surrogate itself takes ``surrogate_steps`` DreamBooth steps on the perturbed set B.

    ``eps``, ``alpha_255``: budget and step in 0-255 levels; the paper's 0.05 and 0.005 lie on the [-1, 1] scale, so
    they are 6.375 and 0.6375 levels. ``lr``: of the surrogate's AdamW. ``batch``: photos, and as many class images, per
    surrogate step. ``prior_weight``: lambda of prior preservation. ``class_images``, ``class_steps``: pictures of the
    class, drawn once per model. ``pgd_batch``: photos per gradient pass; it saves memory, and beyond rounding (which
    bfloat16 shows) changes nothing.

    ``variant``: ``described`` trains 32-bit weights and limits the gradient's norm to 1. ``released`` trains bfloat16
    weights, in which steps of 5e-7 are almost all rounded away, and limits nothing, because the released code clips
    over an iterator that its optimiser has already used up.

    Deviations from the released code that change no result: the surrogate's weights are frozen while pixels are
    optimised, prompt states, class latents and clean latents are computed once, and weights are copied in place. Pixels
    stay in 32 bits in both variants, and the photos of a surrogate step are drawn in random order.
    """

    eps: float = 6.375
    alpha_255: float = 0.6375
    outer_steps: int = 50
    surrogate_steps: int = 3
    pgd_steps: int = 6
    lr: float = 5e-7
    batch: int = 1
    prior_weight: float = 1.0
    class_images: int = 200
    class_steps: int = 50
    train_text_encoder: bool = True
    token: str = "sks"
    pgd_batch: int = 4
    variant: Variant = Variant.described

    def __post_init__(self) -> None:
        Budget(self.eps)
        for name in ("alpha_255", "lr"):
            _require(name, getattr(self, name), 0, exclusive=True)
        for name in ("outer_steps", "surrogate_steps", "pgd_steps", "prior_weight"):
            _require(name, getattr(self, name), 0)
        for name in ("batch", "class_images", "class_steps", "pgd_batch"):
            _require(name, getattr(self, name), 1)
        try:
            self.variant = Variant(self.variant)
        except ValueError:
            raise unknown("variant", str(self.variant), "defense.variant", [v.value for v in Variant]) from None

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each from a surrogate that starts at the published weights."""
        studio = open_studio(self, model, ctx)
        return [self._protect(s, studio, ctx) for s in ctx.track(subjects, "aspl", len(subjects))]

    def _protect(self, subject: Subject, studio: Studio, ctx: Context) -> ImageSet:
        from bench.diffusion.finetuning import check_photos
        from bench.diffusion.images import quantise_within, to_float

        for photos in (subject.clean, subject.published):
            check_photos(photos, studio.model, f"defense aspl, {subject.name}")
        x = to_float(subject.published.pixels).to(ctx.device)
        perturbed = alternate(self, subject, x, studio, ctx)
        return replace(subject.published, pixels=quantise_within(subject.published.pixels, perturbed, self.budget()))


def _require(name: str, value: float, low: float, exclusive: bool = False) -> None:
    if value < low or (exclusive and value == low):
        bound = "more than" if exclusive else "at least"
        raise BenchError(f"defense.{name}={value} is out of range; give {bound} {low}.")


@dataclass
class Studio:
    """Everything that the subjects of one run share. ``theta``, ``copy``: the surrogate and its copy, resident for the
    whole run; ``start``: the published weights that both begin with."""

    model: Model
    components: Components
    theta: Surrogate
    copy: Surrogate
    start: list[Tensor]
    priors: dict[tuple[str, int], Examples]


def open_studio(method: Aspl, model: Model, ctx: Context) -> Studio:
    """Load the model twice, in the variant's precision."""
    components = load(method, model, ctx)
    theta, copy = new_surrogate(method, components), new_surrogate(method, load(method, model, ctx))
    return Studio(model, components, theta, copy, [p.detach().clone() for p in theta.parameters], {})


def load(method: Aspl, model: Model, ctx: Context) -> Components:
    """The model's components; all in bfloat16 for ``released``."""
    from copy import deepcopy

    import torch
    from torch import nn

    from bench.diffusion.loading import load_components

    components = load_components(model, ctx.device)
    if method.variant is Variant.described:
        return components
    names = ("unet", "text_encoder", "vae")
    half = {name: nn.Module.to(deepcopy(getattr(components, name)), dtype=torch.bfloat16) for name in names}
    return replace(components, **half)


def new_surrogate(method: Aspl, components: Components) -> Surrogate:
    from bench.diffusion.finetuning import Surrogate

    described = method.variant is Variant.described
    return Surrogate(components, method.lr, 1.0 if described else None, method.train_text_encoder, fused=described)


def alternate(method: Aspl, subject: Subject, x: Tensor, studio: Studio, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after the whole alternation, within the budget; floats.

    All randomness comes from the subject's own generator, so neither order nor company of subjects matters.
    """
    from bench.diffusion.finetuning import encode_images, instance_prompt
    from bench.diffusion.losses import tokenise

    generator = ctx.generator(subject.name)
    ids = tokenise(studio.components.tokenizer, [instance_prompt(method.token, subject.class_noun)])
    prior = class_examples(method, subject, studio, ctx)
    clean = new_lesson(method, encode_images(studio.components.vae, subject.clean), ids, prior, generator)
    studio.theta.copy_from(studio.start)
    perturbed = x
    for step in range(method.outer_steps):
        studio.copy.copy_from(studio.theta.parameters)                        # theta' <- theta
        studio.copy.learn(clean, method.surrogate_steps)                      # theta' down L_db(theta', A)
        perturbed = raise_loss(method, studio, perturbed, x, ids, generator)  # B up L_ldm(B, theta')
        lesson = new_lesson(method, encode_floats(studio, perturbed), ids, prior, generator)
        studio.theta.learn(lesson, method.surrogate_steps)                    # theta down L_db(theta, B)
        ctx.progress(f"aspl {subject.name}", step + 1, method.outer_steps)
    return perturbed


def class_examples(method: Aspl, subject: Subject, studio: Studio, ctx: Context) -> Examples | None:
    """Latents and prompt of the class images, encoded once per class and size."""
    from bench.diffusion.finetuning import Prior, class_images, class_prompt, examples

    if method.prior_weight == 0:
        return None
    noun, size = subject.class_noun, subject.published.pixels.shape[-1]
    if (noun, size) not in studio.priors:
        images = class_images(studio.model, noun, Prior(method.class_images, method.class_steps), size, ctx)
        studio.priors[noun, size] = examples(studio.components, images, class_prompt(noun))
    return studio.priors[noun, size]


def new_lesson(method: Aspl, latents: Any, ids: Tensor, prior: Examples | None, generator: torch.Generator) -> Any:
    from bench.diffusion.finetuning import Examples, Lesson

    return Lesson(Examples(latents, ids), prior, method.batch, method.prior_weight, generator)


def encode_floats(studio: Studio, x: Tensor) -> Any:
    """The latents of photos in [-1, 1]; no gradient."""
    import torch

    from bench.diffusion.losses import latent_distribution

    with torch.no_grad():
        return latent_distribution(studio.components.vae, x)


def raise_loss(
    method: Aspl, studio: Studio, x: Tensor, origin: Tensor, ids: Tensor, generator: torch.Generator,
) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L_ldm(x; theta', c)))."""
    import torch

    from bench.diffusion.projected_gradient import ascend

    with torch.no_grad():
        states = studio.copy.states(ids)
    for _ in range(method.pgd_steps):
        gradient = loss_gradient(studio, x, states, generator, method.pgd_batch)
        x = ascend(x, origin, gradient, method.alpha_255, method.eps)
    return x


def loss_gradient(studio: Studio, x: Tensor, states: Tensor, generator: torch.Generator, batch: int) -> Tensor:
    """d/dx of each photo's own L_ldm under the copy, [n, 3, h, w]. All noise is drawn before the first batch."""
    import torch

    from bench.diffusion.losses import draw_timesteps, latent_distribution, noise_prediction_errors, normal
    from bench.diffusion.sampling import chunks

    shape = (len(x), *latent_shape(studio, x))
    posterior, noise = (normal(shape, generator, states) for _ in range(2))
    timesteps = draw_timesteps(studio.copy.scheduler, len(x), generator)
    gradients = []
    for part in chunks(len(x), batch):
        pixels = x[part].detach().requires_grad_(True)
        found = latent_distribution(studio.components.vae, pixels)
        latents = found.mean + found.std * posterior[part]
        errors = noise_prediction_errors(
            studio.copy.unet, studio.copy.scheduler, latents, states.expand(len(pixels), -1, -1), generator=generator,
            timesteps=timesteps[part], noise=noise[part],
        )
        gradients.append(torch.autograd.grad(errors.sum(), pixels)[0])
    return torch.cat(gradients)


def latent_shape(studio: Studio, x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of the latents of photos ``x``."""
    config = studio.components.vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    return config.latent_channels, x.shape[2] // factor, x.shape[3] // factor
