"""AdvDM: its loss moves pixels and rises, and its settings are the published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_components
from bench.diffusion.losses import encode_latents, encode_prompts, noise_prediction_loss
from bench.diffusion.surrogate_free import crowd_of
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.advdm import AdvDm, raise_loss
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

SHORT = AdvDm(eps=32, alpha_255=4, steps=3, random_start=False)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def loss(model: Model, photos: ImageSet, rounds: int = 10) -> float:
    """E_{t, n} || n - eps_theta(z_t, t, c) ||^2, written out, over fixed draws."""
    parts, generator = load_components(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo"]).expand(len(photos), -1, -1)
        found = [noise_prediction_loss(
            parts.unet, parts.scheduler, encode_latents(parts.vae, to_float(photos.pixels), generator), states,
            generator=generator) for _ in range(rounds)]
    return float(torch.stack(found).mean())


def test_the_first_step_follows_the_sign_of_the_losss_gradient(model: Model, ctx: Context) -> None:
    """Against a gradient taken here, photo by photo, from the formula."""
    parts, ada = load_components(model), subject("ada")
    one = replace(SHORT, steps=1, alpha_255=2)
    moved = raise_loss(one, crowd_of([ada], ctx), parts, ctx)
    draws = crowd_of([ada], ctx).draw(parts.vae, parts.scheduler)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo"])
    for place in range(3):
        x = to_float(ada.published.pixels[place:place + 1]).requires_grad_(True)
        posterior = parts.vae.encode(x).latent_dist
        z = (posterior.mean + posterior.std * draws.posterior[place:place + 1]) * parts.vae.config.scaling_factor
        noise, t = draws.noise[place:place + 1], draws.timesteps[place:place + 1]
        kept = parts.scheduler.alphas_cumprod[t]
        z_t = kept.sqrt() * z + (1 - kept).sqrt() * noise
        (parts.unet(z_t, t, states).sample - noise).square().mean().backward()
        assert x.grad is not None and x.grad.abs().max() > 0
        inside = (x.detach().abs() < 0.95) & (x.grad.abs() > x.grad.abs().max() * 1e-3)
        step = (moved[place:place + 1] - x.detach())[inside]
        assert torch.allclose(step, (x.grad.sign() * 4 / 255)[inside], atol=1e-6)


def test_its_loss_rises_more_than_under_noise(ctx: Context) -> None:
    """On a trained model: the random one's loss hardly depends on the photo."""
    model, person = resolve("micro-sd-a"), MicroSubjects(count=1, start=100, photos_per_set=1).subjects()[0]
    protected = loss(model, replace(SHORT, eps=16, steps=12, alpha_255=4).protect([person], model, ctx)[0])
    assert protected > 1.05 * loss(model, SignNoise(16).protect([person], model, ctx)[0])
    assert protected > 1.05 * loss(model, person.published)


def test_prompt_and_random_start_matter(model: Model, ctx: Context) -> None:
    ada = [subject("ada")]
    plain, other, random = (method.protect(ada, model, ctx)[0].pixels for method in (
        SHORT, replace(SHORT, prompt="a painting of a house"), replace(SHORT, random_start=True)))
    assert not torch.equal(plain, other)
    assert not torch.equal(plain, random)


def test_no_steps_and_no_random_start_leave_the_photos(model: Model, ctx: Context) -> None:
    ada = subject("ada")
    same = replace(SHORT, steps=0).protect([ada], model, ctx)[0]
    assert torch.equal(same.pixels, ada.published.pixels)


@pytest.mark.parametrize(("field", "value"), [("eps", -1), ("eps", 256), ("alpha_255", 0), ("steps", -1),
                                              ("pgd_batch", 0)])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        AdvDm(**{field: value})


def test_published_defaults() -> None:
    assert (AdvDm().steps, AdvDm().alpha_255, AdvDm().eps, AdvDm().prompt) == (100, 1.0, 8.0, "a photo")
