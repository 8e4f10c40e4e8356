"""The autoencoders of the text-to-image models: AutoencoderKL, 64x64x3 to 16x16x4."""

# diffusers and transformers ship half a set of types; what they leave untyped is checked by the tests.
# mypy: disable-error-code="attr-defined, no-untyped-call, operator, no-any-return, index, union-attr, arg-type"

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from bench.micro import world
from bench.micro.train import common


@dataclass(frozen=True)
class Recipe:
    """Which people, how wide and how long."""

    name: str
    split: str
    channels: tuple[int, ...]
    schedule: common.Schedule
    pictures: int = 24_000
    batch: int = 16
    start_from: str = ""


_CHANNELS = (16, 32, 64)
RECIPES = {
    "a": Recipe("autoencoder-a", "sd_a", _CHANNELS, common.Schedule(steps=3500, lr=2e-3, seed=11, ema=0.998)),
    # One ancestor, trained on with other pictures: related as the autoencoders of Stable Diffusion are.
    "b": Recipe(
        "autoencoder-b",
        "sd_b",
        _CHANNELS,
        common.Schedule(steps=400, lr=1.5e-3, seed=12, ema=0.998),
        start_from="a",
    ),
}


def new_autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    """A small AutoencoderKL without attention: its encoder is inside every step of a protection."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def _edges(x: Tensor) -> Tensor:
    return torch.cat(
        [(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., :, 1:] - x[..., :, :-1]).flatten(1)], 1
    )


def reconstruction_loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Squared and absolute error, the same on edges so that small features stay sharp, and a faint KL term."""
    posterior = vae.encode(pixels).latent_dist
    back = vae.decode(posterior.sample()).sample.float()
    error = (back - pixels).square().mean()
    edges = (_edges(back) - _edges(pixels)).abs().mean()
    loss = 4 * error + 0.3 * (back - pixels).abs().mean() + 0.3 * edges + 2e-5 * posterior.kl().mean() / 256
    return loss, {"psnr": float(10 * torch.log10(4 / error.detach()))}


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 250) -> Tensor:
    """Means of the latents, unscaled, float32 [n, 4, 16, 16], of pictures uint8 [n, 3, 64, 64]."""
    parts = [
        vae.encode(common.to_unit(pixels[i : i + batch])).latent_dist.mode()
        for i in range(0, len(pixels), batch)
    ]
    return torch.cat(parts)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of the reconstruction, in dB."""
    x = common.to_unit(pixels)
    back = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (back - x).square().flatten(1).mean(1))).mean())


def _export(recipe: Recipe, vae: AutoencoderKL, sample: np.ndarray) -> None:
    latents = encode(vae, sample)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    with common.replacing(common.runs_folder(recipe.name) / "export") as folder:
        copy.deepcopy(vae).to(memory_format=torch.contiguous_format).save_pretrained(folder)


def train(which: str) -> None:
    """Train the autoencoder of model `which` ("a" or "b"); the result is `<runs>/autoencoder-<which>/export`."""
    recipe = RECIPES[which]
    torch.manual_seed(recipe.schedule.seed)
    pixels = world.dataset(recipe.split, recipe.pictures).pixels
    vae = (
        load(recipe.start_from).requires_grad_(True)
        if recipe.start_from
        else new_autoencoder(recipe.channels)
    )
    vae.to(memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(pixels), size=recipe.batch)
        batch = common.to_unit(pixels[rows]).to(memory_format=torch.channels_last)
        if rng.random() < 0.5:
            batch = batch.flip(-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reconstruction_loss(vae, batch)

    common.fit(
        common.Job(recipe.name, vae, recipe.schedule, lambda: _export(recipe, vae, pixels[:1000])), loss_of
    )


SHARPEN = {
    "a": common.Schedule(steps=3200, lr=1.2e-3, seed=13, ema=0.997),
    "b": common.Schedule(steps=2600, lr=1.2e-3, seed=14, ema=0.997),
}


def sharpen(which: str) -> None:
    """Train the decoder alone for longer; the latents, and with them a UNet that learned on them, stay as they are."""
    recipe, schedule = RECIPES[which], SHARPEN[which]
    name = f"decoder-{which}"
    torch.manual_seed(schedule.seed)
    pixels = world.dataset(recipe.split, recipe.pictures).pixels
    vae = load(which).to(memory_format=torch.channels_last)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss_of(rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(pixels), size=recipe.batch)
        batch = common.to_unit(pixels[rows]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(batch).latent_dist.mode()
            back = vae.decode(latents).sample.float()
        error = (back - batch).square().mean()
        edges = (_edges(back) - _edges(batch)).abs().mean()
        loss = 6 * error + 0.1 * (back - batch).abs().mean() + 0.1 * edges
        return loss, {"psnr": float(10 * torch.log10(4 / error.detach()))}

    def export() -> None:
        with common.replacing(common.runs_folder(name) / "export") as folder:
            copy.deepcopy(vae).to(memory_format=torch.contiguous_format).save_pretrained(folder)

    common.fit(common.Job(name, decoder, schedule, export), loss_of)


def load_sharpened(which: str) -> AutoencoderKL:
    """The autoencoder with its longer-trained decoder, or without where that has not run yet."""
    folder = common.runs_folder(f"decoder-{which}") / "export"
    return (
        AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False) if folder.exists() else load(which)
    )


def load(which: str) -> AutoencoderKL:
    """The autoencoder exported last."""
    folder = common.runs_folder(RECIPES[which].name) / "export"
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
