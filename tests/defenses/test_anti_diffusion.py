"""Anti-Diffusion: prompts fit, pixels climb both losses, the UNet follows, and budgets are what they add up to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.context import Context
from bench.diffusion.attention import Maps, recorded
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_components
from bench.diffusion.losses import latent_distribution, noise_prediction_loss
from bench.diffusion.surrogates import draw, pixel_gradient
from bench.errors import BenchError
from bench.options import Variant
from bench.records import ImageSet, Model, Subject
from defenses.anti_diffusion import (
    AntiDiffusion,
    Desk,
    disturb,
    fit_prompt,
    objective,
    open_desk,
    semantics,
    tune,
)
from defenses.noise import SignNoise

FEW: dict[str, Any] = {"epochs": 1, "pgd_steps": 2, "prompt_steps": 1, "tuning_steps": 1, "attention_factor": 1}


def subject(name: str, size: int = 16) -> Subject:
    generator = torch.Generator().manual_seed(len(name))

    def photos() -> ImageSet:
        pixels = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
        return ImageSet(pixels, ("a", "b"))

    return Subject(name, photos(), photos(), photos())


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def photo() -> Tensor:
    return to_float(subject("ada").published.pixels)[:1]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def denoising_loss(desk: Desk, x: Tensor, states: Tensor) -> float:
    """L_ldm of a photo under many draws."""
    generator, total, parts = seeded(0), 0.0, desk.parts
    with torch.no_grad():
        for _ in range(20):
            latents = latent_distribution(parts.vae, x).sample(generator)
            total += noise_prediction_loss(parts.unet, parts.scheduler, latents, states, generator=generator).item()
    return total / 20


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize("eps", [0, 1, 6.375, 16, 255])
def test_the_saved_files_are_within_the_budget(
    eps: float, variant: Variant, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", 32 if eps == 1 else 16)
    method = AntiDiffusion(eps=eps, alpha_255=max(eps, 1), variant=variant, **FEW)
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= method.budget().eps


def test_the_released_rounds_leave_the_ball_that_their_eps_names(model: Model, ctx: Context) -> None:
    """Each round starts a new ball: one eps after one round, more than one eps after two."""
    one = AntiDiffusion(eps=4, alpha_255=4, variant=Variant.released, **{**FEW, "epochs": 0})
    desk, x = open_desk(one, model, ctx), photo()
    reached = [(disturb(m, x, desk, seeded()) - x).abs().max().item() * 127.5 for m in (one, replace(one, epochs=2))]
    assert reached[0] == pytest.approx(4, abs=1e-3)
    assert 4 < reached[1] <= 12 + 1e-3
    assert (one.budget().eps, replace(one, epochs=2).budget().eps) == (4, 12)


@pytest.mark.parametrize("variant", list(Variant))
def test_each_term_moves_pixels(variant: Variant, model: Model, ctx: Context) -> None:
    """Its gradient is not zero through either term. A loud prompt makes attention sharp: the random UNet's own is even,
    above the 1 % beyond which the released term has no gradient."""
    method = AntiDiffusion(variant=variant, **FEW)
    desk, x = open_desk(method, model, ctx), photo()
    draws = draw(desk.parts.vae, desk.parts.scheduler, x, seeded())

    def gradient(weight: float) -> Tensor:
        with recorded(desk.parts.unet, later_half=variant is Variant.released) as maps:
            losses = objective(replace(method, sdl_weight=weight), desk, 100 * desk.empty, draws, maps)
            return pixel_gradient(x, losses, 1)

    denoising, both = gradient(0), gradient(1e3)
    assert denoising.abs().max() > 0
    assert (both - denoising).abs().max() > 0
    assert not torch.equal(both.sign(), denoising.sign())


def test_without_the_semantic_term_photos_are_others(model: Model, ctx: Context) -> None:
    method, ada = AntiDiffusion(sdl_weight=100, alpha_255=2, **FEW), subject("ada")
    found, other = (m.protect([ada], model, ctx)[0].pixels for m in (method, replace(method, sdl_weight=0)))
    assert not torch.equal(found, other)


def test_the_semantic_loss_is_the_distance_to_zero_maps() -> None:
    """Two tokens and one place: by hand. Blocks in the middle of the UNet do not count."""
    maps = Maps(cross={"down_blocks.0": torch.tensor([[[0.9, 0.1]]]), "up_blocks.0": torch.tensor([[[0.7, 0.3]]]),
                       "mid_block.0": torch.tensor([[[0.0, 1.0]]])})
    assert semantics(AntiDiffusion(), maps).tolist() == pytest.approx([0.8**2 + 0.2**2])
    faint = Maps(cross={"down_blocks.0": torch.tensor([[[0.997, 0.003]]])})
    released = AntiDiffusion(variant=Variant.released)
    assert semantics(released, faint).tolist() == pytest.approx([(1.0**2 + 0.3**2) / 2])


def test_the_released_loss_has_no_gradient_above_one_percent() -> None:
    shares = torch.tensor([[[0.985, 0.01 + 1e-4, 0.0049]]], requires_grad=True)
    semantics(AntiDiffusion(variant=Variant.released), Maps(cross={"up_blocks.0": shares})).sum().backward()
    assert shares.grad is not None
    assert (shares.grad[0, 0] != 0).tolist() == [False, False, True]


def test_a_width_without_maps_is_refused(model: Model, ctx: Context) -> None:
    with pytest.raises(BenchError, match="attention_factor=8"):
        AntiDiffusion(**{**FEW, "attention_factor": 8}).protect([subject("ada")], model, ctx)


def test_prompt_tuning_fits_the_photo(model: Model, ctx: Context) -> None:
    desk, x = open_desk(AntiDiffusion(), model, ctx), photo()
    fitted = fit_prompt(AntiDiffusion(prompt_steps=30, prompt_lr=0.1), desk, x, desk.empty, seeded())
    assert denoising_loss(desk, x, fitted) < denoising_loss(desk, x, desk.empty)
    assert not fitted.requires_grad


def test_a_fitted_prompt_changes_what_the_pixels_become(model: Model, ctx: Context) -> None:
    method, ada = AntiDiffusion(prompt_lr=1.0, alpha_255=2, **FEW), subject("ada")
    found, other = (m.protect([ada], model, ctx)[0].pixels for m in (method, replace(method, prompt_steps=0)))
    assert not torch.equal(found, other)


@pytest.mark.parametrize("variant", list(Variant))
def test_the_unet_learns_at_the_published_rate(variant: Variant, model: Model, ctx: Context) -> None:
    """And nothing else does; only ``described`` limits the gradient."""
    method = AntiDiffusion(variant=variant)
    desk, published = open_desk(method, model, ctx), load_components(model)
    tune(method, desk, photo(), desk.empty, seeded())
    pairs = [(a, b) for a, b in zip(desk.surrogate.parameters, desk.start) if b.abs().max() > 0]
    assert sum(int((a != b).sum()) for a, b in pairs) > 0.5 * sum(b.numel() for _, b in pairs)
    frozen = zip(desk.parts.text_encoder.parameters(), published.text_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in frozen)
    assert desk.surrogate.clip == (1.0 if variant is Variant.described else None)
    assert not any(p.requires_grad for p in desk.surrogate.parameters)


def test_a_tuned_unet_changes_what_the_pixels_become(model: Model, ctx: Context) -> None:
    method, ada = AntiDiffusion(lr=1e-2, alpha_255=2, **FEW), subject("ada")
    found, other = (m.protect([ada], model, ctx)[0].pixels for m in (method, replace(method, tuning_steps=0)))
    assert not torch.equal(found, other)


def test_the_objective_rises_more_than_under_noise(ctx: Context) -> None:
    """White box, embedded weights, empty prompt: J is higher on its photos than on noisy ones. A random network would
    not do: it hardly sees its photo."""
    ada, model = subject("ada", 32), resolve("micro-sd-a")
    method = AntiDiffusion(eps=16, alpha_255=3, epochs=0, pgd_steps=12, prompt_steps=0, attention_factor=2)
    desk = open_desk(method, model, ctx)

    def height(photos: ImageSet) -> float:
        x, generator, total = to_float(photos.pixels), seeded(0), 0.0
        with torch.no_grad(), recorded(desk.parts.unet, frozenset({4})) as maps:
            for _ in range(12):
                draws = draw(desk.parts.vae, desk.parts.scheduler, x, generator)
                total += objective(method, desk, desk.empty, draws, maps)(x, slice(0, len(x))).mean().item()
        return total / 12

    protected = height(method.protect([ada], model, ctx)[0])
    assert protected > height(ada.published) + 0.01
    assert protected > height(SignNoise(16).protect([ada], model, ctx)[0]) + 0.01


def test_neither_order_nor_company_matters(model: Model, ctx: Context) -> None:
    method, people = AntiDiffusion(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both, swapped = method.protect(people, model, ctx), method.protect(people[::-1], model, ctx)
    alone = method.protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    assert torch.equal(both[1].pixels, alone[0].pixels)


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = AntiDiffusion(alpha_255=2, **FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("prompt_lr", 0), ("epochs", -1), ("sdl_weight", -1),
    ("attention_factor", 0), ("variant", "fixed"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        AntiDiffusion(**{field: value})


def test_published_defaults() -> None:
    """0.05 and 0.002 on the [-1, 1] scale; 5 epochs of 10 pixel and 20 UNet steps; what released budgets add up to."""
    method = AntiDiffusion()
    assert (method.eps, method.alpha_255) == pytest.approx((0.05 * 127.5, 0.002 * 127.5))
    assert (method.epochs, method.pgd_steps, method.tuning_steps, method.prompt_steps) == (5, 10, 20, 30)
    assert (method.lr, method.prompt_lr, method.budget().eps) == (5e-7, 1e-3, 6.375)
    released = replace(method, variant=Variant.released)
    assert released.budget().eps == pytest.approx(6 * 10 * 0.255)
    assert replace(released, eps=1.275).budget().eps == pytest.approx(6 * 1.275)
