"""The noise-prediction loss by hand, and the encoder's posterior."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_components
from bench.diffusion.losses import (
    LatentDistribution,
    encode_latents,
    encode_prompts,
    latent_distribution,
    noise_prediction_errors,
    noise_prediction_loss,
)

BETAS = [0.1, 0.2, 0.4]


class Halving:
    """A network that answers half of what it is shown plus a little per step."""

    def __call__(self, x: Tensor, t: Tensor, *states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=0.5 * x + 0.01 * t.view(-1, 1, 1, 1))


def schedule(kind: str) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=3, trained_betas=BETAS, prediction_type=kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_by_hand(kind: str) -> None:
    latents = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
    noise = torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1)
    timesteps = torch.tensor([0, 2])
    wanted = []
    for z, n, t in zip([1.0, -2.0], [0.5, 3.0], [0, 2]):
        abar = math.prod(1 - b for b in BETAS[: t + 1])
        signal, level = math.sqrt(abar), math.sqrt(1 - abar)
        target = {"epsilon": n, "v_prediction": signal * n - level * z, "sample": z}[kind]
        wanted.append((target - (0.5 * (signal * z + level * n) + 0.01 * t)) ** 2)
    shared = {"generator": torch.Generator(), "timesteps": timesteps, "noise": noise}
    errors = noise_prediction_errors(Halving(), schedule(kind), latents, None, **shared)
    assert errors.tolist() == pytest.approx(wanted, rel=1e-5)
    loss = noise_prediction_loss(Halving(), schedule(kind), latents, None, **shared)
    assert loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-5)


def test_a_perfect_predictor_has_no_loss() -> None:
    noise = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    def perfect(x: Tensor, t: Tensor, *states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=noise)

    loss = noise_prediction_loss(perfect, schedule("epsilon"), torch.zeros(4, 2, 3, 3), None,
                                 generator=torch.Generator(), noise=noise)
    assert loss == 0


def test_the_posterior_is_sampled_with_its_own_spread() -> None:
    spread = LatentDistribution(torch.full((1, 1, 100, 100), 3.0), torch.full((1, 1, 100, 100), 0.5))
    drawn = spread.sample(torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)


def test_latents_are_scaled_and_differentiable(tiny_sd: Path) -> None:
    vae = load_components(resolve(str(tiny_sd))).vae
    x = torch.zeros(2, 3, 16, 16, requires_grad=True)
    posterior = vae.encode(x).latent_dist
    found = latent_distribution(vae, x)
    assert torch.allclose(found.mean, 0.18215 * posterior.mean)
    assert torch.allclose(found.std, 0.18215 * posterior.std)
    encode_latents(vae, x, torch.Generator().manual_seed(0)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_prompts_are_encoded_as_the_pipeline_does(tiny_sd: Path) -> None:
    from bench.diffusion.loading import load_pipeline

    model = resolve(str(tiny_sd))
    parts, pipeline = load_components(model), load_pipeline(model)
    wanted, _ = pipeline.encode_prompt(["a photo", "an overlong prompt " * 9], "cpu", 1, False)
    found = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo", "an overlong prompt " * 9])
    assert torch.equal(found, wanted)
