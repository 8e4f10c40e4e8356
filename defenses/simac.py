"""SimAC: ASPL at the timesteps where photos can be moved most, with a term that drives late features apart.

Wang et al., "SimAC: A simple anti-customization method for protecting face privacy against text-to-image synthesis of
diffusion models", CVPR 2024 (arXiv:2312.07865). Written from the paper's formulas as later work retells them and from
facts about the released code; no line of that code is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.options import Variant, require_all, variant
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.intervals import Search
    from bench.diffusion.losses import LatentDistribution
    from bench.diffusion.pairs import Pair
    from bench.diffusion.surrogates import Draws, Losses, Teaching
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "simac", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    knows=("prompt",), paper="SimAC, CVPR 2024, arXiv:2312.07865",
    official_code="https://github.com/somuchtome/SimAC",
)
class Simac:
    """Maximises noise-prediction loss plus feature interference under a surrogate that alternately learns the photos.

    First, under the published weights, each photo's timesteps are narrowed down (bench/diffusion/intervals.py): a round
    compares the pixel gradient's size at ``search_tries`` of the timesteps that are left, drops those within
    ``search_radius`` of the worst, and takes one gradient step at the best, until at most ``search_keep`` are left or
    ``search_rounds`` have passed. ``search_rounds=0`` keeps every timestep.

    Then the alternation of Anti-DreamBooth's ASPL, ``outer_steps`` times: a copy of the surrogate takes
    ``surrogate_steps`` DreamBooth steps on the clean set A; ``pgd_steps`` projected gradient steps, at timesteps from
    each photo's own interval, raise L = L_ldm(x + delta) + ``feature_weight`` * L_fea, where L_fea is the mean over
    late layers l of || F_l(x + delta) - F_l(x) ||^2; the surrogate itself takes ``surrogate_steps`` steps on the
    perturbed set B. Both images of L_fea see the same noise and timestep. F_l: outputs of the second convolution of the
    residual blocks in the last ``late`` (a quarter) of the decoder, counted by position along all of its
    residual blocks; on Stable Diffusion's twelve these are the published layers 9, 10 and 11.

    Defaults are the released script's. ``eps``: its budget is 16 / 255, applied to images in [-1, 1], which is 8
    levels; give 16 for the literal reading. ``alpha_255``: its 0.005 lies on [-1, 1], so 0.6375 levels. ``lr``: of the
    surrogate's AdamW. ``batch``: photos, and as many class images, per surrogate step. ``feature_weight`` is 1 as
    there. ``class_steps`` (steps of drawing a class image) is the sampler's default. ``pgd_batch``: photos per gradient
    pass; it saves memory and changes nothing beyond rounding.

    ``variant``: ``described`` lets the gradient of L_fea flow, compares with the clean photo, trains 32-bit weights and
    limits the gradient's norm to 1. ``released``: the code adds L_fea as a plain number, so it moves no pixel (and it
    compares with the perturbed photo that the block of steps began with); here the term is left out, which gives the
    same pixels without its forward passes. It also trains bfloat16 weights, in which steps of 5e-7 are almost all
    rounded away, and limits nothing, because it clips over an iterator that the optimiser has already used up.

    Deviations that change no result in kind: the surrogate's weights are frozen while pixels are optimised, prompt
    states and clean latents are computed once, weights are copied in place, all photos are searched side by side, and
    both images of L_fea share the encoder's noise. Pixels stay in 32 bits in both variants.
    """

    eps: float = 8.0
    alpha_255: float = 0.6375
    outer_steps: int = 50
    surrogate_steps: int = 3
    pgd_steps: int = 6
    feature_weight: float = 1.0
    late: float = 0.25
    search_rounds: int = 50
    search_tries: int = 5
    search_radius: int = 20
    search_keep: int = 100
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
        require_all(self, above={"alpha_255": 0, "lr": 0, "late": 0}, least={
            "outer_steps": 0, "surrogate_steps": 0, "pgd_steps": 0, "prior_weight": 0, "feature_weight": 0,
            "search_rounds": 0, "search_tries": 1, "search_radius": 1, "search_keep": 1, "batch": 1, "class_images": 1,
            "class_steps": 1, "pgd_batch": 1})
        if self.late > 1:
            raise BenchError(f"defense.late={self.late} is out of range; give a share of the decoder, at most 1.")
        self.variant = variant(self.variant)

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each from a surrogate that starts at the published weights."""
        from bench.diffusion.pairs import open_pair
        from bench.diffusion.surrogates import protect_each

        pair = open_pair(model, self.teaching(), ctx, half=self.variant is Variant.released)
        return protect_each(subjects, self.budget(), model, ctx, "simac", lambda s, x: alternate(self, s, x, pair, ctx))

    def teaching(self) -> Teaching:
        from bench.diffusion.surrogates import Teaching

        clip = 1.0 if self.variant is Variant.described else None
        return Teaching(self.lr, self.batch, self.prior_weight, self.class_images, self.class_steps,
                        self.train_text_encoder, self.token, clip)

    def search(self) -> Search:
        from bench.diffusion.intervals import Search

        return Search(self.search_rounds, self.search_tries, self.search_radius, self.search_keep)


