"""DisDiff: ASPL that also erases the rare word from cross-attention, with steps scaled by the timestep.

Liu et al., "Disrupting Diffusion: Token-level attention erasure attack against diffusion-based customization", ACM MM
2024 (arXiv:2405.20584). Written from facts about the released code, without the paper's text; no line of that code is
used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    from bench.diffusion.pairs import Pair
    from bench.diffusion.surrogates import Draws, Losses, Studio, Teaching
    from bench.records import ImageSet, Model, Subject

SHARPNESS = 100.0
"""Attention probabilities are multiplied by it before the softmax over the prompt's words [released code]."""
FRACTION = 4
"""The maps used are a quarter as wide as the latents: 16 x 16 on Stable Diffusion at 512 pixels [released code]."""


@plugin(
    "defense", "disdiff", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    knows=("prompt",), paper="DisDiff, ACM MM 2024, arXiv:2405.20584",
    official_code="https://github.com/riolys/DisDiff",
)
class DisDiff:
    """Maximises noise-prediction loss plus erasure of "sks" from cross-attention, on an alternating surrogate.

    Repeated ``outer_steps`` times, as in Anti-DreamBooth's ASPL: a copy of the surrogate takes ``surrogate_steps``
    DreamBooth steps on the clean set A; ``pgd_steps`` projected gradient steps on set B raise L = L_ldm +
    ``attention_weight`` * L_cae under that copy; the surrogate takes ``surrogate_steps`` steps on the perturbed set B.

    Cross-attention erasure: L_cae = (1 - sum_p a_p(sks)^2 / sum_p sum_w a_p(w)^2)^2, where a_p is the softmax over the
    prompt's words of 100 times the attention that place p pays to them, averaged over heads and over the layers
    whose maps are a quarter as wide as the latents (the nearest width on networks that have none of that). Merit
    sampling scheduler: the step is ``alpha_255`` * (cos(pi t / (T - 1)) + 1) / 2 at timestep t, so that timestep 0
    counts in full and the last one for nothing; ``merit=False`` takes equal steps. The released script also draws
    timesteps from each photo's own interval of large gradients (SimAC, CVPR 2024; see bench/diffusion/intervals.py):
    ``search_rounds`` rounds at most, 0 to draw from the whole chain.

    Defaults are the released script's. ``eps``, ``alpha_255``: its 0.05 and 0.005 lie on the [-1, 1] scale, so 6.375
    and 0.6375 levels. ``lr``: of the surrogate's AdamW. ``batch``: photos, and as many class images, per
    surrogate step. ``class_steps`` (steps of drawing a class image) is the sampler's default. ``pgd_batch``: photos
    per gradient pass; it saves memory and changes nothing beyond rounding. The formulas of L_cae and of the scheduler
    are the code's; the paper may word them otherwise.

    ``variant``: ``described`` alternates two surrogates in 32 bits and limits the gradient's norm to 1. ``released``:
    the code does not copy the surrogate, so one model learns A and B in turn; it trains bfloat16 weights, in which
    steps of 5e-7 are almost all rounded away, and limits nothing, because it clips over an iterator that the
    optimiser has already used up.

    Deviations: the code averages attention maps over the photos of a batch before L_cae, which makes one photo's
    gradient depend on its company; here each photo has its own. The rare word may be several tokens; their shares
    add up. Changing no result in kind: the surrogate's weights are frozen while pixels are optimised, prompt states and
    clean latents are computed once, and photos are searched side by side. Pixels stay in 32 bits in both variants.
    """

    eps: float = 6.375
    alpha_255: float = 0.6375
    outer_steps: int = 50
    surrogate_steps: int = 3
    pgd_steps: int = 6
    attention_weight: float = 0.1
    merit: bool = True
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
        require_all(self, above={"alpha_255": 0, "lr": 0}, least={
            "outer_steps": 0, "surrogate_steps": 0, "pgd_steps": 0, "prior_weight": 0, "attention_weight": 0,
            "search_rounds": 0, "search_tries": 1, "search_radius": 1, "search_keep": 1, "batch": 1, "class_images": 1,
            "class_steps": 1, "pgd_batch": 1})
        if not self.token.strip():
            raise BenchError("defense.token is empty; give the rare word that is to be erased, like 'sks'.")
        self.variant = variant(self.variant)

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each from a surrogate that starts at the published weights."""
        from bench.diffusion.pairs import open_pair
        from bench.diffusion.surrogates import protect_each

        pair = open_pair(model, self.teaching(), ctx, half=self.variant is Variant.released)
        return protect_each(subjects, self.budget(), model, ctx, "disdiff",
                            lambda s, x: alternate(self, s, x, pair, ctx))

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
    """What is perturbed. ``origin``: photos [n, 3, h, w] in [-1, 1]; ``ids``: the prompt's tokens; ``words``, ``rare``:
    the places in them of all words and of the rare word; ``kept``: each photo's timesteps, bool [n, T]."""

    origin: Tensor
    ids: Tensor
    words: slice
    rare: slice
    kept: Tensor


