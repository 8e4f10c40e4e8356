"""FSMG: the surrogate learns set A, its loss moves pixels, and the budget holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import Components, load_components
from bench.diffusion.losses import encode_ids, latent_distribution, noise_prediction_loss, tokenise
from bench.diffusion.surrogates import Studio, denoising_losses, draw, open_studio, pixel_gradient
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.fsmg import Fsmg, raise_loss, train_surrogate
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

FEW: dict[str, Any] = {"surrogate_steps": 3, "pgd_steps": 4, "class_images": 3, "class_steps": 1}


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def trained(method: Fsmg, model: Model, ctx: Context) -> tuple[Studio, Components]:
    studio = open_studio(model, method.teaching(), ctx)
    return studio, train_surrogate(method, subject("ada"), studio, torch.Generator().manual_seed(0), ctx)


@pytest.mark.parametrize(("eps", "size"), [(0, 16), (1, 32), (6.375, 16), (255, 16)])
def test_the_saved_files_are_within_the_budget(
    eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = Fsmg(eps=eps, alpha_255=max(eps, 1), **FEW)
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


def test_the_noise_prediction_loss_moves_pixels(model: Model, ctx: Context) -> None:
    """Its gradient is not zero on any photo, and one step follows its sign."""
    method = Fsmg(**{**FEW, "pgd_steps": 1}, alpha_255=2, eps=16)
    studio, surrogate = trained(method, model, ctx)
    ada = subject("ada")
    x = to_float(ada.published.pixels)
    states = encode_ids(surrogate.text_encoder, studio.ids(ada))
    draws = draw(surrogate.vae, surrogate.scheduler, x, torch.Generator().manual_seed(1))
    losses = denoising_losses(surrogate.vae, surrogate.unet, surrogate.scheduler, states, draws)
    gradient = pixel_gradient(x, losses, 4)
    assert torch.all(gradient.abs().amax((1, 2, 3)) > 0)
    moved = raise_loss(method, ada, x, studio, surrogate, torch.Generator().manual_seed(1), ctx)
    inside = (x.abs() < 0.95) & (gradient != 0)
    assert torch.allclose((moved - x)[inside], (gradient.sign() * 4 / 255)[inside], atol=1e-6)


@pytest.mark.parametrize("term", ["instance", "prior"])
def test_each_term_of_the_surrogates_loss_moves_pixels(term: str, model: Model, ctx: Context) -> None:
    """Through the surrogate that it trains: with the term, the protected photos are others than without it."""
    strong = Fsmg(lr=1e-2, **FEW)
    without = replace(strong, surrogate_steps=0) if term == "instance" else replace(strong, prior_weight=0)
    found, other = (m.protect([subject("ada")], model, ctx)[0].pixels for m in (strong, without))
    assert not torch.equal(found, other)


def share_moved(before: torch.nn.Module, after: torch.nn.Module) -> float:
    pairs = [(a, b) for a, b in zip(before.parameters(), after.parameters()) if a.abs().max() > 0]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_surrogate_learns_at_the_published_rate_and_is_frozen_again(
    precision: str, model: Model, ctx: Context,
) -> None:
    """Also in mixed precision, because its weights are of 32 bits."""
    start = load_components(model)
    _, surrogate = trained(Fsmg(precision=precision, **FEW), model, ctx)
    assert share_moved(start.unet, surrogate.unet) > 0.5
    assert share_moved(start.text_encoder, surrogate.text_encoder) > 0.3  # other words' embeddings get no gradient
    assert not any(p.requires_grad for m in (surrogate.unet, surrogate.text_encoder) for p in m.parameters())


def test_a_frozen_text_encoder_stays(model: Model, ctx: Context) -> None:
    start = load_components(model)
    _, surrogate = trained(Fsmg(train_text_encoder=False, lr=1e-2, **FEW), model, ctx)
    assert share_moved(start.text_encoder, surrogate.text_encoder) == 0
    assert share_moved(start.unet, surrogate.unet) > 0.5


def test_the_surrogate_fits_the_clean_set(model: Model, ctx: Context) -> None:
    """The loss of set A under the trained surrogate is lower than under the published weights."""
    method = Fsmg(lr=3e-3, prior_weight=0, batch=3, surrogate_steps=40)
    studio, surrogate = trained(method, model, ctx)
    ada = subject("ada")

    def loss(parts: Components) -> float:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            latents = latent_distribution(parts.vae, to_float(ada.clean.pixels)).mean.repeat(20, 1, 1, 1)
            states = encode_ids(parts.text_encoder, studio.ids(ada)).expand(len(latents), -1, -1)
            return noise_prediction_loss(parts.unet, parts.scheduler, latents, states, generator=generator).item()

    assert loss(surrogate) < 0.98 * loss(load_components(model))


def test_the_objective_rises_more_than_under_noise(model: Model, ctx: Context) -> None:
    """White box, untrained surrogate: the loss that FSMG ascends is higher on its photos than on noisy ones."""
    ada, parts = subject("ada"), load_components(model)
    frozen = Fsmg(eps=32, alpha_255=4, surrogate_steps=0, prior_weight=0, pgd_steps=24)
    states = parts.text_encoder(tokenise(parts.tokenizer, ["a photo of sks person"]))[0].detach()

    def loss(photos: ImageSet) -> float:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            latents = latent_distribution(parts.vae, to_float(photos.pixels)).mean.repeat(40, 1, 1, 1)
            return noise_prediction_loss(parts.unet, parts.scheduler, latents, states.expand(len(latents), -1, -1),
                                         generator=generator).item()

    protected = loss(frozen.protect([ada], model, ctx)[0])
    assert protected > loss(ada.published)
    assert protected > loss(SignNoise(32).protect([ada], model, ctx)[0])


def test_neither_order_company_nor_batch_matters(model: Model, ctx: Context) -> None:
    method, people = Fsmg(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both = method.protect(people, model, ctx)
    swapped = method.protect(people[::-1], model, ctx)
    alone = replace(method, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    assert (alone[0].pixels != both[1].pixels).float().mean() < 0.01


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = Fsmg(lr=1e-3, **FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("surrogate_steps", -1), ("pgd_steps", -1), ("batch", 0),
    ("class_images", 0), ("pgd_batch", 0), ("precision", "fp16"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        Fsmg(**{field: value})


def test_published_defaults() -> None:
    """0.05 and 0.005 on the [-1, 1] scale; 1000 surrogate steps of 2 + 2 images at 5e-7, 100 gradient steps."""
    method = Fsmg()
    assert (method.eps, method.alpha_255) == pytest.approx((0.05 * 127.5, 0.005 * 127.5))
    assert (method.surrogate_steps, method.batch, method.lr, method.pgd_steps) == (1000, 2, 5e-7, 100)
