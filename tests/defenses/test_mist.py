"""Mist: both terms move pixels, each rises on its own, and the balance is the published one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.data.targets import pattern
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import Components, load_components
from bench.diffusion.losses import encode_prompts
from bench.diffusion.surrogate_free import crowd_of, target_latents
from bench.diffusion.surrogates import pixel_gradient
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.mist import Mist, Mode, objectives, textural
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

SHORT = Mist(eps=32, alpha_255=4, steps=3, random_start=False)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@pytest.fixture
def parts(model: Model) -> Components:
    return load_components(model)


def gradient(mode: Mode, weight: float, parts: Components, ctx: Context) -> Tensor:
    """d J / dx at the clean photos, over one fixed draw."""
    crowd = crowd_of([subject("ada")], ctx)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo"])
    draws = crowd.draw(parts.vae, parts.scheduler)
    method = Mist(mode=mode, fused_weight=weight)
    return pixel_gradient(crowd.x, objectives(method, parts, states, target_latents(parts.vae, pattern(16)), draws), 4)


def test_fused_is_the_weighted_sum_of_two_terms_that_both_move_pixels(parts: Components, ctx: Context) -> None:
    texture, meaning, both = (gradient(mode, 50.0, parts, ctx) for mode in (Mode.textural, Mode.semantic, Mode.fused))
    for term in (texture, meaning):
        assert (term.abs().amax((1, 2, 3)) > 0).all()
    assert torch.allclose(both, texture + 50 * meaning, rtol=1e-3, atol=1e-5 * both.abs().max().item())


def test_without_either_term_the_photos_are_others(model: Model, ctx: Context) -> None:
    found = [replace(SHORT, mode=mode).protect([subject("ada")], model, ctx)[0].pixels for mode in Mode]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


def test_without_weight_fused_is_textural(model: Model, ctx: Context) -> None:
    ada = [subject("ada")]
    first, other = (m.protect(ada, model, ctx)[0].pixels for m in (
        replace(SHORT, mode=Mode.textural), replace(SHORT, fused_weight=0)))
    assert torch.equal(first, other)


@pytest.mark.parametrize("target", ["pattern", "grey"])
def test_latents_come_nearer_to_the_target_and_noise_does_not_help(
    target: str, parts: Components, model: Model, ctx: Context,
) -> None:
    method = replace(SHORT, mode=Mode.textural, steps=16, target=target)
    pages = {"pattern": pattern(16), "grey": torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)}

    def distance(photos: ImageSet) -> Tensor:
        with torch.no_grad():
            z, goal = (parts.vae.encode(to_float(p)).latent_dist.mean for p in (photos.pixels, pages[target]))
        return (z - goal).square().flatten(1).sum(1)

    ada = subject("ada")
    near = distance(method.protect([ada], model, ctx)[0])
    assert (near < distance(ada.published)).all()
    assert (near < distance(SignNoise(32).protect([ada], model, ctx)[0])).all()


def test_the_distance_is_the_released_sum_at_512_pixels_and_the_same_in_proportion_below() -> None:
    z = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(textural(z, torch.zeros(1)), z.square().sum((1, 2, 3)), rtol=1e-5)
    small = z[:, :, :16, :16]
    assert torch.allclose(textural(small, torch.zeros(1)), 16 * small.square().sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", 256), ("alpha_255", 0), ("steps", -1), ("fused_weight", -1), ("pgd_batch", 0), ("target", "zero"),
    ("mode", "both"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        Mist(**{field: value})


def test_released_defaults() -> None:
    method = Mist()
    assert (method.eps, method.alpha_255, method.steps, method.mode) == (16, 1, 100, Mode.fused)
    assert (method.fused_weight, method.prompt) == (1e4, "a photo")
