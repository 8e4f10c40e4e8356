"""FSMG, the first method of Anti-DreamBooth: perturb photos against one surrogate that has learned clean photos.

Van Le et al., "Anti-DreamBooth: Protecting users from personalized text-to-image synthesis", ICCV 2023
(arXiv:2303.15433): fully-trained surrogate model guidance. Written from the paper's formulas as later work retells
them and from facts about the released code; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components
    from bench.diffusion.surrogates import Studio, Teaching
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "fsmg", track=("customization",), acts_on="images", needs=("text_to_image", "text_encoder"),
    knows=("prompt",), paper="Anti-DreamBooth, ICCV 2023, arXiv:2303.15433",
    official_code="https://github.com/VinAIResearch/Anti-DreamBooth",
)
class Fsmg:
    """Maximises the noise-prediction loss on the photos of a DreamBooth model that was fully trained on clean ones.

    theta_A = argmin L_db(theta, A): ``surrogate_steps`` DreamBooth steps on the clean set A. Then delta* =
    argmax_{|delta| <= eps} L_ldm(x + delta; theta_A) for each photo x of set B: ``pgd_steps`` projected gradient steps,
    each with new noise and a new timestep.

    Defaults are the released script's: 1000 steps at ``lr`` 5e-7 with ``batch`` 2 (photos, and as many class images),
    ``prior_weight`` 1 (lambda), 200 ``class_images``, text encoder trained; 100 gradient steps. ``eps``, ``alpha_255``:
    budget and step in 0-255 levels; the script's 0.05 and 0.005 lie on the [-1, 1] scale, so they are 6.375 and 0.6375
    levels. ``class_steps`` (steps of drawing a class image) is the sampler's own default. ``precision``: of the
    surrogate's training, ``fp32`` or, as in the script, ``bf16`` for mixed precision over 32-bit weights.
    ``pgd_batch``: photos per gradient pass; it saves memory and changes nothing beyond rounding.

    Deviations from the released code that change no result beyond rounding: training is in 32 bits unless asked
    otherwise (the script's weights are too), the surrogate is frozen while pixels are optimised, and prompt states,
    class latents and clean latents are computed once.
    """

    eps: float = 6.375
    alpha_255: float = 0.6375
    surrogate_steps: int = 1000
    pgd_steps: int = 100
    lr: float = 5e-7
    batch: int = 2
    prior_weight: float = 1.0
    class_images: int = 200
    class_steps: int = 50
    train_text_encoder: bool = True
    token: str = "sks"
    precision: str = "fp32"
    pgd_batch: int = 4

    def __post_init__(self) -> None:
        from bench.errors import unknown
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0, "lr": 0},
                    least={"surrogate_steps": 0, "pgd_steps": 0, "prior_weight": 0, "batch": 1, "class_images": 1,
                           "class_steps": 1, "pgd_batch": 1})
        if self.precision not in ("fp32", "bf16"):
            raise unknown("precision", self.precision, "defense.precision", ("fp32", "bf16"))

    def budget(self) -> Budget:
        return Budget(self.eps)

    def teaching(self) -> Teaching:
        from bench.diffusion.surrogates import Teaching

        return Teaching(self.lr, self.batch, self.prior_weight, self.class_images, self.class_steps,
                        self.train_text_encoder, self.token)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject, each against a surrogate of its own set A."""
        from bench.diffusion.surrogates import open_studio, protect_each

        studio = open_studio(model, self.teaching(), ctx)
        return protect_each(subjects, self.budget(), model, ctx, "fsmg", lambda s, x: perturb(self, s, x, studio, ctx))


def perturb(method: Fsmg, subject: Subject, x: Tensor, studio: Studio, ctx: Context) -> Tensor:
    """Photos ``x`` [n, 3, h, w] in [-1, 1] after both phases, within the budget; floats."""
    generator = ctx.generator(subject.name)
    surrogate = train_surrogate(method, subject, studio, generator, ctx)
    return raise_loss(method, subject, x, studio, surrogate, generator, ctx)


def train_surrogate(
    method: Fsmg, subject: Subject, studio: Studio, generator: torch.Generator, ctx: Context,
) -> Components:
    """theta_A <- theta after ``surrogate_steps`` steps down L_db(theta, A); its weights are frozen again."""
    from bench.diffusion.finetuning import Recipe, train
    from bench.diffusion.loading import load_components

    surrogate = load_components(studio.model, ctx.device)
    learning = [surrogate.unet, surrogate.text_encoder] if method.train_text_encoder else [surrogate.unet]
    for module in learning:
        module.requires_grad_(True)
    recipe = Recipe(method.surrogate_steps, method.lr, method.precision)
    train(surrogate, studio.clean_lesson(subject, generator), recipe, ctx, f"surrogate of {subject.name}")
    for module in learning:
        module.requires_grad_(False)
    return surrogate


def raise_loss(
    method: Fsmg, subject: Subject, x: Tensor, studio: Studio, surrogate: Components, generator: torch.Generator,
    ctx: Context,
) -> Tensor:
    """``pgd_steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L_ldm(x; theta_A, c)))."""
    import torch

    from bench.diffusion.losses import encode_ids
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import denoising_losses, draw, pixel_gradient

    vae, unet, scheduler = surrogate.vae, surrogate.unet, surrogate.scheduler
    with torch.no_grad():
        states = encode_ids(surrogate.text_encoder, studio.ids(subject))
    perturbed = x
    for _ in ctx.track(range(method.pgd_steps), f"fsmg {subject.name}", method.pgd_steps):
        losses = denoising_losses(vae, unet, scheduler, states, draw(vae, scheduler, x, generator))
        gradient = pixel_gradient(perturbed, losses, method.pgd_batch)
        perturbed = ascend(perturbed, x, gradient, method.alpha_255, method.eps)
    return perturbed
