"""MetaCloak: transformations against references, a pool along one training run, and what ASPL's tests ask too."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
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
from bench.diffusion.losses import latent_distribution, noise_prediction_loss
from bench.diffusion.surrogates import denoising_losses, draw, pixel_gradient
from bench.errors import BenchError
from bench.options import Variant
from bench.records import ImageSet, Model, Subject
from defenses.metacloak import (
    MetaCloak,
    Workshop,
    blur,
    crop,
    draw_transformation,
    gaussians,
    lesson_of,
    open_workshop,
    through,
    train_pool,
)
from defenses.noise import SignNoise

FEW: dict[str, Any] = {"trials": 1, "pool_steps": 2, "interval": 2, "surrogate_steps": 2, "pgd_steps": 2,
                       "class_images": 2, "class_steps": 1}


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


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_blur_equals_a_reference() -> None:
    """A photo whose edges do not matter, convolved by hand, each photo with its own sigma."""
    x = torch.zeros(2, 3, 16, 16)
    x[:, :, 8, 8] = torch.tensor([1.0, 2.0, 3.0])
    sigma = torch.tensor([0.5, 2.0])
    found = blur(x, gaussians(sigma, 7))
    for photo, s in enumerate(sigma.tolist()):
        weights = [math.exp(-(u**2) / (2 * s**2)) for u in range(-3, 4)]
        total = sum(weights)
        for dy, dx in ((0, 0), (1, 0), (-2, 3), (3, -3)):
            expected = 2 * weights[3 + dy] * weights[3 + dx] / total**2
            assert found[photo, 1, 8 + dy, 8 + dx].item() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(blur(torch.ones(1, 3, 8, 8), gaussians(torch.ones(1), 7)), torch.ones(1, 3, 8, 8))


def test_the_crop_cuts_and_mirrors() -> None:
    """Known windows: the whole photo, its mirror image, and its upper left quarter."""
    x = torch.rand(3, 3, 8, 8, generator=seeded())
    windows = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[-1, 0, 0], [0, 1, 0]], [[0.5, 0, -0.5], [0, 0.5, -0.5]]])
    found = crop(x, windows)
    assert torch.allclose(found[0], x[0], atol=1e-5)
    assert torch.allclose(found[1], x[1].flip(-1), atol=1e-5)
    quarter = torch.nn.functional.interpolate(x[2:, :, :4, :4], size=8, mode="bilinear", align_corners=False)
    assert torch.allclose(found[2, :, 1:6, 1:6], quarter[0, :, 1:6, 1:6], atol=1e-5)


def test_drawn_transformations_keep_their_ranges() -> None:
    x = torch.zeros(400, 3, 8, 8)
    drawn = draw_transformation(MetaCloak(min_crop=0.8), x, seeded())
    scale = drawn.windows[:, 1, 1]
    assert 0.8 <= scale.min() < 0.83 and 0.97 < scale.max() <= 1
    assert torch.all(drawn.windows[:, :, 2].abs() <= 1 - scale[:, None] + 1e-6)
    assert 0.4 < (drawn.windows[:, 0, 0] < 0).float().mean() < 0.6
    middle = gaussians(torch.tensor([0.1, 2.0]), 7)[:, 3]
    assert torch.all((drawn.kernels[:, 3] <= middle[0] + 1e-6) & (drawn.kernels[:, 3] >= middle[1] - 1e-6))
    released = draw_transformation(MetaCloak(min_crop=0.8, variant=Variant.released), x, seeded())
    assert torch.all(released.windows[:, 1, 1] == 1)


def test_the_loss_moves_pixels_through_every_transformation(model: Model, ctx: Context) -> None:
    """Gradients are not zero and follow the mirror: under a flip alone, the loss of x is that of its mirror image."""
    method = MetaCloak(min_crop=1, flip=1, blur_low=1e-3, blur_high=1e-3)
    shop, x = open_workshop(method, model, ctx), to_float(subject("ada").published.pixels)
    parts, states = shop.studio.components, shop.theta.states(shop.studio.ids(subject("ada")))
    losses = denoising_losses(parts.vae, parts.unet, parts.scheduler, states.detach(),
                              draw(parts.vae, parts.scheduler, x, seeded()))
    mirrored = pixel_gradient(x, through(draw_transformation(method, x, seeded()), losses), 2)
    assert torch.allclose(mirrored.flip(-1), pixel_gradient(x.flip(-1), losses, 4), rtol=1e-3, atol=1e-7)
    blurred = pixel_gradient(x, through(draw_transformation(MetaCloak(), x, seeded()), losses), 4)
    assert torch.all(blurred.abs().amax((1, 2, 3)) > 0)


@pytest.mark.parametrize("without", [
    {"min_crop": 1.0}, {"blur_low": 1e-3, "blur_high": 1e-3}, {"flip": 0.0}, {"prior_weight": 0.0}, {"pool_steps": 0},
])
def test_each_part_changes_the_photos(without: dict[str, Any], model: Model, ctx: Context) -> None:
    method, ada = MetaCloak(lr=1e-2, **FEW), subject("ada")
    found, other = (m.protect([ada], model, ctx)[0].pixels for m in (method, replace(method, **without)))
    assert not torch.equal(found, other)


def pooled(model: Model, ctx: Context, **options: Any) -> tuple[Workshop, list[list[Tensor]]]:
    method = MetaCloak(lr=1e-3, **{**FEW, **options})
    shop, ada = open_workshop(method, model, ctx), subject("ada")
    return shop, train_pool(method, ada, to_float(ada.published.pixels), shop, seeded())


def test_the_pool_lies_along_one_run(model: Model, ctx: Context) -> None:
    """At 0, 1, 3 and 5 steps of one optimiser, beginning at the published weights."""
    shop, pool = pooled(model, ctx, pool_steps=6, interval=2)
    assert len(pool) == 4
    assert all(torch.equal(a, b) for a, b in zip(pool[0], shop.start))
    assert {int(state["step"]) for state in shop.theta.optimizer.state.values()} == {5}
    assert all(any(not torch.equal(a, b) for a, b in zip(x, y)) for x, y in pairwise(pool))
    _, short = pooled(model, ctx, pool_steps=2, interval=2)
    assert all(torch.equal(a, b) for a, b in zip(pool[1], short[1]))


def test_the_published_pool_has_six_states(model: Model, ctx: Context) -> None:
    """At a hundredth of the size: 10 steps, one state every 2, and the start; without a run, the start alone."""
    assert len(pooled(model, ctx, pool_steps=10, interval=2)[1]) == MetaCloak().pool_steps // MetaCloak().interval + 1
    assert len(pooled(model, ctx, pool_steps=0)[1]) == 1


@pytest.mark.parametrize(("variant", "low", "high"), [(Variant.described, 0.5, 1.0), (Variant.released, 0.0, 0.05)])
def test_surrogates_learn_at_the_published_rate_only_as_described(
    variant: Variant, low: float, high: float, model: Model, ctx: Context,
) -> None:
    """bfloat16 rounds steps of 5e-7 away unless a weight is already tiny."""
    method, ada = MetaCloak(variant=variant, **FEW), subject("ada")
    shop = open_workshop(method, model, ctx)
    shop.theta.learn(lesson_of(method, ada, to_float(ada.published.pixels), shop, seeded()), 2)
    pairs = [(a, b) for a, b in zip(shop.theta.parameters, shop.start) if b.abs().max() > 0]
    share = sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
    assert low <= share <= high
    assert shop.theta.clip == (1.0 if variant is Variant.described else None)


def test_released_surrogates_see_photos_out_of_range(model: Model, ctx: Context) -> None:
    x, means = to_float(subject("ada").published.pixels), {}
    for variant in Variant:
        method = MetaCloak(variant=variant, prior_weight=0)
        shop = open_workshop(method, model, ctx)
        lesson = lesson_of(method, subject("ada"), x, shop, seeded())
        shown = x if variant is Variant.described else subject("ada").published.pixels.float()
        expected = latent_distribution(shop.studio.vae, shown).mean
        means[variant] = lesson.instance.latents.mean
        assert torch.allclose(means[variant].float(), expected.float(), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(*(m.float() for m in means.values()), atol=1e-2)


@pytest.mark.parametrize(("eps", "size"), [(0, 16), (1, 16), (11, 16), (255, 16), (11, 32)])
def test_the_saved_files_are_within_the_budget(
    eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = MetaCloak(eps=eps, alpha_255=max(eps, 1), **FEW)
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


def test_the_objective_rises_more_than_under_noise(ctx: Context) -> None:
    """White box, embedded weights, through T: the loss is higher on its photos than on noisy ones. A random network
    would not do: behind a blur it hardly sees its photo."""
    ada, model = subject("ada", 32), resolve("micro-sd-a")
    frozen = MetaCloak(eps=16, alpha_255=3, lr=1e-12, prior_weight=0, **{**FEW, "pool_steps": 0, "pgd_steps": 12})
    shop = open_workshop(frozen, model, ctx)
    states, parts = shop.theta.states(shop.studio.ids(ada)).detach().expand(2, -1, -1), shop.studio.components

    def loss(photos: ImageSet) -> float:
        x, generator, total = to_float(photos.pixels), seeded(0), 0.0
        with torch.no_grad():
            for _ in range(12):
                seen = draw_transformation(frozen, x, generator)(x, slice(0, 2))
                latents = latent_distribution(parts.vae, seen).sample(generator)
                total += noise_prediction_loss(parts.unet, parts.scheduler, latents, states, generator=generator).item()
        return total / 12

    protected = loss(frozen.protect([ada], model, ctx)[0])
    assert protected > 1.05 * loss(ada.published)
    assert protected > 1.05 * loss(SignNoise(16).protect([ada], model, ctx)[0])


def test_neither_order_company_nor_batch_matters(model: Model, ctx: Context) -> None:
    method, people = MetaCloak(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both = method.protect(people, model, ctx)
    swapped = method.protect(people[::-1], model, ctx)
    alone = replace(method, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    assert (alone[0].pixels != both[1].pixels).float().mean() < 0.01


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = MetaCloak(lr=1e-3, **FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("trials", -1), ("interval", 0), ("min_crop", 0),
    ("min_crop", 1.5), ("flip", 2), ("blur_kernel", 4), ("blur_high", 0.05), ("variant", "fixed"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        MetaCloak(**{field: value})


def test_published_defaults() -> None:
    """11 levels, a tenth of it a step; 4 trials over 1000 steps by 200, 6 and 2 steps a round; blur of 7 pixels."""
    method = MetaCloak()
    assert (method.eps, method.alpha_255, method.lr) == (11, 1.1, 5e-7)
    assert (method.trials, method.pool_steps, method.interval) == (4, 1000, 200)
    assert (method.surrogate_steps, method.pgd_steps) == (2, 6)
    assert (method.blur_kernel, method.blur_low, method.blur_high, method.flip) == (7, 0.1, 2.0, 0.5)
