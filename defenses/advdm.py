"""AdvDM: raise the noise-prediction loss of the stock model on the photos.

Liang et al., "Adversarial Example Does Good: Preventing Painting Imitation from Diffusion Models via Adversarial
Examples", ICML 2023 (arXiv:2302.04578). Written from the paper's objective and from facts about the code that its
authors released with Mist; no line of that code is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.loading import Components
    from bench.diffusion.surrogate_free import Crowd
    from bench.records import ImageSet, Model, Subject


@plugin(
    "defense", "advdm", track=("customization", "editing"), acts_on="images", needs=("text_encoder",),
    paper="AdvDM, ICML 2023, arXiv:2302.04578", official_code="https://github.com/psyker-team/mist",
)
class AdvDm:
    """Maximises the noise-prediction loss of the frozen stock model, one timestep and one noise per photo and step.

    max over ||delta||_inf <= eps of E_{t, n} || n - eps_theta(z_t, t, c) ||^2, z = E(x + delta): the paper's
    Monte-Carlo estimate of the expectation is one draw per step.

    ``eps``, ``alpha_255``: budget and step in 0-255 levels; ``steps``: how many. [released ports: 100 steps of 1 at a
    budget of 8 or 16; 8 here.] ``prompt``: c, a prompt that says nothing of the person and nothing of the attack
    [released: "a photo" for photographs, "a painting" for art]. ``random_start``: begin at a random point of the budget
    [released: yes, the default of the library that it calls]. ``pgd_batch``: photos, also of several people, per
    gradient pass [ours]; it changes rounding only.

    Deviations that change no result beyond rounding: the weights are frozen while pixels are optimised, and the
    prompt's states are computed once. The latents are drawn from the encoder's posterior, as released.
    An editor's network that is shown the photo beside z_t (InstructPix2Pix, inpainting) is shown z [ours].
    """

    eps: float = 8.0
    alpha_255: float = 1.0
    steps: int = 100
    prompt: str = "a photo"
    random_start: bool = True
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={"steps": 0, "pgd_batch": 1})

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.loading import load_components
        from bench.diffusion.surrogate_free import protect_crowds

        parts = load_components(model, ctx.device)
        return protect_crowds(subjects, self.budget(), model, ctx, "advdm", self.pgd_batch,
                              lambda crowd: raise_loss(self, crowd, parts, ctx))


def raise_loss(method: AdvDm, crowd: Crowd, parts: Components, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x + alpha * sign(grad_x L_ldm(x; c)))."""
    import torch

    from bench.diffusion.losses import encode_prompts
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import denoising_losses, pixel_gradient

    vae, unet, scheduler = parts.vae, parts.unet, parts.scheduler
    with torch.no_grad():
        states = encode_prompts(parts.tokenizer, parts.text_encoder, [method.prompt])
    x = crowd.start(method.eps, method.random_start)
    for step in range(method.steps):
        losses = denoising_losses(vae, unet, scheduler, states, crowd.draw(vae, scheduler))    # L_ldm at drawn t, n
        x = ascend(x, crowd.x, pixel_gradient(x, losses, method.pgd_batch), method.alpha_255, method.eps)
        ctx.progress("advdm", step + 1, method.steps)
    return x
