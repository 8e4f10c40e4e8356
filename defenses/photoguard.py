"""PhotoGuard, encoder attack: move the latents of the photos to those of a picture that says nothing.

Salman et al., "Raising the Cost of Malicious AI-Powered Image Editing", ICML 2023 (arXiv:2302.06588), its encoder
attack. Written from the paper's objective and from facts about the released notebook; no line of that code is used.
The diffusion attack of the same paper, through a whole inpainting pipeline, is another method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Losses
    from bench.records import ImageSet, Model, Subject

ZERO = "zero"


@plugin(
    "defense", "photoguard", track=("customization", "editing"), acts_on="images", needs=("latents",),
    paper="PhotoGuard, ICML 2023, arXiv:2302.06588", official_code="https://github.com/MadryLab/photoguard",
)
class PhotoGuard:
    """Minimises the distance of the photos' latents to a target's; only the autoencoder's encoder is needed.

    min over ||delta||_inf <= eps of || E(x + delta) - z_target ||_2^2, with the mean of the encoder's posterior.

    ``eps``, ``alpha_255``: budget and first step in 0-255 levels [released: 0.06 and 0.02 on the [-1, 1] scale, so 7.65
    and 2.55 levels; the ports in other repositories take 16 and 1]. ``steps`` [released: 1000; ports: 100].
    ``decay``: step k of n has the length alpha (1 - 0.99 k / n) [released]. ``random_start``: begin at a random point
    of the budget [released]. ``target``: ``zero``, latents of nothing but zeros [released]; ``grey``, a grey picture
    [paper's example]; ``pattern``, lines of a word drawn by this project; or an image file, whose content
    ``target_sha256`` pins (filled in from the file). ``pgd_batch``: photos, also of several people, per gradient pass
    [ours]; it changes rounding only.

    The released code minimises the norm and not its square: on one photo the sign of the gradient is the same. The
    scale of the latents changes no sign either.
    """

    eps: float = 7.65
    alpha_255: float = 2.55
    steps: int = 1000
    decay: bool = True
    random_start: bool = True
    target: str = ZERO
    target_sha256: str = ""
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.data.targets import check_target
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={"steps": 0, "pgd_batch": 1})
        self.target_sha256 = check_target(self.target, self.target_sha256, "defense.target", (ZERO,))

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.loading import load_modules
        from bench.diffusion.surrogate_free import protect_crowds

        vae = load_modules(model, ctx.device)["vae"]
        return protect_crowds(subjects, self.budget(), model, ctx, "photoguard", self.pgd_batch,
                              lambda crowd: approach(self, crowd, vae, ctx))

    def step_length(self, step: int) -> float:
        """In levels: alpha at the first step, falling linearly to almost alpha / 100 at the last."""
        return self.alpha_255 * (1 - 0.99 * step / self.steps) if self.decay else self.alpha_255


def approach(method: PhotoGuard, crowd: Crowd, vae: Any, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x - alpha_k * sign(grad_x || E(x) - z ||^2))."""
    from bench.diffusion.projected_gradient import descend
    from bench.diffusion.surrogates import pixel_gradient

    losses = distances(vae, goal(method, vae, crowd.x.shape[-1]))
    x = crowd.start(method.eps, method.random_start)
    for step in range(method.steps):
        gradient = pixel_gradient(x, losses, method.pgd_batch)
        x = descend(x, crowd.x, gradient, method.step_length(step), method.eps)
        ctx.progress("photoguard", step + 1, method.steps)
    return x


def goal(method: PhotoGuard, vae: Any, size: int) -> Tensor:
    """z_target, broadcastable to the latents of every photo."""
    from bench.data.targets import target_picture
    from bench.diffusion.surrogate_free import target_latents

    picture = target_picture("grey" if method.target == ZERO else method.target, size)
    found = target_latents(vae, picture)
    return found.new_zeros(found.shape) if method.target == ZERO else found


def distances(vae: Any, target: Tensor) -> Losses:
    """|| E(x) - z_target ||_2^2 of each photo."""
    from bench.diffusion.losses import latent_distribution

    def losses(pixels: Tensor, part: slice) -> Tensor:
        return (latent_distribution(vae, pixels).mean - target).square().flatten(1).sum(1)

    return losses
