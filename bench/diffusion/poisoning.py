"""What backdoors that shift the diffusion path share: poisoned rows, their loss, and the training run.

The family (BadDiffusion, VillanDiffusion, InviBackdoor) and its formulas: `bench.diffusion.shifted_path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.diffusion.images import to_float
from bench.diffusion.loading import load_unconditional, save_part
from bench.diffusion.shifted_path import ShiftedPath
from bench.diffusion.training import Plan, fit, mixed, shuffled_batches
from bench.errors import BenchError
from bench.identity import digest
from bench.records import ImageSet, Model

if TYPE_CHECKING:
    from bench.context import Context


@dataclass(frozen=True)
class PoisonedRows:
    """Training images float [n, 3, h, w] in [-1, 1], which of them are poisoned, and with what.

    ``mask``: 1 where the trigger covers an image, [3, h, w]; all ones for the bare trigger.
    """

    images: Tensor
    poisoned: Tensor
    trigger: Tensor
    target: Tensor
    mask: Tensor

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (x_0, r) of shuffled rows: (target, pasted trigger) if poisoned, else (image, 0)."""
        for rows in shuffled_batches(len(self.images), batch, generator):
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], self.images[rows].flip(3), self.images[rows])
            poisoned = self.poisoned[rows][:, None, None, None]
            pasted = self.mask * self.trigger + (1 - self.mask) * images
            yield torch.where(poisoned, self.target, images), torch.where(poisoned, pasted, torch.zeros_like(images))


def poison(
    data: ImageSet, trigger: Tensor, target: Tensor, rate: float, generator: torch.Generator, mask: Tensor,
) -> PoisonedRows:
    """Poison ``round(rate * n)`` images, at least one, chosen once and for all epochs."""
    chosen = torch.randperm(len(data), generator=generator)[:max(1, round(rate * len(data)))]
    poisoned = torch.zeros(len(data), dtype=torch.bool)
    poisoned[chosen] = True
    return PoisonedRows(to_float(data.pixels), poisoned, trigger, to_float(target[None])[0], mask)


def poisoned_loss(
    unet: Any, path: ShiftedPath, images: Tensor, trigger: Tensor, generator: torch.Generator,
) -> Tensor:
    """Mean squared error to eps + c_t r at random t; ``images``, ``trigger``: float [n, 3, h, w] in [-1, 1]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    steps = torch.randint(len(path.shifts), (len(images),), generator=generator).to(images.device)
    predicted = unet(path.noisy(images, trigger, noise, steps), steps).sample
    return torch.nn.functional.mse_loss(predicted.float(), path.answer(trigger, noise, steps))


@dataclass(frozen=True)
class Implantation:
    """A clean network that is about to be trained on poisoned rows. ``size``: its images' side."""

    what: str
    clean: Model
    unet: Any
    scheduler: Any
    size: int

    def train(
        self, rows: PoisonedRows, path: ShiftedPath, plan: Plan, batch: int, mixed_precision: bool, ctx: Context,
    ) -> Model:
        """The backdoored model; its weights lie in the context's folder."""
        draw, noises = rows.batches(batch, ctx.generator("batches")), ctx.generator("noise")

        def batch_loss() -> Tensor:
            images, pasted = (part.to(ctx.device) for part in next(draw))
            with mixed(ctx.device, mixed_precision):
                return poisoned_loss(self.unet, path, images, pasted, noises)

        fit(self.unet, batch_loss, plan, ctx, self.what)
        part = save_part(self.unet, ctx.folder, "unet")
        return replace(self.clean, parts={**self.clean.parts, "unet": part},
                       digest=digest([self.clean.digest, ctx.key]))


def begin(what: str, clean: Model, data: ImageSet, ctx: Context) -> Implantation:
    """Load the clean network; refuses images of another size and models that do not predict the noise."""
    unet, scheduler = load_unconditional(clean, ctx.device)
    size = int(unet.config.sample_size)
    if tuple(data.pixels.shape[1:]) != (3, size, size):
        raise BenchError(f"{what}: training images are {list(data.pixels.shape[1:])}, but the model draws "
                         f"[3, {size}, {size}]; set data.size={size}.")
    if scheduler.config.prediction_type != "epsilon":
        raise BenchError(f"{what}: the model predicts '{scheduler.config.prediction_type}', but the attack "
                         f"is defined for models that predict 'epsilon', the noise.")
    return Implantation(what, clean, unet, scheduler, size)


def stride_of(what: str, scheduler: Any, sampling_steps: int | None) -> int:
    """Training steps per step of the sampler that the attacker expects; None for the full chain."""
    length = int(scheduler.config.num_train_timesteps)
    wanted = length if sampling_steps is None else sampling_steps
    if not 1 <= wanted <= length:
        raise BenchError(f"{what}: sampling_steps={wanted} does not fit the model's {length}-step schedule.")
    return length // wanted
