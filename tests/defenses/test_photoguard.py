"""PhotoGuard's encoder attack: latents arrive at the target, step by step as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_modules
from bench.diffusion.surrogate_free import crowd_of
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.noise import SignNoise
from defenses.photoguard import PhotoGuard, approach
from tests.defenses.drawn import subject

SHORT = PhotoGuard(eps=32, alpha_255=4, steps=20, random_start=False)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def latents(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_modules(model)["vae"].encode(to_float(pixels)).latent_dist.mean
    return found


def distance(model: Model, photos: ImageSet, target: str) -> torch.Tensor:
    """|| E(x) - z_target ||^2 of each photo, written out."""
    goal = {"zero": torch.zeros(1), "grey": latents(model, torch.full((1, 3, 16, 16), 128, dtype=torch.uint8))}
    return (latents(model, photos.pixels) - goal[target]).square().flatten(1).sum(1)


@pytest.mark.parametrize("target", ["zero", "grey"])
def test_every_photo_comes_nearer_to_the_target_and_noise_does_not(target: str, model: Model, ctx: Context) -> None:
    ada = subject("ada")
    near = distance(model, replace(SHORT, target=target).protect([ada], model, ctx)[0], target)
    assert (near < distance(model, ada.published, target)).all()
    assert (near < distance(model, SignNoise(32).protect([ada], model, ctx)[0], target)).all()


def test_the_first_step_goes_down_the_distances_gradient(model: Model, ctx: Context) -> None:
    ada, vae = subject("ada"), load_modules(model)["vae"]
    moved = approach(replace(SHORT, steps=1, alpha_255=2), crowd_of([ada], ctx), vae, ctx)
    x = to_float(ada.published.pixels).requires_grad_(True)
    vae.encode(x).latent_dist.mean.square().sum().backward()
    assert x.grad is not None
    inside = (x.detach().abs() < 0.95) & (x.grad.abs() > x.grad.abs().max() * 1e-3)
    assert torch.allclose((moved - x.detach())[inside], (-x.grad.sign() * 4 / 255)[inside], atol=1e-6)


def test_each_target_leads_elsewhere(model: Model, ctx: Context, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (250, 0, 0)).save(tmp_path / "red.png")
    targets = ("zero", "grey", "pattern", str(tmp_path / "red.png"))
    found = [replace(SHORT, target=t, target_sha256="").protect([subject("ada")], model, ctx)[0].pixels
             for t in targets]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


def test_steps_shrink_to_a_hundredth_unless_told_not_to() -> None:
    method = PhotoGuard()
    assert method.step_length(0) == method.alpha_255
    assert method.step_length(500) == pytest.approx(method.alpha_255 * 0.505)
    assert method.step_length(999) == pytest.approx(method.alpha_255 / 100, rel=0.1)
    assert replace(method, decay=False).step_length(999) == method.alpha_255


def test_the_random_start_fills_the_budget_and_differs_between_people(ctx: Context) -> None:
    people = [subject("ada"), replace(subject("ada"), name="eve")]
    crowd = crowd_of(people, ctx)
    moved = (crowd.start(16, True) - crowd.x) * 127.5
    assert moved.abs().max() <= 16 + 1e-4
    assert moved.abs().max() > 15
    assert moved.mean().abs() < 1
    assert not torch.equal(moved[:3], moved[3:])


@pytest.mark.parametrize(("field", "value"), [("eps", -1), ("alpha_255", 0), ("steps", -1), ("pgd_batch", 0),
                                              ("target", "black")])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        PhotoGuard(**{field: value})


def test_released_defaults() -> None:
    """0.06 and 0.02 on the [-1, 1] scale, 1000 steps, zero latents."""
    method = PhotoGuard()
    assert (method.eps, method.alpha_255) == pytest.approx((0.06 * 127.5, 0.02 * 127.5))
    assert (method.steps, method.target, method.random_start) == (1000, "zero", True)
