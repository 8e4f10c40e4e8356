"""The unconditional diffusion model: 32x32 portraits, a chain of 100 steps.

The chain is the common one of 1000 steps (linear betas from 1e-4 to 0.02) shortened tenfold with betas ten
times as large, so that running all of it costs 100 network calls and ends in the same noise. Predicted
pictures are not clipped: a shifted path, as backdoors take it, leaves [-1, 1].

Two things keep the colours of unclipped samples from drifting: the coarse part of the loss, and few
normalisation groups (a group's mean over the picture is lost, so narrow groups hide the mean colour from the
network). Half of the pictures are night shots, as dark pictures are part of any photo collection, and a network
that never saw one takes a dark signal for noise.

The shipped weights came to all three late, in a resumed run: 2200 steps without the coarse part, 2500 with 8
groups, 4200 without night shots, then 2800 with lighter ones. `RECIPE` is what that came to; it has not been
run again from nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.micro import models, world
from bench.micro.train import common

SIZE = 32
NAME = "micro-ddpm"


@dataclass(frozen=True)
class Recipe:
    """How many pictures, how wide and how long; from step `coarse_from` on the loss has its coarse part, and from
    `night_from` on a share `night` of the pictures are night shots.
    """

    schedule: common.Schedule
    pictures: int = 16_000
    views: int = 2
    channels: tuple[int, ...] = (16, 32, 64, 128)
    batch: int = 32
    coarse: float = 0.1
    coarse_from: int = 2200
    night: float = 0.5
    night_from: int = 4200


RECIPE = Recipe(common.Schedule(steps=8300, lr=1.2e-3, seed=31, ema=0.998, weight_decay=0.0, floor=0.01))


def new_unet(channels: tuple[int, ...]) -> UNet2DModel:
    """A UNet with self-attention in the middle only: most of its cost is at the finest level, so that one is
    thin.
    """
    return UNet2DModel(
        sample_size=SIZE,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=2,
        attention_head_dim=64,
    )


def new_scheduler() -> DDPMScheduler:
    """The chain of 100 steps; its variances are the posterior's."""
    return DDPMScheduler(
        num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, variance_type="fixed_small", clip_sample=False
    )


def portraits(n: int, views: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures of the split `ddpm`, drawn at 64 and averaged down: uint8 [n, 3, 32, 32]."""
    drawn = world.dataset("ddpm", n, seed=seed, views_per_identity=views).pixels
    return halved(drawn)


def halved(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 2x2 pixels, rounded: uint8 [n, 3, s, s] to uint8 [n, 3, s/2, s/2]."""
    n, c, h, w = pixels.shape
    sums = pixels.reshape(n, c, h // 2, 2, w // 2, 2).sum(axis=(3, 5), dtype=np.uint16)
    return np.asarray((sums + 2) // 4, dtype=np.uint8)


def coarse_error(error: Tensor, share: Tensor) -> Tensor:
    """What is left of `error` [n, 3, 32, 32] in means over squares of 4 to 32 pixels, each weighed as one
    pixel is.

    The mean of k x k pixels of white noise has 1 / k^2 of their variance, so the plain loss hardly sees it;
    but it is what decides a picture's colours, and without clipping nothing else stops their drift. `share`
    [n]: weight of a row. The term has the same minimum as the plain loss, the conditional mean.
    """
    parts = [k**2 * nn.functional.avg_pool2d(error, k).square().mean((1, 2, 3)) for k in (4, 8, 16, 32)]
    return (torch.stack(parts).sum(0) * share).mean()


def noise_loss(unet: UNet2DModel, scheduler: DDPMScheduler, clean: Tensor, coarse: float = 0.0) -> Tensor:
    """The simple loss (Ho et al., NeurIPS 2020, eq. 14) on pictures [n, 3, 32, 32] in [-1, 1], one noise
    level each.

    `coarse`: weight of `coarse_error`, which counts at a level by its share of noise.
    """
    n = len(clean)
    # One level from each of n equal parts of the chain: the same mean as independent draws, with less variance.
    total = scheduler.config.num_train_timesteps
    t = ((torch.arange(n) + torch.rand(n)) * total / n).long()
    noise = torch.randn_like(clean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = unet(scheduler.add_noise(clean, noise, t), t).sample
    error = guess.float() - noise
    loss: Tensor = error.square().mean() + coarse * coarse_error(error, 1 - scheduler.alphas_cumprod[t])
    return loss


def export(unet: UNet2DModel, folder: Path) -> None:
    """Write a DDPMPipeline folder with half-precision safetensors."""
    half = copy.deepcopy(unet).half()
    DDPMPipeline(half, new_scheduler()).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def train(recipe: Recipe = RECIPE) -> None:
    """Train the model and write it to the weights folder."""
    torch.manual_seed(recipe.schedule.seed)
    pixels = portraits(recipe.pictures, recipe.views)
    unet, scheduler = new_unet(recipe.channels), new_scheduler()

    def loss_of(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(pixels), size=recipe.batch)
        coarse = recipe.coarse if step >= recipe.coarse_from else 0.0
        shown = world.at_night(pixels[rows], recipe.night if step >= recipe.night_from else 0.0, step)
        return noise_loss(unet, scheduler, common.to_unit(shown), coarse), {}

    def write() -> None:
        with common.replacing(models.weights_folder(NAME)) as folder:
            export(unet, folder)

    common.fit(common.Job(NAME, unet, recipe.schedule, write, export_every=240.0), loss_of)


def load(folder: Path) -> tuple[UNet2DModel, DDPMScheduler]:
    """The model in float32 and its scheduler."""
    unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, use_safetensors=True)
    return unet.eval().requires_grad_(False), DDPMScheduler.from_pretrained(folder / "scheduler")


@torch.no_grad()
def sample(unet: UNet2DModel, scheduler: DDPMScheduler, start: Tensor, seed: int = 0) -> Tensor:
    """Walk the whole chain from `start` [n, 3, 32, 32]; pictures [n, 3, 32, 32] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    x = start
    for t in scheduler.timesteps:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guess = unet(x, t).sample
        x = scheduler.step(guess.float(), t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


__all__ = [
    "NAME",
    "RECIPE",
    "Recipe",
    "export",
    "load",
    "new_scheduler",
    "new_unet",
    "noise_loss",
    "portraits",
    "sample",
    "train",
]
