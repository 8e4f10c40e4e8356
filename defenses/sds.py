"""Diff-Protect: perturb photos along the score-distillation gradient, which never passes back through the UNet.

Xue et al., "Toward effective protection against diffusion-based mimicry through score distillation", ICLR 2024
(arXiv:2311.12832): SDS+, SDS- and SDST. Written from the paper's gradient and from facts about the released code; no
line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from bench.errors import unknown
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Draws, Losses
    from bench.records import ImageSet, Model, Subject

NO_TARGET = "none"


class Sign(Enum):
    """``plus`` goes up the semantic loss; ``minus`` goes down it, which the paper finds to protect better."""

    plus = "plus"
    minus = "minus"


@plugin(
    "defense", "sds", track=("customization", "editing"), acts_on="images", needs=("text_encoder",),
    paper="Diff-Protect, ICLR 2024, arXiv:2311.12832", official_code="https://github.com/xavihart/Diff-Protect",
)
class Sds:
    """Steps along or against the noise-prediction error pulled back through the encoder alone: half of AdvDM's cost.

    The semantic loss's gradient without the UNet's Jacobian: g = E_{t, n} (eps_theta(z_t, t, c) - n) dz/dx.
    SDS+ steps along sign(g), SDS- along -sign(g), and SDST along sign(+-rate g - d/dx || E(x) - z_target ||_2^2).

    ``eps``, ``alpha_255``, ``steps``: budget and step in 0-255 levels, how many steps [released: 16, 1, 100]. ``sign``:
    the direction of g. ``target``: ``none``, or SDST's picture: ``pattern``, drawn by this project in the manner of
    Mist's, which is theirs and not copied; ``grey``; or an image file, whose content ``target_sha256`` pins.
    ``target_rate``: rate [released: 5]. ``prompt``: c [released: "a photo", or "a portrait photo" for portraits].
    ``random_start`` [released: no]. ``pgd_batch``: photos, also of several people, per gradient pass [ours]; it changes
    rounding only.

    As released, g leaves out the factor sqrt(abar_t) of dz_t/dz. Deviations that cost no meaning: one draw of the
    encoder's posterior serves both the error and its pull-back, where the released code draws twice, and the target's
    latents are the posterior's mean, computed once. On a velocity-predicting model the error is that of the velocity, a
    positive multiple: SDS+ and SDS- are the same, SDST's balance is not.
    """

    eps: float = 16.0
    alpha_255: float = 1.0
    steps: int = 100
    sign: Sign = Sign.minus
    target: str = NO_TARGET
    target_sha256: str = ""
    target_rate: float = 5.0
    prompt: str = "a photo"
    random_start: bool = False
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.data.targets import check_target
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={"steps": 0, "target_rate": 0, "pgd_batch": 1})
        self.target_sha256 = check_target(self.target, self.target_sha256, "defense.target", (NO_TARGET,))
        try:
            self.sign = Sign(self.sign)
        except ValueError:
            raise unknown("sign", str(self.sign), "defense.sign", [s.value for s in Sign]) from None

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.loading import load_components
        from bench.diffusion.surrogate_free import protect_crowds

        parts = load_components(model, ctx.device)
        return protect_crowds(subjects, self.budget(), model, ctx, "sds", self.pgd_batch,
                              lambda crowd: distil(self, crowd, parts, ctx))


def distil(method: Sds, crowd: Crowd, parts: Components, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x + alpha * sign(pull_x))."""
    import torch

    from bench.diffusion.losses import encode_prompts
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import pixel_gradient

    with torch.no_grad():
        states = encode_prompts(parts.tokenizer, parts.text_encoder, [method.prompt])
    target = goal(method, parts, crowd.x.shape[-1])
    x = crowd.start(method.eps, method.random_start)
    for step in range(method.steps):
        losses = pulls(method, parts, states, target, crowd.draw(parts.vae, parts.scheduler))
        x = ascend(x, crowd.x, pixel_gradient(x, losses, method.pgd_batch), method.alpha_255, method.eps)
        ctx.progress("sds", step + 1, method.steps)
    return x


def goal(method: Sds, parts: Components, size: int) -> Tensor | None:
    """z_target of SDST, [1, c, h, w]; None without a target."""
    from bench.data.targets import target_picture
    from bench.diffusion.surrogate_free import target_latents

    return None if method.target == NO_TARGET else target_latents(parts.vae, target_picture(method.target, size))


def pulls(method: Sds, parts: Components, states: Tensor, target: Tensor | None, draws: Draws) -> Losses:
    """Of each photo, a number whose gradient is the step's direction: <+-residual, z>, and SDST's distance."""
    direction = 1 if method.sign is Sign.plus else -1

    def losses(pixels: Tensor, part: slice) -> Tensor:
        from bench.diffusion.losses import latent_distribution

        z = draws.latents(latent_distribution(parts.vae, pixels), part)
        along = (residual(parts, z, states, draws, part) * z).flatten(1).sum(1) * direction    # d/dx = +-g
        if target is None:
            return along
        return method.target_rate * along - (z - target).square().flatten(1).sum(1)            # SDST

    return losses


def residual(parts: Components, z: Tensor, states: Tensor, draws: Draws, part: slice) -> Tensor:
    """eps_theta(z_t, t, c) - n, a constant: no gradient enters the UNet."""
    import torch

    from bench.diffusion.losses import prediction_target, shown_beside

    with torch.no_grad():
        noise, timesteps = draws.noise[part], draws.timesteps[part]
        noisy = parts.scheduler.add_noise(z, noise, timesteps)
        beside = shown_beside(parts.vae, parts.unet, z)
        seen = noisy if beside is None else torch.cat([noisy, beside], dim=1)
        predicted: Tensor = parts.unet(seen, timesteps, states.expand(len(z), -1, -1)).sample
        return predicted - prediction_target(parts.scheduler, z, noise, timesteps)
