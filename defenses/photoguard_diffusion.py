"""PhotoGuard, diffusion attack: move what a whole edit of the photo looks like, through a few steps of its sampler.

Salman et al., "Raising the Cost of Malicious AI-Powered Image Editing", ICML 2023 (arXiv:2302.06588), its diffusion
attack. Written from the paper's objective and from facts about the released notebook; no line of that code is used.
The encoder attack of the same paper is `photoguard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.editors import Course, Editor, Losses, Request
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Draws
    from bench.records import ImageSet, Model, Subject

ZERO = "zero"


class Norm(Enum):
    """Which ball the steps stay in, and how they are taken."""

    linf = "linf"
    l2 = "l2"


@plugin(
    "defense", "photoguard_diffusion", track=("editing",), acts_on="images", needs=("text_encoder",),
    paper="PhotoGuard, ICML 2023, arXiv:2302.06588", official_code="https://github.com/MadryLab/photoguard",
)
class PhotoGuardDiffusion:
    """Minimises the distance of the photo's whole edit to a target picture, by gradients through the sampler.

    min over delta of || f(x + delta) - x_target ||_2, f an edit in ``sampler_steps`` steps with guidance, decoded.
    Every step takes the mean gradient over ``repeats`` draws of the noise.

    Budgets. The file's is always L-infinity: ``eps`` levels, whatever the norm. ``norm=linf``: sign steps of
    ``alpha_255`` [released: 0.1 and 0.006 on the [-1, 1] scale: 12.75 and 0.765 levels]. ``norm=l2``: steps of length
    ``l2_step`` along the gradient within an l2 ball of radius ``l2`` [released: 1 and 16, on the [-1, 1] scale at 512
    pixels; here they shrink with the square root of the number of pixels], cut to ``eps`` levels [ours; the released
    ball has no such limit].

    ``steps``, ``repeats`` [released: 200, 10], ``sampler_steps``, ``guidance``, ``strength`` [released: 4, 7.5, 0.7].
    ``image_guidance``: of InstructPix2Pix [that pipeline's default]. ``prompt``: nothing [released], so the defender
    need not know the edit. ``target``: ``zero``, a picture of zeros, mid-grey [released]; ``grey``, ``pattern``, or an
    image file, whose content ``target_sha256`` pins. ``pgd_batch``: photos per pass [released: 1]; it changes rounding
    only.

    Deviations: the released attack knows the inpainting pipeline and its mask; here f is the surrogate's own edit:
    noising and drawing on (SDEdit), by instruction, or inpainting, in which the mask is that of the told edit, nothing
    if none is told. DDIM with eta = 0 in place of 1, in 32 bits. ``strength`` means nothing to editors that are shown
    the photo: they start from noise. With an empty prompt, passes of the guidance that are equal are computed once.
    """

    eps: float = 12.75
    alpha_255: float = 0.765
    steps: int = 200
    repeats: int = 10
    norm: Norm = Norm.linf
    l2: float = 16.0
    l2_step: float = 1.0
    sampler_steps: int = 4
    guidance: float = 7.5
    image_guidance: float = 1.5
    strength: float = 0.7
    prompt: str = ""
    target: str = ZERO
    target_sha256: str = ""
    pgd_batch: int = 1

    def __post_init__(self) -> None:
        from bench.data.targets import check_target
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0, "l2": 0, "l2_step": 0, "strength": 0}, least={
            "steps": 0, "repeats": 1, "sampler_steps": 1, "guidance": 0, "image_guidance": 0, "pgd_batch": 1})
        if self.strength > 1:
            raise BenchError(f"defense.strength={self.strength} is out of range; give more than 0, at most 1.")
        self.target_sha256 = check_target(self.target, self.target_sha256, "defense.target", (ZERO,))
        try:
            self.norm = Norm(self.norm)
        except ValueError:
            raise unknown("norm", str(self.norm), "defense.norm", [n.value for n in Norm]) from None

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.editors import open_editor
        from bench.diffusion.surrogate_free import protect_crowds

        editor = open_editor(model, ctx)
        return protect_crowds(subjects, self.budget(), model, ctx, "photoguard_diffusion", self.pgd_batch,
                              lambda crowd: approach(self, crowd, editor, ctx))

    def course(self) -> Course:
        from bench.diffusion.editors import Course

        return Course(self.sampler_steps, self.guidance, self.image_guidance, self.strength)


def approach(method: PhotoGuardDiffusion, crowd: Crowd, editor: Editor, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps down the mean gradient of the distance."""
    import torch

    from bench.diffusion.editors import ask
    from bench.diffusion.surrogates import pixel_gradient

    request = ask(editor, crowd, method.prompt)
    goal = picture(method, crowd.x)
    x = crowd.x
    for step in range(method.steps):
        gradient = torch.zeros_like(x)
        for _ in range(method.repeats):
            draws = crowd.draw(editor.vae, editor.scheduler)
            gradient += pixel_gradient(x, losses_of(method, editor, request, draws, goal), method.pgd_batch)
        x = moved(method, x, crowd.x, gradient / method.repeats)
        ctx.progress("photoguard_diffusion", step + 1, method.steps)
    return x


def picture(method: PhotoGuardDiffusion, x: Tensor) -> Tensor:
    """x_target, [1, 3, h, w] in [-1, 1]."""
    from bench.data.targets import target_picture
    from bench.diffusion.images import to_float

    if method.target == ZERO:
        return x.new_zeros(1, *x.shape[1:])
    return to_float(target_picture(method.target, x.shape[-1])).to(x)


def losses_of(
    method: PhotoGuardDiffusion, editor: Editor, request: Request, draws: Draws, goal: Tensor,
) -> Losses:
    """|| f(x) - x_target ||_2 of each photo at one draw of the noise."""
    from bench.diffusion.editors import decoded, edited_latents

    course, prompted = method.course(), bool(method.prompt)

    def losses(pixels: Tensor, part: slice) -> Tensor:
        latents = edited_latents(editor, pixels, request, draws, part, course, prompted)
        return (decoded(editor.vae, latents) - goal).flatten(1).norm(dim=1)

    return losses


def moved(method: PhotoGuardDiffusion, x: Tensor, origin: Tensor, gradient: Tensor) -> Tensor:
    """One step down ``gradient``, within the budget and the range of images."""
    from bench.diffusion.editors import REFERENCE
    from bench.diffusion.projected_gradient import descend, project

    if method.norm is Norm.linf:
        return descend(x, origin, gradient, method.alpha_255, method.eps)      # x <- Pi(x - alpha sign(g))
    scale = x.shape[-1] / REFERENCE
    change = x - method.l2_step * scale * within(gradient, None) - origin      # x <- Pi(x - alpha g / ||g||)
    return project(origin + within(change, method.l2 * scale), origin, method.eps)


def within(change: Tensor, radius: float | None) -> Tensor:
    """Each photo's change [n, 3, h, w] cut to l2 length ``radius``; None: brought to length 1."""
    length = change.flatten(1).norm(dim=1)[:, None, None, None].clamp(min=1e-12)
    return change / length if radius is None else change * (radius / length).clamp(max=1)
