"""DiffusionGuard: blow up what an inpainting model predicts at its first step, whatever mask it is given.

Choi et al., "DiffusionGuard: A Robust Defense Against Malicious Diffusion-based Image Editing", ICLR 2025
(arXiv:2410.05694). Written from the paper's objective and from facts about the released code; no line of that code is
used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.editors import Editor, Losses, Request
    from bench.diffusion.surrogate_free import Crowd
    from bench.diffusion.surrogates import Draws
    from bench.records import ImageSet, Model, Subject

COARSE = 4
"""Side of the random field that a boundary follows."""


@plugin(
    "defense", "diffusionguard", track=("editing",), acts_on="images", needs=("text_encoder",), knows=("mask",),
    paper="DiffusionGuard, ICLR 2025, arXiv:2410.05694", official_code="https://github.com/choi403/DiffusionGuard",
)
class DiffusionGuard:
    """Maximises the norm of the noise predicted at the sampler's first step, under masks that shrink at random.

    max over ||delta||_inf <= eps of E_M || eps_theta(z_T, T; (x + delta) * M) ||_2: one pass per step, at the noisiest
    timestep, where an edit's layout is decided. M is 1 on what the attacker keeps of the photo; only those pixels are
    perturbed.

    ``eps``, ``alpha_255``, ``steps``: budget and step in 0-255 levels, how many steps [released: 16/255 and 1/255
    applied to images in [-1, 1], so 8 and 0.5 levels; 800]. ``sampler_steps``: of the sampler whose first timestep is
    T [released: 4, so 751 of 1000]. ``prompt``: none [released]. ``masks``: M is what the told edit's mask leaves, and
    shrinks; false, or no mask told: the whole photo [released: "global"]. ``shrink``: the boundary moves inwards by at
    most this share of the radius of a circle of M's area. ``pgd_batch``: photos per pass; it changes rounding only.

    Deviations. The released code moves the points of M's contour by random smoothed offsets, up to 15 times, and never
    out of M; here each photo's boundary moves inwards by a random depth that varies smoothly along it, ``shrink`` 0.25
    [ours]: as there, every mask lies within M. z_T is pure noise where the network is shown the photo (inpainting,
    instructions); one that is shown no photo sees it noised to T. In 32 bits, there 16.
    """

    eps: float = 8.0
    alpha_255: float = 0.5
    steps: int = 800
    sampler_steps: int = 4
    prompt: str = ""
    masks: bool = True
    shrink: float = 0.25
    pgd_batch: int = 8

    def __post_init__(self) -> None:
        from bench.options import require_all

        Budget(self.eps)
        require_all(self, above={"alpha_255": 0}, least={
            "steps": 0, "sampler_steps": 1, "shrink": 0, "pgd_batch": 1})
        if self.shrink > 1:
            raise BenchError(f"defense.shrink={self.shrink} is out of range; give 0 to 1.")

    def budget(self) -> Budget:
        return Budget(self.eps)

    def protect(self, subjects: Sequence[Subject], model: Model, ctx: Context) -> list[ImageSet]:
        """Set B of each subject."""
        from bench.diffusion.editors import open_editor
        from bench.diffusion.surrogate_free import protect_crowds

        editor = open_editor(model, ctx)
        return protect_crowds(subjects, self.budget(), model, ctx, "diffusionguard", self.pgd_batch,
                              lambda crowd: blow_up(self, crowd, editor, ctx))


def blow_up(method: DiffusionGuard, crowd: Crowd, editor: Editor, ctx: Context) -> Tensor:
    """Photos [n, 3, h, w] in [-1, 1] after ``steps`` steps x <- Pi_eps(x + alpha * sign(grad_x ||eps_theta||_2))."""
    import torch

    from bench.diffusion.editors import ask
    from bench.diffusion.projected_gradient import ascend
    from bench.diffusion.surrogates import pixel_gradient

    request = ask(editor, crowd, method.prompt)
    kept = 1 - request.painted if method.masks else torch.ones_like(request.painted)
    early = torch.full((len(crowd.x),), first_timestep(method, editor), device=crowd.x.device)
    x = crowd.x
    for step in range(method.steps):
        draws = replace(crowd.draw(editor.vae, editor.scheduler), timesteps=early)
        seen = shrunk(kept, crowd.uniform((1, COARSE + 1, COARSE), 0, 1), method.shrink)
        gradient = pixel_gradient(x, norms(editor, request, draws, seen), method.pgd_batch)
        x = ascend(x, crowd.x, gradient, method.alpha_255, method.eps)
        ctx.progress("diffusionguard", step + 1, method.steps)
    return x


def first_timestep(method: DiffusionGuard, editor: Editor) -> int:
    """Where a sampler of ``sampler_steps`` equal steps begins, one above the last multiple of its stride."""
    total = int(editor.scheduler.config.num_train_timesteps)
    stride = max(total // method.sampler_steps, 1)
    return min((method.sampler_steps - 1) * stride + 1, total - 1)


def norms(editor: Editor, request: Request, draws: Draws, seen: Tensor) -> Losses:
    """|| eps_theta(z_T, T; x * M) ||_2 of each photo. ``seen``: M, [n, 1, h, w]."""
    hidden = replace(request, painted=1 - seen)

    def losses(pixels: Tensor, part: slice) -> Tensor:
        output = editor.look(pixels * seen[part], hidden, request.states[part], draws, part, pure=True).output
        return output.flatten(1).norm(dim=1)

    return losses


def shrunk(kept: Tensor, dice: Tensor, most: float) -> Tensor:
    """Masks within ``kept`` [n, 1, h, w] (1 or 0), whose boundary moved inwards by a random depth.

    ``dice``: [n, 1, 1 + k, k] in [0, 1): a mask's own scale, and how the depth varies over the photo. The border of the
    photo is no boundary. A mask of all ones stays.
    """
    from torch.nn.functional import interpolate

    radius = (kept.sum((1, 2, 3), keepdim=True) / math.pi).sqrt()
    field = interpolate(dice[:, :, 1:], kept.shape[2:], mode="bilinear", align_corners=False)
    wanted = most * radius * dice[:, :, :1, :1] * field
    return kept * (depth(kept, math.ceil(most * radius.max().item())) >= wanted)


def depth(kept: Tensor, most: int) -> Tensor:
    """How many pixels each place lies within ``kept``, 0 to ``most``."""
    import torch
    from torch.nn.functional import max_pool2d

    outside, found = 1 - kept, torch.zeros_like(kept)
    for _ in range(most):
        outside = max_pool2d(outside, 3, stride=1, padding=1)
        found = found + (1 - outside)
    return found
