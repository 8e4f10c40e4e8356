"""The losses of latent diffusion models: latents of images, states of prompts, noise prediction.

Latent diffusion: Rombach et al., CVPR 2022. Noise prediction: Ho et al., NeurIPS 2020, eq. 4 and 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal noise, drawn on the generator's device so that every accelerator sees the same numbers."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device).to(like.device, like.dtype)


@dataclass(frozen=True)
class LatentDistribution:
    """What the encoder says of images, kept to be sampled again without encoding again.

    ``mean``, ``std``: [n, c, h/8, w/8], already multiplied by the autoencoder's scaling factor.
    """

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """z = mean + std * noise: the encoder's own sampling noise is part of training."""
        return self.mean + self.std * normal(self.mean.shape, generator, self.mean)

    def pick(self, places: Tensor) -> LatentDistribution:
        """The distributions of some of the images."""
        return LatentDistribution(self.mean[places], self.std[places])


def latent_distribution(vae: Any, x: Tensor) -> LatentDistribution:
    """Encode images ``x`` in [-1, 1], [n, 3, h, w]; differentiable in ``x``."""
    posterior = vae.encode(x.to(vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return LatentDistribution(posterior.mean * scale, posterior.std * scale)


def encode_latents(vae: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from the encoder's posterior, scaled: z = s * E(x), with s = 0.18215 on SD 1.x."""
    return latent_distribution(vae, x).sample(generator)


def tokenise(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Prompts to token ids [n, length], padded and cut to the model's length as its pipeline does."""
    ids: Tensor = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length,
                            truncation=True, return_tensors="pt").input_ids
    return ids


def encode_ids(text_encoder: Any, ids: Tensor) -> Tensor:
    """Token ids [n, length] to states [n, length, width]; differentiable in the text encoder's weights."""
    states: Tensor = text_encoder(ids.to(text_encoder.device))[0]
    return states


def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Prompts to states [n, length, width]."""
    return encode_ids(text_encoder, tokenise(tokenizer, prompts))


def draw_timesteps(scheduler: Any, count: int, generator: torch.Generator) -> Tensor:
    """t ~ U{0, ..., T-1}, one per sample."""
    return torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator, device=generator.device)


def prediction_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network is trained to output: the noise, the velocity (Salimans & Ho 2022), or the sample."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    return latents


def shown_beside(vae: Any, unet: Any, latents: Tensor) -> Tensor | None:
    """What an editor's network reads of a photo beside noisy latents; None if nothing. ``latents``: the photo's, scaled
    [n, c, h/8, w/8]. InstructPix2Pix reads them unscaled; an inpainting network reads a mask, here empty, and them."""
    more = unet.config.in_channels - vae.config.latent_channels
    if more == 0:
        return None
    if more == vae.config.latent_channels:
        unscaled: Tensor = latents / vae.config.scaling_factor
        return unscaled
    return torch.cat([torch.zeros_like(latents[:, :1]), latents], dim=1)


def noise_prediction_errors(
    unet: Any, scheduler: Any, latents: Tensor, states: Tensor | None, *, generator: torch.Generator,
    timesteps: Tensor | None = None, noise: Tensor | None = None, beside: Tensor | None = None,
) -> Tensor:
    """Each sample's mean squared error, [n], in float32.

    z_t = sqrt(abar_t) z + sqrt(1 - abar_t) n; error = mean ||target - unet(z_t, t, c)||^2 over channels and places.
    ``states``: prompt states [n, length, width]; None on unconditional models. ``beside``: what the network reads
    beside z_t, from :func:`shown_beside`.
    """
    noise = normal(latents.shape, generator, latents) if noise is None else noise
    timesteps = draw_timesteps(scheduler, len(latents), generator) if timesteps is None else timesteps
    timesteps = timesteps.to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    given = () if states is None else (states,)
    seen = noisy if beside is None else torch.cat([noisy, beside], dim=1)
    predicted = unet(seen, timesteps, *given).sample
    target = prediction_target(scheduler, latents, noise, timesteps)
    errors: Tensor = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return errors


def noise_prediction_loss(
    unet: Any, scheduler: Any, latents: Tensor, states: Tensor | None, *, generator: torch.Generator,
    timesteps: Tensor | None = None, noise: Tensor | None = None,
) -> Tensor:
    """L_ldm: the errors' mean over the batch."""
    return noise_prediction_errors(unet, scheduler, latents, states, generator=generator, timesteps=timesteps,
                                   noise=noise).mean()
