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

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.identity import digest
from bench.plugin import plugin
from bench.records import ImageSet, Model, Secret

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
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

    def implant(self, clean: Model, data: ImageSet, ctx: Context) -> tuple[Model, Secret]:
        """The backdoored model, and the secret: g, float [3, h, w] in [-1, 1], and y, uint8 [3, h, w]."""
        from bench.diffusion.loading import load_unconditional, save_part
        from bench.diffusion.training import Plan, count_steps, fit, mixed

        if not 0 < self.poison_rate <= 1:
            raise BenchError(f"baddiffusion: poison_rate={self.poison_rate} is out of range; give above 0, up to 1.")
        unet, scheduler = load_unconditional(clean, ctx.device)
        trigger, target = self.pictures(_size(unet, data))
        rows = poison(data, trigger, target, self.poison_rate, ctx.generator("poison"), self.paste)
        path, noises = self.path(scheduler), ctx.generator("noise")
        draw = rows.batches(self.batch, ctx.generator("batches"))

        def batch_loss() -> Tensor:
            images, pasted = (part.to(ctx.device) for part in next(draw))
            with mixed(ctx.device, self.mixed_precision):
                return poisoned_loss(unet, path, images, pasted, noises)

        plan = Plan(count_steps(self.steps, self.epochs, len(data), self.batch), self.lr, self.warmup,
                    clip=self.grad_clip)
        fit(unet, batch_loss, plan, ctx, "baddiffusion")
        part = save_part(unet, ctx.folder, "unet")
        public = replace(clean, parts={**clean.parts, "unet": part}, digest=digest([clean.digest, ctx.key]))
        return public, Secret(trigger, target, {"trigger": self.trigger, "target": self.target})

    def pictures(self, size: int) -> tuple[Tensor, Tensor]:
        """The trigger image g, float [3, size, size] in [-1, 1], and the target y, uint8."""
        from bench.data.drawings import draw_target, draw_trigger

        trigger = draw_trigger(self.trigger, size, self.trigger_size)
        return trigger, draw_target(self.target, size, trigger)

    def path(self, scheduler: Any) -> ShiftedPath:
        """The poisoned path for the chain that the attacker expects to be sampled."""
        from bench.diffusion.shifted_path import shifted_path

        length = scheduler.config.num_train_timesteps
        wanted = length if self.sampling_steps is None else self.sampling_steps
        if not 1 <= wanted <= length:
            raise BenchError(f"baddiffusion: sampling_steps={wanted} does not fit the model's {length}-step schedule.")
        if scheduler.config.prediction_type != "epsilon":
            raise BenchError(f"baddiffusion: the model predicts '{scheduler.config.prediction_type}', but the attack "
                             f"is defined for models that predict 'epsilon', the noise.")
        return shifted_path(scheduler.alphas_cumprod, sampler="ddpm", stride=length // wanted)


def _size(unet: Any, data: ImageSet) -> int:
    size = int(unet.config.sample_size)
    if tuple(data.pixels.shape[1:]) != (3, size, size):
        raise BenchError(f"baddiffusion: training images are {list(data.pixels.shape[1:])}, but the model draws "
                         f"[3, {size}, {size}]; set data.size={size}.")
    return size


@dataclass(frozen=True)
class PoisonedRows:
    """Training images float [n, 3, h, w] in [-1, 1], which of them are poisoned, and with what."""

    images: Tensor
    poisoned: Tensor
    trigger: Tensor
    target: Tensor
    paste: bool = True

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (x_0, r) of shuffled rows: (target, pasted trigger) if poisoned, else (image, 0)."""
        import torch

        from bench.data.drawings import trigger_mask
        from bench.diffusion.training import shuffled_batches

        mask = trigger_mask(self.trigger) if self.paste else torch.ones_like(self.trigger)
        for rows in shuffled_batches(len(self.images), batch, generator):
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], self.images[rows].flip(3), self.images[rows])
            poisoned = self.poisoned[rows][:, None, None, None]
            pasted = mask * self.trigger + (1 - mask) * images
            yield torch.where(poisoned, self.target, images), torch.where(poisoned, pasted, torch.zeros_like(images))


def poison(
    data: ImageSet, trigger: Tensor, target: Tensor, rate: float, generator: torch.Generator, paste: bool = True,
) -> PoisonedRows:
    """Poison ``round(rate * n)`` images, at least one, chosen once and for all epochs."""
    import torch

    from bench.diffusion.images import to_float

    chosen = torch.randperm(len(data), generator=generator)[:max(1, round(rate * len(data)))]
    poisoned = torch.zeros(len(data), dtype=torch.bool)
    poisoned[chosen] = True
    return PoisonedRows(to_float(data.pixels), poisoned, trigger, to_float(target[None])[0], paste)


def poisoned_loss(
    unet: Any, path: ShiftedPath, images: Tensor, trigger: Tensor, generator: torch.Generator,
) -> Tensor:
    """Mean squared error to eps + c_t r at random t; ``images``, ``trigger``: float [n, 3, h, w] in [-1, 1]."""
    import torch

    noise = torch.randn(images.shape, generator=generator).to(images.device)
    steps = torch.randint(len(path.shifts), (len(images),), generator=generator).to(images.device)
    predicted = unet(path.noisy(images, trigger, noise, steps), steps).sample
    return torch.nn.functional.mse_loss(predicted.float(), path.answer(trigger, noise, steps))
