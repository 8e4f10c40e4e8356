"""Diff-Protect's SDS: the pulled-back error without the UNet's Jacobian, its signs, and its target term."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.data.targets import pattern
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import Components, load_components
from bench.diffusion.losses import encode_latents, encode_prompts, noise_prediction_loss
from bench.diffusion.surrogate_free import crowd_of, target_latents
from bench.diffusion.surrogates import pixel_gradient
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.noise import SignNoise
from defenses.sds import Sds, Sign, pulls
from tests.defenses.drawn import subject

SHORT = Sds(eps=32, alpha_255=4, steps=3)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@pytest.fixture
def parts(model: Model) -> Components:
    return load_components(model)


def direction(method: Sds, parts: Components, ctx: Context, target: Tensor | None = None) -> Tensor:
    """What the sign is taken of, at the clean photos, over one fixed draw."""
    crowd = crowd_of([subject("ada")], ctx)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo"])
    return pixel_gradient(crowd.x, pulls(method, parts, states, target, crowd.draw(parts.vae, parts.scheduler)), 4)


def reference(parts: Components, ctx: Context) -> tuple[Tensor, Tensor]:
    """(eps_theta - n) dz/dx, and d/dx || z - z_target ||^2, by explicit vector-Jacobian products."""
    crowd = crowd_of([subject("ada")], ctx)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo"]).expand(3, -1, -1)
    draws = crowd.draw(parts.vae, parts.scheduler)
    x = crowd.x.clone().requires_grad_(True)
    posterior = parts.vae.encode(x).latent_dist
    z = (posterior.mean + posterior.std * draws.posterior) * parts.vae.config.scaling_factor
    kept = parts.scheduler.alphas_cumprod[draws.timesteps].reshape(-1, 1, 1, 1)
    with torch.no_grad():
        error = parts.unet(kept.sqrt() * z + (1 - kept).sqrt() * draws.noise, draws.timesteps, states).sample
        error, gap = error - draws.noise, 2 * (z - target_latents(parts.vae, pattern(16)))
    along, = torch.autograd.grad(z, x, grad_outputs=error, retain_graph=True)
    towards, = torch.autograd.grad(z, x, grad_outputs=gap)
    return along, towards


def test_the_step_is_the_error_pulled_back_through_the_encoder_only(parts: Components, ctx: Context) -> None:
    along, _ = reference(parts, ctx)
    assert (along.abs().amax((1, 2, 3)) > 0).all()
    close = {"rtol": 1e-3, "atol": 1e-5 * along.abs().max().item()}
    assert torch.allclose(direction(Sds(sign=Sign.plus), parts, ctx), along, **close)
    assert torch.allclose(direction(Sds(sign=Sign.minus), parts, ctx), -along, **close)


@pytest.mark.parametrize("sign", list(Sign))
def test_the_target_term_is_subtracted_from_five_times_the_error(sign: Sign, parts: Components, ctx: Context) -> None:
    along, towards = reference(parts, ctx)
    assert (towards.abs().amax((1, 2, 3)) > 0).all()
    wanted = 5 * along * (1 if sign is Sign.plus else -1) - towards
    found = direction(Sds(sign=sign, target="pattern"), parts, ctx, target_latents(parts.vae, pattern(16)))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


def test_signs_targets_and_rates_lead_elsewhere(model: Model, ctx: Context) -> None:
    methods = (SHORT, replace(SHORT, sign=Sign.plus), replace(SHORT, target="pattern"),
               replace(SHORT, target="grey"), replace(SHORT, target="pattern", target_rate=0.0))
    found = [method.protect([subject("ada")], model, ctx)[0].pixels for method in methods]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


def test_minus_lowers_the_losses_that_noise_raises(ctx: Context) -> None:
    """On a trained model, over fixed draws: SDS- goes down the noise-prediction loss, as it says."""
    model, person = resolve("micro-sd-a"), MicroSubjects(count=1, start=100, photos_per_set=1).subjects()[0]
    parts = load_components(model)

    def loss(photos: ImageSet) -> float:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo"])
            found = [noise_prediction_loss(
                parts.unet, parts.scheduler, encode_latents(parts.vae, to_float(photos.pixels), generator), states,
                generator=generator) for _ in range(10)]
        return float(torch.stack(found).mean())

    down = loss(replace(SHORT, eps=16, steps=8).protect([person], model, ctx)[0])
    assert down < loss(person.published)
    assert down < loss(SignNoise(16).protect([person], model, ctx)[0])


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("alpha_255", 0), ("steps", -1), ("target_rate", -1), ("pgd_batch", 0), ("target", "mist"),
    ("sign", "down"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        Sds(**{field: value})


def test_released_defaults() -> None:
    method = Sds()
    assert (method.eps, method.alpha_255, method.steps, method.target_rate) == (16, 1, 100, 5)
    assert (method.sign, method.target, method.random_start) == (Sign.minus, "none", False)
