"""ASPL, the main method of Anti-DreamBooth: perturb photos against a surrogate that keeps learning them.

Van Le et al., "Anti-DreamBooth: Protecting users from personalized text-to-image synthesis", ICCV 2023
(arXiv:2303.15433): alternating surrogate and perturbation learning. Written from the paper and from
facts about the released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.options import Variant, require_all, variant
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.pairs import Pair
    from bench.diffusion.surrogates import Teaching
    from bench.records import ImageSet, Model, Subject


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
        require_all(self, above=dict.fromkeys(("alpha_255", "lr"), 0.0), least={
            "outer_steps": 0, "surrogate_steps": 0, "pgd_steps": 0, "prior_weight": 0, "batch": 1, "class_images": 1,
            "class_steps": 1, "pgd_batch": 1})
        self.variant = variant(self.variant)

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each from a surrogate that starts at the published weights."""
        from bench.diffusion.pairs import open_pair
        from bench.diffusion.surrogates import protect_each

        pair = open_pair(model, self.teaching(), ctx, half=self.variant is Variant.released)
        return protect_each(subjects, self.budget(), model, ctx, "aspl", lambda s, x: alternate(self, s, x, pair, ctx))

    def teaching(self) -> Teaching:
        from bench.diffusion.surrogates import Teaching

        clip = 1.0 if self.variant is Variant.described else None
        return Teaching(self.lr, self.batch, self.prior_weight, self.class_images, self.class_steps,
                        self.train_text_encoder, self.token, clip)


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