@dataclass(frozen=True)
class Target:
    """What is perturbed. ``origin``: photos [n, 3, h, w] in [-1, 1]; ``clean``: their latents; ``ids``: the prompt's
    tokens; ``kept``: each photo's timesteps, bool [n, T]."""

    origin: Tensor
    clean: LatentDistribution
    ids: Tensor
    kept: Tensor


def alternate(method: Simac, subject: Subject, x: Tensor, pair: Pair, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after search and alternation, within the budget; floats."""
    studio, generator = pair.studio, ctx.generator(subject.name)
    pair.theta.copy_from(pair.start)
    ids, clean = studio.ids(subject), studio.clean_lesson(subject, generator)
    target = Target(x, studio.encode(x), ids, intervals(method, pair, x, ids, generator))
    perturbed = x
    for step in range(method.outer_steps):
        pair.copy.copy_from(pair.theta.parameters)                            # theta' <- theta
        pair.copy.learn(clean, method.surrogate_steps)                        # theta' down L_db(theta', A)
        perturbed = raise_loss(method, pair, perturbed, target, generator)    # B up L_ldm + w L_fea, under theta'
        lesson = studio.lesson(subject, studio.encode(perturbed), generator)
        pair.theta.learn(lesson, method.surrogate_steps)                      # theta down L_db(theta, B)
        ctx.progress(f"simac {subject.name}", step + 1, method.outer_steps)
    return perturbed


def intervals(method: Simac, pair: Pair, x: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """The timesteps that each photo keeps under the published weights, bool [n, T]."""
    import torch

    from bench.diffusion.intervals import Setting, select_intervals

    theta = pair.theta
    with torch.no_grad():
        states = theta.states(ids)
    setting = Setting(pair.studio.vae, theta.unet, theta.scheduler, states, method.alpha_255, method.eps,
                      method.pgd_batch)
    return select_intervals(method.search(), setting, x, generator)


def raise_loss(method: Simac, pair: Pair, x: Tensor, target: Target, generator: torch.Generator) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L(x; theta', c))), each at timesteps of the intervals."""
    import torch

    from bench.diffusion.intervals import pick
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import draw, pixel_gradient

    with torch.no_grad():
        states = pair.copy.states(target.ids)
    for _ in range(method.pgd_steps):
        draws = draw(pair.studio.vae, pair.copy.scheduler, x, generator)
        draws = replace(draws, timesteps=pick(target.kept, generator))
        gradient = pixel_gradient(x, objective(method, pair, target, states, draws), method.pgd_batch)
        x = ascend(x, target.origin, gradient, method.alpha_255, method.eps)
    return x


def objective(method: Simac, pair: Pair, target: Target, states: Tensor, draws: Draws) -> Losses:
    """L = L_ldm + w L_fea of each photo. Where the gradient of L_fea does not flow, it is not computed."""
    from bench.diffusion.surrogates import denoising_losses

    unet = pair.copy.unet
    denoising = denoising_losses(pair.studio.vae, unet, pair.copy.scheduler, states, draws)
    if method.variant is Variant.released or method.feature_weight == 0:
        return denoising

    def losses(pixels: Tensor, part: slice) -> Tensor:
        clean = clean_features(method, pair, target, states, draws, part)
        with late_features(unet, method.late) as found:
            errors = denoising(pixels, part)
        return errors + method.feature_weight * distances(found, clean)

    return losses


def clean_features(
    method: Simac, pair: Pair, target: Target, states: Tensor, draws: Draws, part: slice,
) -> list[Tensor]:
    """F_l(x) of the clean photos ``part`` at the same noise and timesteps; no gradient."""
    import torch

    from bench.diffusion.losses import LatentDistribution

    unet, scheduler = pair.copy.unet, pair.copy.scheduler
    own = LatentDistribution(target.clean.mean[part], target.clean.std[part])
    latents = draws.latents(own, part).to(states.dtype)
    times = draws.timesteps[part].to(latents.device)
    with torch.no_grad(), late_features(unet, method.late) as found:
        noisy = scheduler.add_noise(latents, draws.noise[part].to(states.dtype), times)
        unet(noisy, times, states.expand(len(noisy), -1, -1))
    return found


def late_layers(unet: Any, share: float) -> list[Any]:
    """The residual blocks in the last ``share`` of the decoder by position, at least one: 9, 10, 11 of SD's twelve."""
    blocks = [resnet for block in unet.up_blocks for resnet in block.resnets]
    return blocks[-math.ceil(share * len(blocks)):]


@contextmanager
def late_features(unet: Any, share: float) -> Iterator[list[Tensor]]:
    """Within it, a pass through ``unet`` appends the late layers' outputs, each [n, c, h, w]."""
    found: list[Tensor] = []

    def keep(module: Any, given: Any, output: Tensor) -> None:
        found.append(output)

    hooks = [block.conv2.register_forward_hook(keep) for block in late_layers(unet, share)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def distances(found: list[Tensor], clean: list[Tensor]) -> Tensor:
    """Each photo's mean squared difference, averaged over the layers: [n]."""
    import torch

    each = [(a.float() - b.float()).square().flatten(1).mean(1) for a, b in zip(found, clean)]
    return torch.stack(each).mean(0)
