"""Anti-Diffusion: fit a prompt to the photo, then disturb noise prediction and cross-attention under it.

Zheng et al., "Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models", AAAI 2025
(arXiv:2503.05595): prompt tuning (PT) and the semantic disturbance loss (SDL). Written from the paper's abstract and
from facts about the released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.options import Variant, require_all, variant
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.attention import Maps
    from bench.diffusion.finetuning import Surrogate
    from bench.diffusion.loading import Components
    from bench.diffusion.surrogates import Draws, Losses
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "anti_diffusion", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    paper="Anti-Diffusion, AAAI 2025, arXiv:2503.05595", official_code="https://github.com/whulizheng/Anti-Diffusion",
)
class AntiDiffusion:
    """Every photo by itself: a prompt that fits it, pixels against that prompt, and a UNet that follows the pixels.

    PT: from the states of the empty prompt, ``prompt_steps`` steps down c <- c - lr * grad_c L_ldm(x; theta, c).
    Pixels: ``pgd_steps`` steps up J(x) = L_ldm(x; theta, c) - w * L_sdl(x; theta, c), where L_sdl is the squared
    distance of the cross-attention maps to zero. Then ``epochs`` times: ``tuning_steps`` steps of the UNet down
    L_ldm(x; theta, c) on the protected photo; pixels again; PT on the protected photo, from the prompt so far.

    ``eps``: budget in 0-255 levels; 0.05 on the [-1, 1] scale is 6.375 [default of the released program]; its demo
    script gives 0.01, which is 1.275. ``alpha_255``: 2e-3, which is 0.255 levels. ``epochs``, ``pgd_steps``,
    ``tuning_steps``, ``lr``: 5, 10, 20, 5e-7 [defaults of the released program]. ``prompt_steps``, ``prompt_lr``: 30
    and 1e-3 of AdamW [released code]. ``sdl_weight``: w, 1 [released code]. ``attention_factor``: width of latents by
    width of the maps; 4 is the 16x16 of 512-pixel photos [released code]. Maps of the down and up blocks count.

    ``variant``: ``described`` keeps photos within ``eps`` of the originals; L_sdl is the maps' squared norm over
    tokens, averaged over places and all heads (the norm's scale is ours: the paper was read as its abstract); the
    UNet's gradient is limited to norm 1. ``released`` does as its code does. (1) Each of the ``epochs`` + 1 rounds
    takes the photo that it finds as the centre of the ball, so budgets add up: 6 rounds of 10 * 0.255 levels reach
    15.3, not 6.375; the demo's 1.275 become 7.65. Its budget here is that sum. (2) Of each layer's heads it sees the
    later half, a slice meant for guidance batches. (3) L_sdl is mean(clamp(100 m, 0, 1)^2), which has no gradient
    where a token gets more than 1 % of the attention. (4) It clips over an iterator that its optimiser has already
    used up, so nothing is limited.

    Deviations from the released code that change no result: the UNet is frozen while pixels and prompts are optimised,
    latents are encoded once for training, and the prompt is not tuned once more at the end.
    """

    eps: float = 6.375
    alpha_255: float = 0.255
    epochs: int = 5
    pgd_steps: int = 10
    prompt_steps: int = 30
    prompt_lr: float = 1e-3
    tuning_steps: int = 20
    lr: float = 5e-7
    sdl_weight: float = 1.0
    attention_factor: int = 4
    variant: Variant = Variant.described

    def __post_init__(self) -> None:
        Budget(self.eps)
        least: dict[str, float] = {"epochs": 0, "pgd_steps": 0, "prompt_steps": 0, "tuning_steps": 0, "sdl_weight": 0,
                 "attention_factor": 1}
        require_all(self, above={"alpha_255": 0, "prompt_lr": 0, "lr": 0}, least=least)
        self.variant = variant(self.variant)

    def budget(self) -> Budget:
        """``eps``; of ``released``, what its rounds can add up to."""
        if self.variant is Variant.described:
            return Budget(self.eps)
        return Budget(min(255.0, (self.epochs + 1) * min(self.eps, self.pgd_steps * self.alpha_255)))

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each photo with a prompt and a UNet of its own."""
        from bench.diffusion.surrogates import protect_each

        desk = open_desk(self, model, ctx)
        return protect_each(subjects, self.budget(), model, ctx, "anti_diffusion",
                            lambda subject, x: disturb_each(self, subject, x, desk, ctx))


@dataclass
class Desk:
    """``surrogate``: the UNet that is tuned; ``start``: its published weights; ``empty``: the empty prompt's states."""

    parts: Components
    surrogate: Surrogate
    start: list[Tensor]
    empty: Tensor


def open_desk(method: AntiDiffusion, model: Model, ctx: Context) -> Desk:
    """Load the model once."""
    from bench.diffusion.finetuning import Surrogate
    from bench.diffusion.loading import load_components
    from bench.diffusion.losses import encode_prompts
    from bench.diffusion.surrogates import weights_of

    parts = load_components(model, ctx.device)
    clip = 1.0 if method.variant is Variant.described else None
    surrogate = Surrogate(parts, method.lr, clip, train_text_encoder=False)
    empty = encode_prompts(parts.tokenizer, parts.text_encoder, [""]).detach()
    return Desk(parts, surrogate, weights_of(surrogate), empty)


def disturb_each(method: AntiDiffusion, subject: Subject, x: Tensor, desk: Desk, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1], one after the other; floats within the budget."""
    import torch

    generator, found = ctx.generator(subject.name), []
    for place in range(len(x)):
        found.append(disturb(method, x[place:place + 1], desk, generator))
        ctx.progress(f"anti_diffusion {subject.name}", place + 1, len(x))
    return torch.cat(found)


def disturb(method: AntiDiffusion, x: Tensor, desk: Desk, generator: torch.Generator) -> Tensor:
    """One photo ``x`` [1, 3, h, w] after all rounds."""
    desk.surrogate.copy_from(desk.start)
    states = fit_prompt(method, desk, x, desk.empty, generator)
    perturbed = climb(method, desk, x, x, states, generator)
    for epoch in range(method.epochs):
        if epoch > 0:
            states = fit_prompt(method, desk, perturbed, states, generator)
        tune(method, desk, perturbed, states, generator)
        centre = x if method.variant is Variant.described else perturbed
        perturbed = climb(method, desk, perturbed, centre, states, generator)
    return perturbed


def fit_prompt(method: AntiDiffusion, desk: Desk, x: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
    """PT: c* = argmin_c L_ldm(x; theta, c), from ``states`` [1, length, width]."""
    import torch

    from bench.diffusion.losses import encode_latents, noise_prediction_loss

    with torch.no_grad():
        latents = encode_latents(desk.parts.vae, x, generator)
    states = states.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([states], lr=method.prompt_lr)
    for _ in range(method.prompt_steps):
        loss = noise_prediction_loss(desk.parts.unet, desk.parts.scheduler, latents, states, generator=generator)
        states.grad = torch.autograd.grad(loss, states)[0]
        optimizer.step()
    return states.detach()


def tune(method: AntiDiffusion, desk: Desk, x: Tensor, states: Tensor, generator: torch.Generator) -> None:
    """theta down L_ldm(x; theta, c), with a fresh AdamW; the UNet is frozen before and after."""
    import torch

    from bench.diffusion.finetuning import restart, update
    from bench.diffusion.losses import latent_distribution, noise_prediction_loss

    unet, surrogate = desk.parts.unet, desk.surrogate
    with torch.no_grad():
        found = latent_distribution(desk.parts.vae, x)
    restart(surrogate.optimizer)
    unet.requires_grad_(True)
    for _ in range(method.tuning_steps):
        loss = noise_prediction_loss(unet, desk.parts.scheduler, found.sample(generator), states, generator=generator)
        update(loss, surrogate.optimizer, surrogate.parameters, surrogate.clip)
    unet.requires_grad_(False)


def climb(
    method: AntiDiffusion, desk: Desk, x: Tensor, centre: Tensor, states: Tensor, generator: torch.Generator,
) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x J(x))), within ``eps`` of ``centre``."""
    from bench.diffusion.attention import latent_fractions, recorded
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import draw, latent_shape, pixel_gradient

    vae, unet, scheduler = desk.parts.vae, desk.parts.unet, desk.parts.scheduler
    sides = latent_fractions(latent_shape(vae, x)[2], (method.attention_factor,))
    with recorded(unet, sides, later_half=method.variant is Variant.released) as maps:
        for _ in range(method.pgd_steps):
            losses = objective(method, desk, states, draw(vae, scheduler, x, generator), maps)
            x = ascend(x, centre, pixel_gradient(x, losses, len(x)), method.alpha_255, method.eps)
    return x


def objective(method: AntiDiffusion, desk: Desk, states: Tensor, draws: Draws, maps: Maps) -> Losses:
    """J = L_ldm - w * L_sdl of each photo; the pass that predicts the noise fills ``maps``."""
    from bench.diffusion.surrogates import denoising_losses

    denoising = denoising_losses(desk.parts.vae, desk.parts.unet, desk.parts.scheduler, states, draws)

    def losses(pixels: Tensor, part: slice) -> Tensor:
        errors = denoising(pixels, part)                                      # L_ldm
        return errors - method.sdl_weight * semantics(method, maps)           # - w * L_sdl

    return losses


def semantics(method: AntiDiffusion, maps: Maps) -> Tensor:
    """L_sdl of each photo, [n]: how far the averaged maps [n, places, tokens] are from zero."""
    import torch

    chosen = [found for name, found in maps.cross.items() if not name.startswith("mid_block")]
    if not chosen:
        raise BenchError(f"defense.attention_factor={method.attention_factor}: this model has no cross-attention of "
                         "that width in its down and up blocks at this photo size; try 1, 2, 4 or 8.")
    average = torch.stack(chosen).mean(0)
    if method.variant is Variant.described:
        return average.square().sum(2).mean(1)
    return (100 * average).clamp(0, 1).square().mean((1, 2))
