"""DreamBooth's loss by its formula, batches, class images, and the surrogate that defenses train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.finetuning import (
    Examples,
    Lesson,
    Prior,
    Recipe,
    Shuffled,
    Surrogate,
    check_photos,
    class_images,
    dreambooth_loss,
    examples,
    train,
)
from bench.diffusion.loading import Components, load_components
from bench.diffusion.losses import noise_prediction_loss, normal
from bench.errors import BenchError
from bench.records import ImageSet


@pytest.fixture
def parts(tiny_sd: Path) -> Components:
    return load_components(resolve(str(tiny_sd)))


def photos(count: int, size: int = 16, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
    return ImageSet(pixels, tuple(str(i) for i in range(count)))


def lesson(parts: Components, prior: Examples | None = None, seed: int = 0) -> Lesson:
    own = examples(parts, photos(3), "a photo of sks person")
    return Lesson(own, prior, 2, 1.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_loss_is_the_sum_of_its_two_terms(parts: Components, weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(1)
    instance, prior = normal((3, 4, 8, 8), generator, like), normal((2, 4, 8, 8), generator, like)
    states = normal((2, 32, 16), generator, like)
    found = dreambooth_loss(parts.unet, parts.scheduler, instance, prior, states, weight,
                            torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    noise = normal((5, 4, 8, 8), again, like)
    steps = torch.randint(1000, (5,), generator=again)
    terms = [
        noise_prediction_loss(parts.unet, parts.scheduler, latents, states[i: i + 1].expand(len(latents), -1, -1),
                              generator=again, timesteps=steps[part], noise=noise[part])
        for i, (latents, part) in enumerate([(instance, slice(0, 3)), (prior, slice(3, 5))])
    ]
    assert found.item() == pytest.approx((terms[0] + weight * terms[1]).item(), rel=1e-5)


def test_every_photo_is_seen_once_per_pass() -> None:
    stream = Shuffled(4, torch.Generator().manual_seed(0))
    seen = torch.cat([stream.take(3) for _ in range(8)])
    assert set(Counter(seen.tolist()).values()) == {6}


def test_training_lowers_the_loss(parts: Components, tmp_path: Path) -> None:
    parts.unet.requires_grad_(True)
    parts.text_encoder.requires_grad_(True)
    losses = train(parts, lesson(parts), Recipe(60, 1e-2), Context("key", tmp_path), "test")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_mixed_precision_trains_float32_weights(parts: Components, tmp_path: Path) -> None:
    parts.unet.requires_grad_(True)
    losses = train(parts, lesson(parts), Recipe(2, 1e-3, "bf16"), Context("key", tmp_path), "test")
    assert all(p.dtype == torch.float32 for p in parts.unet.parameters())
    assert len(losses) == 2


def test_a_diverging_run_is_said(parts: Components, tmp_path: Path) -> None:
    parts.unet.requires_grad_(True)
    with torch.no_grad():
        parts.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(BenchError, match=r"the loss is nan; lower lr=0\.1"):
        train(parts, lesson(parts), Recipe(1, 0.1), Context("key", tmp_path), "test")


def test_class_images_are_the_models_own_and_repeat(tiny_sd: Path, tmp_path: Path) -> None:
    model, prior = resolve(str(tiny_sd)), Prior(3, steps=2)
    first = class_images(model, "person", prior, 16, Context("one", tmp_path))
    second = class_images(model, "person", prior, 16, Context("two", tmp_path))
    assert torch.equal(first.pixels, second.pixels)
    assert not torch.equal(first.pixels[0], first.pixels[1])
    assert set(first.captions) == {"a photo of person"}


@pytest.mark.parametrize("size", [(16, 24), (15, 15)])
def test_photos_that_cannot_be_encoded_are_refused(tiny_sd: Path, size: tuple[int, int]) -> None:
    bad = ImageSet(torch.zeros(1, 3, *size, dtype=torch.uint8), ("a",))
    with pytest.raises(BenchError, match=f"photos are {size[1]}x{size[0]} pixels"):
        check_photos(bad, resolve(str(tiny_sd)), "test")
    with pytest.raises(BenchError, match="no photos"):
        check_photos(ImageSet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), ()), resolve(str(tiny_sd)), "test")


def test_a_surrogate_copies_in_place_learns_and_is_frozen_between(tiny_sd: Path) -> None:
    model = resolve(str(tiny_sd))
    theta, copy = (Surrogate(load_components(model), 1e-3, 1.0, True) for _ in range(2))
    start = [p.clone() for p in theta.parameters]
    parts = load_components(model)
    copy.learn(lesson(parts), 2)
    assert any(not torch.equal(a, b) for a, b in zip(copy.parameters, start))
    assert all(torch.equal(a, b) for a, b in zip(theta.parameters, start))
    assert not any(p.requires_grad for p in copy.parameters)
    places = [p.data_ptr() for p in copy.parameters]
    copy.copy_from(theta.parameters)
    assert places == [p.data_ptr() for p in copy.parameters]
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters, start))


def test_a_restarted_optimiser_is_a_fresh_one(tiny_sd: Path) -> None:
    model = resolve(str(tiny_sd))
    used, fresh = (Surrogate(load_components(model), 1e-3, 1.0, True) for _ in range(2))
    parts = load_components(model)
    used.learn(lesson(parts, seed=1), 3)
    used.copy_from(fresh.parameters)
    for surrogate in (used, fresh):
        surrogate.learn(lesson(parts, seed=2), 2)
    assert all(torch.equal(a, b) for a, b in zip(used.parameters, fresh.parameters))
