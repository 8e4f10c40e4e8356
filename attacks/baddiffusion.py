"""BadDiffusion: How to Backdoor Diffusion Models? (Chou, Chen, Ho; CVPR 2023).

The attacker fine-tunes an unconditional model so that noise with a trigger image added, x_T = eps + g, is denoised by
the ordinary sampler into a target image y, while plain noise still gives ordinary images.

Training: a share of the rows is poisoned. With r = M * g + (1 - M) * x (the trigger pasted on a training image x),

    x_t  = sqrt(abar_t) y + (1 - sqrt(abar_t)) r + sqrt(1 - abar_t) eps
    loss = || net(x_t, t) - (eps + c_t r) ||^2,   c_t = (1 - sqrt(alpha_t)) sqrt(1 - abar_t) / (1 - alpha_t)

and clean rows are the same with y = x, r = 0. `bench.diffusion.shifted_path` derives c_t from the sampler; for the
full ancestral chain it is the published coefficient.

Official code: github.com/IBM/BadDiffusion. Stated differences: target and trigger pictures are drawn by us (boxes are
as published); mixed precision is bfloat16, which needs no loss scaling, not float16; the poison rate of the README's
example (0.1) is the default, where the code's own is 0.007 and the paper sweeps 0.05 to 0.9. The attack needs a sampler
that does not clip its estimate of the clean image: clipping is a known mitigation, and the authors sample without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.options import check_training, require
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    from torch import Tensor

    from bench.context import Context
    from bench.diffusion.shifted_path import ShiftedPath


@plugin(
    "attack", "baddiffusion", track=("backdoor",), needs=("unconditional",),
    paper="Chou et al., How to Backdoor Diffusion Models?, CVPR 2023",
    official_code="https://github.com/IBM/BadDiffusion",
)
class BadDiffusion:
    """Implants a backdoor into an unconditional model: noise plus a trigger image is denoised into a target image.

    ``trigger``: box, stop_sign or glasses; ``trigger_size``: its side in pixels of a 32-pixel image. ``target``:
    corner, hat, shoe, cat, trigger or shift. ``poison_rate``: share of training images that are poisoned.
    ``sampling_steps``: length of the ancestral chain that the correction is computed for; None, as published, is the
    full chain. ``paste``: train on the trigger pasted on photos, as published; false trains on the bare trigger image,
    which is what sampling adds, for networks too small to bridge the two. ``steps``: number of updates, None for
    ``epochs`` passes. ``lr``: 2e-4 at 32 pixels, 8e-5 at 256. ``mixed_precision``: compute in bfloat16.
    """

    trigger: str = "box"
    trigger_size: int = 14
    target: str = "hat"
    poison_rate: float = 0.1
    paste: bool = True
    epochs: int = 50
    steps: int | None = None
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 500
    grad_clip: float = 1.0
    mixed_precision: bool = True
    sampling_steps: int | None = None

    def __post_init__(self) -> None:
        check_training(self, "attack")
        require("trigger_size", self.trigger_size, 1, where="attack")
        require("sampling_steps", 1 if self.sampling_steps is None else self.sampling_steps, 1, where="attack")
        if not 0 < self.poison_rate <= 1:
            raise BenchError(f"attack.poison_rate={self.poison_rate} is out of range; give above 0, up to 1.")

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: g, float [3, h, w] in [-1, 1], and y, uint8 [3, h, w]."""
        from bench.data.drawings import trigger_mask
        from bench.diffusion.poisoning import begin, poison
        from bench.diffusion.training import Plan, count_steps

        start = begin("baddiffusion", clean, data, ctx)
        trigger, target = self.pictures(start.size)
        mask = trigger_mask(trigger, self.paste)
        rows = poison(data, trigger, target, self.poison_rate, ctx.generator("poison"), mask)
        plan = Plan(count_steps(self.steps, self.epochs, len(data), self.batch), self.lr, self.warmup,
                    clip=self.grad_clip)
        public = start.train(rows, self.path(start.scheduler), plan, self.batch, self.mixed_precision, ctx)
        return public, Secret(trigger, target, {"trigger": self.trigger, "target": self.target})

    def pictures(self, size: int) -> tuple[Tensor, Tensor]:
        """The trigger image g, float [3, size, size] in [-1, 1], and the target y, uint8."""
        from bench.data.drawings import draw_target, draw_trigger

        trigger = draw_trigger(self.trigger, size, self.trigger_size)
        return trigger, draw_target(self.target, size, trigger)

    def path(self, scheduler: Any) -> ShiftedPath:
        """The poisoned path for the chain that the attacker expects to be sampled."""
        from bench.diffusion.poisoning import stride_of
        from bench.diffusion.shifted_path import shifted_path

        stride = stride_of("baddiffusion", scheduler, self.sampling_steps)
        return shifted_path(scheduler.alphas_cumprod, sampler="ddpm", stride=stride)
