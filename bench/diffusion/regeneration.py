"""Noise an image lightly and let a text-to-image model take the noise away: image-to-image, the core of purifiers.

Forward process: Ho et al., NeurIPS 2020, eq. 4. Denoising: Song et al., "Denoising diffusion implicit models",
ICLR 2021 (arXiv:2010.02502), eq. 12 with sigma = 0. Latents: Rombach et al., CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.diffusion.loading import load_modules, load_schedule
from bench.diffusion.losses import encode_prompts, latent_distribution
from bench.diffusion.sampling import chunks
from bench.records import Model

PIXELS = 8 * 512 * 512
"""How many pixels go through the model at a time."""


@dataclass(frozen=True)
class Regenerator:
    """A latent model that denoises under one prompt. ``kept``: abar_t, the share of signal after t + 1 of T steps, [T].

    ``states``: the prompt's, [1, length, width], and before it the empty prompt's if there is guidance.
    """

    vae: Any
    unet: Any
    kept: Tensor
    prediction: str
    states: Tensor
    guidance: float

    @property
    def chain(self) -> int:
        """T, the length of the model's chain."""
        return len(self.kept)

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """Latents of one image of ``side`` pixels."""
        small = side // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, small, small


@torch.no_grad()
def open_regenerator(model: Model, prompt: str, guidance: float, device: str = "cpu") -> Regenerator:
    """``guidance``: classifier-free guidance scale; 1 is none. The model's own weights, without its adapters."""
    modules = load_modules(model, device)
    schedule = load_schedule(model)
    prompts = [prompt] if guidance == 1 else ["", prompt]
    states = encode_prompts(modules["tokenizer"], modules["text_encoder"], prompts)
    kept = schedule.alphas_cumprod.to(device)
    return Regenerator(modules["vae"], modules["unet"], kept, schedule.config.prediction_type, states, guidance)


@torch.no_grad()
def regenerate(engine: Regenerator, x: Tensor, noise: Tensor, level: int, steps: int) -> Tensor:
    """Images ``x`` [n, 3, h, w] in [-1, 1] after encoding, noising, denoising and decoding, in [-1, 1].

    ``noise``: standard normal, of the latents' shape. ``level``: how many of the chain's T steps of noise are added; 0
    is the autoencoder's round trip. ``steps``: a full chain's sampler steps, of which this takes its share.
    """
    size = max(1, PIXELS // x[0, 0].numel())
    return torch.cat([_regenerate(engine, x[part], noise[part], level, steps) for part in chunks(len(x), size)])


def _regenerate(engine: Regenerator, x: Tensor, noise: Tensor, level: int, steps: int) -> Tensor:
    z = latent_distribution(engine.vae, x.to(engine.kept.device)).mean
    z = denoise(engine, add_noise(engine, z, noise.to(z), level), descent(level, steps, engine.chain))
    decoded: Tensor = engine.vae.decode(z / engine.vae.config.scaling_factor).sample
    return decoded.clamp(-1, 1)


def add_noise(engine: Regenerator, z: Tensor, noise: Tensor, level: int) -> Tensor:
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) n after ``level`` steps of noise; none leave z as it is."""
    if level == 0:
        return z
    kept = engine.kept[level - 1]
    return kept.sqrt() * z + (1 - kept).sqrt() * noise


def descent(level: int, steps: int, chain: int) -> list[int]:
    """The timesteps from ``level`` steps of noise down to none, evenly spaced: the last share of ``steps`` over a whole
    ``chain``, but at least one."""
    count = min(level, -(-level * steps // chain))
    return [round(level * (count - place) / count) - 1 for place in range(count)]


def denoise(engine: Regenerator, z: Tensor, timesteps: Sequence[int]) -> Tensor:
    """DDIM from the first timestep to the clean latents: z_s = sqrt(abar_s) z0 + sqrt(1 - abar_s) n, (eq. 12)."""
    for t, following in zip(timesteps, [*timesteps[1:], None]):
        clean, noise = split(engine, z, t)
        kept = engine.kept.new_ones(()) if following is None else engine.kept[following]
        z = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    return z


def split(engine: Regenerator, z: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """What the model takes ``z`` at timestep ``t`` to be made of: clean latents and noise."""
    signal, spread = engine.kept[t].sqrt(), (1 - engine.kept[t]).sqrt()
    said = predict(engine, z, t)
    if engine.prediction == "epsilon":
        return (z - spread * said) / signal, said
    if engine.prediction == "v_prediction":
        return signal * z - spread * said, signal * said + spread * z
    return said, (z - signal * said) / spread


def predict(engine: Regenerator, z: Tensor, t: int) -> Tensor:
    """The network's output, guided (Ho & Salimans 2022) if there is guidance."""
    asked = len(engine.states)
    states = engine.states.repeat_interleave(len(z), dim=0)
    said: Tensor = engine.unet(z.repeat(asked, 1, 1, 1), t, states).sample
    if asked == 1:
        return said
    plain, prompted = said.chunk(2)
    return plain + engine.guidance * (prompted - plain)
