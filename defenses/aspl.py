"""ASPL, the main method of Anti-DreamBooth: perturb photos against a surrogate that keeps learning them.

Van Le et al., "Anti-DreamBooth: Protecting users from personalized text-to-image synthesis", ICCV 2023
(arXiv:2303.15433): alternating surrogate and perturbation learning. Written from the paper and from
facts about the released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from bench.errors import unknown
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.finetuning import Surrogate
    from bench.diffusion.loading import Components
    from bench.diffusion.surrogates import Studio, Teaching
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
        from bench.options import require

        Budget(self.eps)
        for name in ("alpha_255", "lr"):
            require(name, getattr(self, name), 0, exclusive=True)
        for name in ("outer_steps", "surrogate_steps", "pgd_steps", "prior_weight"):
            require(name, getattr(self, name), 0)
        for name in ("batch", "class_images", "class_steps", "pgd_batch"):
            require(name, getattr(self, name), 1)
        try:
            self.variant = Variant(self.variant)
        except ValueError:
            raise unknown("variant", str(self.variant), "defense.variant", [v.value for v in Variant]) from None

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each from a surrogate that starts at the published weights."""
        from bench.diffusion.surrogates import protect_each

        pair = open_pair(self, model, ctx)
        return protect_each(subjects, self.budget(), model, ctx, "aspl", lambda s, x: alternate(self, s, x, pair, ctx))

    def teaching(self) -> Teaching:
        from bench.diffusion.surrogates import Teaching

        clip = 1.0 if self.variant is Variant.described else None
        return Teaching(self.lr, self.batch, self.prior_weight, self.class_images, self.class_steps,
                        self.train_text_encoder, self.token, clip)


@dataclass
class Pair:
    """``theta``, ``copy``: the surrogate and its copy, resident for the whole run; ``start``: the published weights
    that both begin with."""

    studio: Studio
    theta: Surrogate
    copy: Surrogate
    start: list[Tensor]


def open_pair(method: Aspl, model: Model, ctx: Context) -> Pair:
    """Load the model twice, in the variant's precision."""
    from bench.diffusion.surrogates import Studio, weights_of

    fused = method.variant is Variant.described
    studio = Studio(model, method.teaching(), ctx, load(method, model, ctx), fused)
    theta = studio.surrogate(studio.components)
    return Pair(studio, theta, studio.surrogate(load(method, model, ctx)), weights_of(theta))


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


def alternate(method: Aspl, subject: Subject, x: Tensor, pair: Pair, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after the whole alternation, within the budget; floats."""
    studio, generator = pair.studio, ctx.generator(subject.name)
    ids, clean = studio.ids(subject), studio.clean_lesson(subject, generator)
    pair.theta.copy_from(pair.start)
    perturbed = x
    for step in range(method.outer_steps):
        pair.copy.copy_from(pair.theta.parameters)                            # theta' <- theta
        pair.copy.learn(clean, method.surrogate_steps)                        # theta' down L_db(theta', A)
        perturbed = raise_loss(method, pair, perturbed, x, ids, generator)    # B up L_ldm(B, theta')
        lesson = studio.lesson(subject, studio.encode(perturbed), generator)
        pair.theta.learn(lesson, method.surrogate_steps)                      # theta down L_db(theta, B)
        ctx.progress(f"aspl {subject.name}", step + 1, method.outer_steps)
    return perturbed


def raise_loss(
    method: Aspl, pair: Pair, x: Tensor, origin: Tensor, ids: Tensor, generator: torch.Generator,
) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L_ldm(x; theta', c)))."""
    import torch

    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import denoising_losses, draw, pixel_gradient

    vae, unet, scheduler = pair.studio.vae, pair.copy.unet, pair.copy.scheduler
    with torch.no_grad():
        states = pair.copy.states(ids)
    for _ in range(method.pgd_steps):
        losses = denoising_losses(vae, unet, scheduler, states, draw(vae, scheduler, x, generator))
        x = ascend(x, origin, pixel_gradient(x, losses, method.pgd_batch), method.alpha_255, method.eps)
    return x
