"""ASPL: every loss moves pixels, every surrogate learns (or, as released, does not), and the budget holds."""

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
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_components
from bench.diffusion.losses import latent_distribution, noise_prediction_loss, tokenise
from bench.diffusion.pairs import Pair, open_pair
from bench.diffusion.surrogates import denoising_losses, draw, pixel_gradient
from bench.errors import BenchError
from bench.records import ImageSet, Model, Subject
from defenses.aspl import Aspl, Variant, raise_loss
from defenses.noise import SignNoise

FEW: dict[str, Any] = {"outer_steps": 2, "class_images": 3, "class_steps": 1}


def subject(name: str, size: int = 16) -> Subject:
    generator = torch.Generator().manual_seed(len(name))

    def photos() -> ImageSet:
        pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
        return ImageSet(pixels, ("a", "b", "c"))

    return Subject(name, photos(), photos(), photos())


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def pair_of(method: Aspl, model: Model, ctx: Context) -> Pair:
    return open_pair(model, method.teaching(), ctx, half=method.variant is Variant.released)


def prompt_ids(pair: Pair) -> Tensor:
    return tokenise(pair.studio.components.tokenizer, ["a photo of sks person"])


@pytest.mark.parametrize("eps", [0, 1, 6.375, 16, 255])
@pytest.mark.parametrize("size", [16, 32])
def test_the_saved_files_are_within_the_budget(
    eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = Aspl(eps=eps, alpha_255=max(eps, 1), **FEW)
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


@pytest.mark.parametrize("variant", list(Variant))
def test_the_noise_prediction_loss_moves_pixels(variant: Variant, model: Model, ctx: Context) -> None:
    """Its gradient is not zero on any photo, and one step follows its sign."""
    pair = pair_of(Aspl(variant=variant), model, ctx)
    x = to_float(subject("ada").published.pixels)
    states, vae = pair.copy.states(prompt_ids(pair)), pair.studio.vae
    draws = draw(vae, pair.copy.scheduler, x, torch.Generator().manual_seed(1))
    gradient = pixel_gradient(x, denoising_losses(vae, pair.copy.unet, pair.copy.scheduler, states, draws), 4)
    assert torch.all(gradient.abs().amax((1, 2, 3)) > 0)
    method = Aspl(pgd_steps=1, alpha_255=2, eps=16, variant=variant)
    moved = raise_loss(method, pair, x, x, prompt_ids(pair), torch.Generator().manual_seed(1))
    inside = (x.abs() < 0.95) & (gradient != 0)
    assert torch.allclose((moved - x)[inside], (gradient.sign() * 4 / 255)[inside], atol=1e-6)


@pytest.mark.parametrize("term", ["instance", "prior"])
def test_each_term_of_the_surrogates_loss_moves_pixels(term: str, model: Model, ctx: Context) -> None:
    """Through the surrogate that it trains: with the term, the protected photos are others than without it."""
    strong = Aspl(lr=1e-2, **FEW)
    without = replace(strong, surrogate_steps=0) if term == "instance" else replace(strong, prior_weight=0)
    found, other = (m.protect([subject("ada")], model, ctx)[0].pixels for m in (strong, without))
    assert not torch.equal(found, other)


def test_the_objective_rises_more_than_under_noise(model: Model, ctx: Context) -> None:
    """White box, frozen surrogate: the loss that ASPL ascends is higher on its photos than on noisy ones."""
    ada, parts = subject("ada"), load_components(model)
    frozen = Aspl(eps=32, alpha_255=4, outer_steps=4, surrogate_steps=0, prior_weight=0)
    states = parts.text_encoder(tokenise(parts.tokenizer, ["a photo of sks person"]))[0].detach()

    def loss(photos: ImageSet) -> float:
        generator, total = torch.Generator().manual_seed(0), 0.0
        with torch.no_grad():
            for _ in range(40):
                latents = latent_distribution(parts.vae, to_float(photos.pixels)).sample(generator)
                total += noise_prediction_loss(parts.unet, parts.scheduler, latents, states.expand(3, -1, -1),
                                               generator=generator).item()
        return total / 40

    plain = loss(ada.published)
    protected = loss(frozen.protect([ada], model, ctx)[0])
    noisy = loss(SignNoise(32).protect([ada], model, ctx)[0])
    assert protected > plain
    assert protected > noisy


def moved_share(method: Aspl, model: Model, ctx: Context) -> list[float]:
    """Share of the weights that change in one block of surrogate steps: of the copy, and of theta."""
    pair, ada = pair_of(method, model, ctx), subject("ada")
    lesson = pair.studio.clean_lesson(ada, torch.Generator().manual_seed(0))
    shares = []
    for surrogate in (pair.copy, pair.theta):
        surrogate.learn(lesson, method.surrogate_steps)
        pairs = [(a, b) for a, b in zip(surrogate.parameters, pair.start) if b.abs().max() > 0]
        changed = sum(int((a != b).sum()) for a, b in pairs)
        shares.append(changed / sum(a.numel() for a, _ in pairs))
    return shares


def test_described_surrogates_learn_at_the_published_rate(model: Model, ctx: Context) -> None:
    assert all(share > 0.5 for share in moved_share(Aspl(**FEW), model, ctx))


def test_released_surrogates_hardly_move_at_the_published_rate(model: Model, ctx: Context) -> None:
    """bfloat16 rounds steps of 5e-7 away unless a weight is already tiny."""
    assert all(share < 0.05 for share in moved_share(Aspl(variant=Variant.released, **FEW), model, ctx))


def test_clipping_limits_the_described_surrogate_only(model: Model, ctx: Context) -> None:
    pairs = {v: pair_of(Aspl(variant=v), model, ctx) for v in Variant}
    assert pairs[Variant.described].theta.clip == 1.0
    assert pairs[Variant.released].theta.clip is None
    assert {p.dtype for p in pairs[Variant.described].theta.parameters} == {torch.float32}
    assert {p.dtype for p in pairs[Variant.released].theta.parameters} == {torch.bfloat16}


def test_neither_order_company_nor_batch_matters(model: Model, ctx: Context) -> None:
    method, people = Aspl(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both = method.protect(people, model, ctx)
    swapped = method.protect(people[::-1], model, ctx)
    alone = replace(method, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    differing = (alone[0].pixels != both[1].pixels).float().mean()
    assert differing < 0.01


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = Aspl(lr=1e-3, **FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_frozen_text_encoder_stays(model: Model, ctx: Context) -> None:
    pair = pair_of(Aspl(train_text_encoder=False, lr=1e-2, prior_weight=0), model, ctx)
    before = [p.clone() for p in pair.copy.text_encoder.parameters()]
    pair.copy.learn(pair.studio.clean_lesson(subject("ada"), torch.Generator().manual_seed(0)), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.copy.text_encoder.parameters()))


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("outer_steps", -1), ("batch", 0), ("class_images", 0),
    ("variant", "fixed"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"{field}|variant"):
        Aspl(**{field: value})


def test_published_defaults() -> None:
    """0.05 and 0.005 on the [-1, 1] scale; 50 x (3 + 6 + 3) steps at 5e-7."""
    method = Aspl()
    assert (method.eps, method.alpha_255) == pytest.approx((0.05 * 127.5, 0.005 * 127.5))
    assert (method.outer_steps, method.surrogate_steps, method.pgd_steps, method.lr) == (50, 3, 6, 5e-7)
