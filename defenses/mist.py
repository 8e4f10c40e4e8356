"""Mist: latents towards a textured picture, and the noise-prediction loss up, alone or together.

Liang and Wu, "Mist: Towards Improved Adversarial Examples for Diffusion Models", 2023 (arXiv:2305.12683). Written from
the paper's objectives and from facts about the released code (v1); no line of that code is used.
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

REFERENCE_LATENTS = 4 * 64 * 64
"""Numbers in the latents of a 512 pixel photo, at which the published weight was chosen."""


class Mode(Enum):
    """Which terms are optimised."""

    textural = "textural"
    semantic = "semantic"
    fused = "fused"


@plugin(
    "defense", "mist", track=("customization", "editing"), acts_on="images", needs=("text_encoder",),
    paper="Mist, arXiv:2305.12683", official_code="https://github.com/psyker-team/mist",
)
class Mist:
    """Moves the photos' latents to a textured picture's while it raises the stock model's noise-prediction loss.

    Maximised: ``textural`` J = -|| E(x + delta) - z_target ||_2^2; ``semantic`` J = L_ldm, that is AdvDM; ``fused``
    J = w L_ldm - || E(x + delta) - z_target ||_2^2 [released default].

    ``eps``, ``alpha_255``, ``steps``: budget and step in 0-255 levels, how many steps [released: 16, 1, 100].
    ``fused_weight``: w [released: 1e4]. The released code adds a sum over the latents to w times a mean over them, a
    balance that holds at its 512 pixels only, so the sum is scaled to the 16384 latents of a 512 pixel photo at every
    size [ours; at 512 pixels nothing changes]. ``target``: the picture. Theirs, repeated words, ships under another
    licence and is not copied: ``pattern`` is one of the same kind drawn by this project; ``grey``, or an image file
    (say, theirs), whose content ``target_sha256`` pins. ``prompt``: c [released: "a photo" for photographs].
    ``random_start`` [released: yes, the default of the library that it calls]. ``pgd_batch``: photos, also of several
    people, per gradient pass [ours]; it changes rounding only.

    Deviations: the target's latents are the posterior's mean, computed once, where the released code draws them anew at
    every step; the released code's file may exceed its budget by a level through rounding, ours may not.
    An editor's network that is shown the photo beside z_t (InstructPix2Pix, inpainting) is shown z [ours].
    """

    eps: float = 16.0
    alpha_255: float = 1.0
    steps: int = 100
    mode: Mode = Mode.fused
    fused_weight: float = 1e4
    target: str = "pattern"
    target_sha256: str = ""
    prompt: str = "a photo"
    random_start: bool = True
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.data.targets import check_target
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={"steps": 0, "fused_weight": 0, "pgd_batch": 1})
        self.target_sha256 = check_target(self.target, self.target_sha256, "defense.target")
        try:
            self.mode = Mode(self.mode)
        except ValueError:
            raise unknown("mode", str(self.mode), "defense.mode", [m.value for m in Mode]) from None

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.loading import load_components
        from bench.diffusion.surrogate_free import protect_crowds

        parts = load_components(model, ctx.device)
        return protect_crowds(subjects, self.budget(), model, ctx, "mist", self.pgd_batch,
                              lambda crowd: climb(self, crowd, parts, ctx))


def climb(method: Mist, crowd: Crowd, parts: Components, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x + alpha * sign(grad_x J))."""
    import torch

    from bench.data.targets import target_picture
    from bench.diffusion.losses import encode_prompts
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogate_free import target_latents
    from bench.diffusion.surrogates import pixel_gradient

    with torch.no_grad():
        states = encode_prompts(parts.tokenizer, parts.text_encoder, [method.prompt])
    target = target_latents(parts.vae, target_picture(method.target, crowd.x.shape[-1]))
    x = crowd.start(method.eps, method.random_start)
    for step in range(method.steps):
        losses = objectives(method, parts, states, target, crowd.draw(parts.vae, parts.scheduler))
        x = ascend(x, crowd.x, pixel_gradient(x, losses, method.pgd_batch), method.alpha_255, method.eps)
        ctx.progress("mist", step + 1, method.steps)
    return x


def objectives(method: Mist, parts: Components, states: Tensor, target: Tensor, draws: Draws) -> Losses:
    """J of each photo. ``states``: [1, length, width]; ``target``: z_target [1, c, h, w]."""

    def losses(pixels: Tensor, part: slice) -> Tensor:
        from bench.diffusion.losses import latent_distribution

        z = draws.latents(latent_distribution(parts.vae, pixels), part)
        if method.mode is Mode.textural:
            return -textural(z, target)
        if method.mode is Mode.semantic:
            return semantic(parts, z, states, draws, part)
        return method.fused_weight * semantic(parts, z, states, draws, part) - textural(z, target)

    return losses


def textural(z: Tensor, target: Tensor) -> Tensor:
    """|| z - z_target ||_2^2 of each photo, as large as it would be on a 512 pixel photo."""
    return (z - target).square().flatten(1).mean(1) * REFERENCE_LATENTS


def semantic(parts: Components, z: Tensor, states: Tensor, draws: Draws, part: slice) -> Tensor:
    """L_ldm of each photo's latents: mean || n - eps_theta(z_t, t, c) ||^2 at the drawn t and n."""
    import torch

    from bench.diffusion.losses import noise_prediction_errors, shown_beside

    return noise_prediction_errors(
        parts.unet, parts.scheduler, z, states.expand(len(z), -1, -1), generator=torch.Generator(),
        timesteps=draws.timesteps[part], noise=draws.noise[part], beside=shown_beside(parts.vae, parts.unet, z))
