"""Repair a network after it was cut: noise prediction on clean images beside the answers of what it was before.

    loss = || eps - net(x_t, t) ||^2 + w || teacher(x_t, t) - net(x_t, t) ||^2

summed over pixels, averaged over the batch, on *clean* noisy images only: there, the suspicious network is a good
teacher. The images are real ones or samples of the suspicious network itself, drawn once per model and stored, so that
every defense that asks for the same ones repairs on the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.codecs import ImageSetCodec
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_unconditional
from bench.diffusion.losses import normal
from bench.diffusion.sampling import adjusted, initial_noise, sample_unconditional
from bench.diffusion.training import Plan, count_steps, fit, mixed, shuffled_batches
from bench.errors import BenchError
from bench.options import RepairOptions
from bench.records import ImageSet, Model

if TYPE_CHECKING:
    from bench.context import Context

SYNTHETIC_VERSION = 1


def open_noise_predictor(what: str, suspicious: Model, ctx: Context) -> tuple[Any, Any]:
    """A fresh copy of an unconditional network that predicts the noise, and its schedule."""
    unet, scheduler = load_unconditional(suspicious, ctx.device)
    if scheduler.config.prediction_type != "epsilon":
        raise BenchError(f"{what}: the model predicts '{scheduler.config.prediction_type}', but the defense is defined "
                         "for models that predict 'epsilon', the noise.")
    return unet, scheduler


def repair_images(options: RepairOptions, suspicious: Model, data: ImageSet, size: int, ctx: Context) -> Tensor:
    """What the network is repaired on: uint8 [n, 3, size, size]."""
    if options.repair_data == "real":
        if tuple(data.pixels.shape[2:]) != (size, size):
            raise BenchError(f"repair: clean images are {list(data.pixels.shape[2:])} pixels, but the model draws "
                             f"{size}; set data.size={size}.")
        order = torch.randperm(len(data), generator=ctx.generator("real"))
        return data.pixels[order[:max(1, round(options.real_share * len(data)))]]
    count, sampler, steps = options.synthetic_images, options.synthetic_sampler, options.synthetic_steps
    inputs = {"model": suspicious.digest, "count": count, "sampler": sampler, "steps": steps}
    return ctx.share("synthetic_images", SYNTHETIC_VERSION, inputs,
                     lambda own: draw_synthetic(suspicious, count, sampler, steps, own), ImageSetCodec()).pixels


def draw_synthetic(suspicious: Model, count: int, sampler: str, steps: int, ctx: Context) -> ImageSet:
    """Samples of a suspicious model from plain noise."""
    unet, scheduler = load_unconditional(suspicious, ctx.device)
    side = unet.config.sample_size
    seeds = [ctx.seed("synthetic", place) for place in range(count)]
    noise = initial_noise(seeds, (unet.config.in_channels, side, side))
    schedule = adjusted(scheduler.config, clip_sample=False)
    shortened = min(steps, scheduler.config.num_train_timesteps)
    pixels = sample_unconditional(unet, schedule, noise, seeds, shortened, sampler)
    return ImageSet(pixels, tuple(f"{place:05d}" for place in range(count)))


def antithetic_steps(length: int, count: int, generator: torch.Generator) -> Tensor:
    """Steps in pairs t, ``length`` - 1 - t, so that early and late ones are equally many: int64 [count]."""
    half = torch.randint(length, ((count + 1) // 2,), generator=generator)
    return torch.cat([half, length - 1 - half])[:count]


def repair_loss(
    student: Any, teacher: Any, scheduler: Any, images: Tensor, weight: float, generator: torch.Generator,
) -> Tensor:
    """The loss above; ``images``: float [n, 3, h, w] in [-1, 1]; ``weight`` 0 leaves the teacher out."""
    noise = normal(images.shape, generator, images)
    steps = antithetic_steps(scheduler.config.num_train_timesteps, len(images), generator).to(images.device)
    noisy = scheduler.add_noise(images, noise, steps)
    predicted = student(noisy, steps).sample.float()
    loss = summed_error(predicted, noise)
    if not weight:
        return loss
    with torch.no_grad():
        taught = teacher(noisy, steps).sample.float()
    return loss + weight * summed_error(predicted, taught)


def summed_error(one: Tensor, other: Tensor) -> Tensor:
    """Squared error summed over pixels, averaged over the batch."""
    return (one - other).square().flatten(1).sum(1).mean()


def repair(
    what: str, unet: Any, teacher: Any, scheduler: Any, images: Tensor, options: RepairOptions, ctx: Context,
) -> int:
    """Train ``unet`` in place on ``images``, uint8 [n, 3, h, w]; returns the number of updates."""
    from diffusers.training_utils import EMAModel

    rows = shuffled_batches(len(images), options.batch, ctx.generator("batches"))
    noises = ctx.generator("noise")
    count = count_steps(options.steps, options.epochs, len(images), options.batch)
    average = EMAModel(unet.parameters(), decay=options.ema, use_ema_warmup=True, power=0.75)

    def batch_loss() -> Tensor:
        clean = to_float(images[next(rows)]).to(ctx.device)
        with mixed(ctx.device, options.mixed_precision):
            return repair_loss(unet, teacher, scheduler, clean, options.distill, noises)

    fit(unet, batch_loss, Plan(count, options.lr, clip=options.grad_clip), ctx, what,
        lambda: average.step(unet.parameters()))
    if options.ema:
        average.copy_to(unet.parameters())
    return count
