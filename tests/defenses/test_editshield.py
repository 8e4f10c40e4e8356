"""EditShield: latents shift under what an editor may do to the photo; the released code is followed to its letter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.editors import value_and_gradient
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_modules, load_schedule
from bench.diffusion.surrogate_free import crowd_of
from bench.errors import BenchError
from bench.options import Variant
from bench.records import ImageSet, Model
from defenses.editshield import (
    TRANSFORMS,
    EditShield,
    cropping,
    embedded,
    released_losses,
    rotation,
    shifts,
    transformed,
    warped,
)
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

SHORT = EditShield(eps=16, alpha_255=4, steps=16)
RELEASED = EditShield(variant=Variant.released)


@pytest.fixture(params=["text", "instruct"])
def model(request: Any, tiny_sd: Path, tiny_ip2p: Path) -> Model:
    return resolve(str({"text": tiny_sd, "instruct": tiny_ip2p}[request.param]))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def shift(name: str, model: Model, photos: ImageSet) -> Tensor:
    """|| E(g(x')) - E(g(x)) ||^2 of each photo, over held-out transformations."""
    vae, generator = load_modules(model)["vae"], torch.Generator().manual_seed(7)
    x, clean = to_float(photos.pixels), to_float(subject("ada").published.pixels)
    total = torch.zeros(len(photos))
    with torch.no_grad():
        for _ in range(8):
            places = torch.rand(3, 3, generator=generator) * 2 - 1
            one, other = (vae.encode(transformed(name, each, places)).latent_dist.mean for each in (x, clean))
            total += (one - other).square().flatten(1).mean(1)
    return total


@pytest.mark.parametrize("name", TRANSFORMS)
def test_latents_shift_further_than_under_noise_whatever_is_done_to_the_photo(
    name: str, model: Model, ctx: Context,
) -> None:
    found = replace(SHORT, transform=name).protect([subject("ada")], model, ctx)[0]
    noisy = SignNoise(16).protect([subject("ada")], model, ctx)[0]
    assert (shift(name, model, found) > shift(name, model, noisy)).all()


def test_the_loss_is_the_mean_squared_shift_and_has_a_gradient(model: Model, ctx: Context) -> None:
    crowd, vae = crowd_of([subject("ada")], ctx), load_modules(model)["vae"]
    x = (crowd.x + 0.05).clamp(-1, 1)
    places = crowd.uniform((3,), -1, 1)
    for name in TRANSFORMS:
        values, gradient = value_and_gradient(x, shifts(replace(SHORT, transform=name), vae, crowd.x, places), 2)
        one, other = (vae.encode(transformed(name, each, places)).latent_dist.mean for each in (x, crowd.x))
        wanted = (one - other).square().mean((1, 2, 3)) * vae.config.scaling_factor ** 2
        assert torch.allclose(values, wanted, rtol=1e-3)
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_a_window_and_a_turn_are_what_they_say() -> None:
    """Corner windows show one corner; a turn leaves the middle; both stay within 1/16 of the edge."""
    x = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()
    whole = warped(x, cropping(torch.tensor([[0.3, -0.7, -1.0]])))
    assert torch.allclose(whole, x, atol=1e-5)
    left, right = (warped(x, cropping(torch.tensor([[side, 0.0, 1.0]]))) for side in (-1.0, 1.0))
    assert left[0, 0, 0, 0] == pytest.approx(-1, abs=0.03) and left[0, 0, 0, -1] == pytest.approx(0.75, abs=0.03)
    assert right[0, 0, 0, 0] == pytest.approx(-0.75, abs=0.03) and right[0, 0, 0, -1] == pytest.approx(1, abs=0.03)
    turned = warped(x, rotation(torch.tensor([1.0])))
    assert turned[0, 0, 32, 32] == pytest.approx(x[0, 0, 32, 32].item(), abs=0.03)
    assert (turned[0, 0, 0, 32] - x[0, 0, 0, 32]).abs() == pytest.approx(0.125, abs=0.03)


def test_the_described_start_is_not_the_photo_where_nothing_has_a_gradient(model: Model, ctx: Context) -> None:
    crowd, vae = crowd_of([subject("ada")], ctx), load_modules(model)["vae"]
    losses = shifts(replace(SHORT, transform="none"), vae, crowd.x, crowd.uniform((3,), -1, 1))
    assert value_and_gradient(crowd.x, losses, 4)[1].abs().max() == 0
    assert not torch.equal(SHORT.protect([subject("ada")], model, ctx)[0].pixels, subject("ada").published.pixels)


# -- As released -------------------------------------------------------------------------------------------------------


def test_the_released_loss_by_hand(model: Model, ctx: Context) -> None:
    crowd, vae, scheduler = crowd_of([subject("ada")], ctx), load_modules(model)["vae"], load_schedule(model)
    clean, everything = (crowd.x + 1) / 2, slice(0, 3)
    first, draws = crowd.draw(vae, scheduler), crowd.draw(vae, scheduler)
    x = (clean + 0.02).clamp(0, 1)
    with torch.no_grad():
        wanted, plain = embedded(vae, scheduler, clean, first, everything), replace(RELEASED, transform="none")
        found = released_losses(plain, vae, scheduler, clean, wanted, draws)(x, everything)
        parts = []
        for pixels, each in ((x, draws), (clean, first)):
            posterior = vae.encode(pixels).latent_dist
            z = posterior.mean + posterior.std * each.posterior
            noisy = scheduler.add_noise(z * vae.config.scaling_factor, each.noise, each.timesteps)
            parts.append(torch.cat([noisy, z], dim=1))
    by_hand = -(parts[0] - parts[1]).square().mean((1, 2, 3)) + 0.1 * (x - clean).square().mean((1, 2, 3))
    assert torch.allclose(found, by_hand, rtol=1e-3, atol=1e-6)


def test_the_released_code_moves_by_its_step_count_and_not_by_its_budget(model: Model, ctx: Context) -> None:
    ada = subject("ada")
    change = (RELEASED.protect([ada], model, ctx)[0].pixels.int() - ada.published.pixels.int()).abs()
    assert 2 <= change.max() <= 8                                              # 30 * 0.001 * 255 = 7.65
    far = (replace(RELEASED, lr=1e-2, eps=12).protect([ada], model, ctx)[0].pixels.int()
           - ada.published.pixels.int()).abs()
    assert far.max() == 12                                                     # cut when the file is written


def test_variants_and_transforms_matter(model: Model, ctx: Context) -> None:
    methods = [*(replace(SHORT, transform=name) for name in TRANSFORMS), RELEASED]
    found = [m.protect([subject("ada")], model, ctx)[0].pixels for m in methods]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


def test_the_released_blur_adds_a_term_of_its_own(model: Model, ctx: Context) -> None:
    crowd, vae, scheduler = crowd_of([subject("ada")], ctx), load_modules(model)["vae"], load_schedule(model)
    clean = (crowd.x + 1) / 2
    draws = crowd.draw(vae, scheduler)
    wanted, x = torch.zeros(3, 8, 8, 8), (clean * 0.9)
    plain, blurry = (released_losses(replace(RELEASED, transform=name), vae, scheduler, clean, wanted, draws)
                     for name in ("none", "blur"))
    with torch.no_grad():
        term = blurry(x, slice(0, 3)) - plain(x, slice(0, 3))
        assert torch.allclose(term, 0.1 * transformed("blur", clean * 0.1, torch.zeros(3, 3)).square().mean((1, 2, 3)),
                              rtol=1e-2)


@pytest.mark.parametrize(("options", "said"), [
    ({"eps": -1}, "eps"), ({"alpha_255": 0}, "alpha_255"), ({"steps": -1}, "steps"), ({"lr": 0}, "lr"),
    ({"pgd_batch": 0}, "pgd_batch"), ({"transform": "mirror"}, "transform"), ({"variant": "published"}, "variant"),
    ({"variant": "released", "transform": "crop"}, "transforms a photo once"),
])
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        EditShield(**options)


def test_released_defaults() -> None:
    assert (RELEASED.lr, RELEASED.steps, RELEASED.eps) == (1e-3, 30, pytest.approx(0.05 * 255))