def alternate(method: DisDiff, subject: Subject, x: Tensor, pair: Pair, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after search and alternation, within the budget; floats."""
    studio, generator = pair.studio, ctx.generator(subject.name)
    pair.theta.copy_from(pair.start)
    ids, clean = studio.ids(subject), studio.clean_lesson(subject, generator)
    words, rare = word_places(studio, method.token, subject.class_noun)
    target = Target(x, ids, words, rare, intervals(method, pair, x, ids, generator))
    perturbed, teacher = x, pair.theta if method.variant is Variant.released else pair.copy
    for step in range(method.outer_steps):
        if teacher is not pair.theta:
            teacher.copy_from(pair.theta.parameters)                                  # theta' <- theta
        teacher.learn(clean, method.surrogate_steps)                                  # theta' down L_db(theta', A)
        perturbed = raise_loss(method, studio, teacher, perturbed, target, generator)  # B up L under theta'
        lesson = studio.lesson(subject, studio.encode(perturbed), generator)
        pair.theta.learn(lesson, method.surrogate_steps)                              # theta down L_db(theta, B)
        ctx.progress(f"disdiff {subject.name}", step + 1, method.outer_steps)
    return perturbed


def word_places(studio: Studio, token: str, class_noun: str) -> tuple[slice, slice]:
    """Where "a photo of sks person" has its words and where its rare word, after the start token."""
    from bench.diffusion.finetuning import instance_prompt

    def length(text: str) -> int:
        return len(studio.components.tokenizer(text, add_special_tokens=False).input_ids)

    before, _, _ = instance_prompt(token, class_noun).partition(token)
    total = min(length(instance_prompt(token, class_noun)), studio.components.tokenizer.model_max_length - 2)
    first = 1 + length(before.strip())
    rare = slice(first, first + length(token))
    if rare.stop > 1 + total:
        raise BenchError(f"defense.token={token!r} does not fit in the model's prompt of {total} tokens; shorten it.")
    return slice(1, 1 + total), rare


def intervals(method: DisDiff, pair: Pair, x: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """The timesteps that each photo keeps under the published weights, bool [n, T]."""
    import torch

    from bench.diffusion.intervals import Setting, select_intervals

    theta = pair.theta
    with torch.no_grad():
        states = theta.states(ids)
    setting = Setting(pair.studio.vae, theta.unet, theta.scheduler, states, method.alpha_255, method.eps,
                      method.pgd_batch)
    return select_intervals(method.search(), setting, x, generator)


def raise_loss(
    method: DisDiff, studio: Studio, teacher: Any, x: Tensor, target: Target, generator: torch.Generator,
) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha m(t) sign(grad_x L(x; theta', c))), t from each photo's interval."""
    import torch

    from bench.diffusion.images import levels
    from bench.diffusion.intervals import pick
    from bench.diffusion.projected_gradient import project
    from bench.diffusion.surrogates import draw, pixel_gradient

    with torch.no_grad():
        states = teacher.states(target.ids)
    for _ in range(method.pgd_steps):
        draws = replace(draw(studio.vae, teacher.scheduler, x, generator), timesteps=pick(target.kept, generator))
        gradient = pixel_gradient(x, objective(method, studio, teacher, target, states, draws), method.pgd_batch)
        steps = levels(method.alpha_255) * merits(method, draws.timesteps, target.kept.shape[1])
        x = project(x + steps.to(x.device)[:, None, None, None] * gradient.sign(), target.origin, method.eps)
    return x


def merits(method: DisDiff, timesteps: Tensor, total: int) -> Tensor:
    """m(t) = (cos(pi t / (T - 1)) + 1) / 2 of each photo, [n]; 1 without the scheduler."""
    import torch

    if not method.merit:
        return torch.ones(len(timesteps))
    return (torch.cos(math.pi * timesteps / (total - 1)) + 1) / 2


def objective(
    method: DisDiff, studio: Studio, teacher: Any, target: Target, states: Tensor, draws: Draws,
) -> Losses:
    """L = L_ldm + w L_cae of each photo, from one pass through the network."""
    from bench.diffusion.attention import recorded
    from bench.diffusion.surrogates import denoising_losses

    denoising = denoising_losses(studio.vae, teacher.unet, teacher.scheduler, states, draws)

    def losses(pixels: Tensor, part: slice) -> Tensor:
        if method.attention_weight == 0:
            return denoising(pixels, part)
        with recorded(teacher.unet) as maps:
            errors = denoising(pixels, part)
        side = draws.noise.shape[-1] // FRACTION
        return errors + method.attention_weight * erasure(averaged(maps.cross, side), target.words, target.rare)

    return losses


def averaged(maps: dict[str, Tensor], side: int) -> Tensor:
    """The mean of the layers' maps [n, places, tokens] whose width is nearest to ``side``; of two, the smaller."""
    import torch

    widths = {math.isqrt(m.shape[1]) for m in maps.values()}
    nearest = min(widths, key=lambda width: (abs(width - side), width))
    return torch.stack([m.float() for m in maps.values() if m.shape[1] == nearest ** 2]).mean(0)


def erasure(attention: Tensor, words: slice, rare: slice) -> Tensor:
    """L_cae of maps [n, places, tokens], in [0, 1], [n]: 0 if the rare word has all attention, 1 if it has none."""
    shares = (SHARPNESS * attention[:, :, words]).softmax(-1).square()
    own = shares[:, :, rare.start - words.start:rare.stop - words.start]
    return (1 - own.sum((1, 2)) / shares.sum((1, 2))).square()
