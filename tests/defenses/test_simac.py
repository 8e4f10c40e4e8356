"""SimAC: both terms move pixels (or, as released, one does not), timesteps are searched, and the budget holds."""

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
from bench.diffusion.intervals import pick
from bench.diffusion.losses import tokenise
from bench.diffusion.pairs import Pair, open_pair
from bench.diffusion.surrogates import denoising_losses, draw, pixel_gradient
from bench.errors import BenchError
from bench.records import Model
from defenses.noise import SignNoise
from defenses.simac import Simac, Target, Variant, distances, late_features, late_layers, objective, raise_loss
from tests.defenses.drawn import subject

FEW: dict[str, Any] = {"outer_steps": 2, "surrogate_steps": 1, "pgd_steps": 2, "class_images": 2, "class_steps": 1,
                       "search_tries": 2, "search_radius": 300, "search_keep": 500}


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def opened(method: Simac, model: Model, ctx: Context) -> Pair:
    return open_pair(model, method.teaching(), ctx, half=method.variant is Variant.released)


def aimed(pair: Pair, x: Tensor) -> tuple[Target, Tensor]:
    """A target whose clean photos are ``x`` at all timesteps, and the states of its prompt."""
    ids = tokenise(pair.studio.components.tokenizer, ["a photo of sks person"])
    with torch.no_grad():
        states = pair.copy.states(ids)
    return Target(x, pair.studio.encode(x), ids, torch.ones(len(x), 1000, dtype=torch.bool)), states


def nudged(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return (x + 0.1 * noise).clamp(-1, 1)


def feature_gradient(method: Simac, pair: Pair, x: Tensor, at: Tensor) -> Tensor:
    """What the second term adds to the gradient at ``at``, the clean photos being ``x``."""
    target, states = aimed(pair, x)
    draws = draw(pair.studio.vae, pair.copy.scheduler, x, torch.Generator().manual_seed(1))
    whole = pixel_gradient(at, objective(method, pair, target, states, draws), 4)
    plain = denoising_losses(pair.studio.vae, pair.copy.unet, pair.copy.scheduler, states, draws)
    return whole - pixel_gradient(at, plain, 4)


@pytest.mark.parametrize(("eps", "size"), [(0, 16), (1, 32), (8, 16), (255, 16)])
def test_the_saved_files_are_within_the_budget(
    eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = Simac(eps=eps, alpha_255=max(eps, 1), **{**FEW, "outer_steps": 1})
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


@pytest.mark.parametrize("variant", list(Variant))
def test_the_noise_prediction_loss_moves_pixels(variant: Variant, model: Model, ctx: Context) -> None:
    """One step follows its sign at the clean photos, where features do not differ yet."""
    method = Simac(pgd_steps=1, alpha_255=2, eps=16, variant=variant)
    pair, x = opened(method, model, ctx), to_float(subject("ada").published.pixels)
    target, states = aimed(pair, x)
    generator = torch.Generator().manual_seed(1)
    draws = draw(pair.studio.vae, pair.copy.scheduler, x, generator)
    draws = replace(draws, timesteps=pick(target.kept, generator))
    plain = denoising_losses(pair.studio.vae, pair.copy.unet, pair.copy.scheduler, states, draws)
    gradient = pixel_gradient(x, plain, 4)
    assert torch.all(gradient.abs().amax((1, 2, 3)) > 0)
    moved = raise_loss(method, pair, x, target, torch.Generator().manual_seed(1))
    inside = (x.abs() < 0.95) & (gradient.abs() > 1e-6)
    assert torch.allclose((moved - x)[inside], (gradient.sign() * 4 / 255)[inside], atol=1e-6)


def test_the_described_feature_term_moves_pixels_away_from_the_clean_photo(model: Model, ctx: Context) -> None:
    """Its gradient vanishes at the clean photo, not elsewhere, and a step along it raises the distance of features."""
    method = Simac()
    pair, x = opened(method, model, ctx), to_float(subject("ada").published.pixels)
    near = nudged(x)
    assert feature_gradient(method, pair, x, x).abs().max() < 1e-7
    added = feature_gradient(method, pair, x, near)
    assert torch.all(added.abs().amax((1, 2, 3)) > 1e-7)

    def distance(at: Tensor) -> Tensor:
        _, states = aimed(pair, x)
        draws = draw(pair.studio.vae, pair.copy.scheduler, x, torch.Generator().manual_seed(1))
        both = []
        for pixels in (at, x):
            with late_features(pair.copy.unet, method.late) as found, torch.no_grad():
                denoising_losses(pair.studio.vae, pair.copy.unet, pair.copy.scheduler, states, draws)(
                    pixels, slice(0, len(x)))
            both.append(found)
        return distances(*both)

    assert torch.all(distance(near + 0.01 * added.sign()) > distance(near))
    assert torch.all(distance(x) < 1e-9)


def test_the_released_feature_term_moves_no_pixel(model: Model, ctx: Context) -> None:
    method = Simac(variant=Variant.released)
    pair, x = opened(method, model, ctx), to_float(subject("ada").published.pixels)
    assert feature_gradient(method, pair, x, nudged(x)).abs().max() == 0


@pytest.mark.parametrize("change", [
    {"feature_weight": 0}, {"search_rounds": 0}, {"surrogate_steps": 0}, {"prior_weight": 0},
])
def test_each_part_changes_the_result(change: dict[str, Any], model: Model, ctx: Context) -> None:
    """Feature term, search, surrogate's instance term (through its training) and prior term."""
    whole = Simac(lr=1e-2, eps=16, alpha_255=2, feature_weight=50, **FEW)
    found, other = (m.protect([subject("ada")], model, ctx)[0].pixels for m in (whole, replace(whole, **change)))
    assert not torch.equal(found, other)


def test_late_layers_are_the_published_ones_on_stable_diffusions_decoder() -> None:
    from types import SimpleNamespace

    def decoder(blocks: int, resnets: int) -> Any:
        names = iter(range(blocks * resnets))
        return SimpleNamespace(up_blocks=[
            SimpleNamespace(resnets=[next(names) for _ in range(resnets)]) for _ in range(blocks)])

    assert late_layers(decoder(4, 3), 0.25) == [9, 10, 11]
    assert late_layers(decoder(3, 2), 0.25) == [4, 5]
    assert late_layers(decoder(2, 2), 0.01) == [3]
    assert late_layers(decoder(2, 2), 1.0) == [0, 1, 2, 3]


def test_features_are_taken_only_within_the_context(model: Model, ctx: Context) -> None:
    pair = opened(Simac(), model, ctx)
    unet, latents = pair.copy.unet, torch.zeros(2, 4, 8, 8)
    states = torch.zeros(2, 3, unet.config.cross_attention_dim)
    with late_features(unet, 0.5) as found, torch.no_grad():
        unet(latents, 10, states)
    assert [f.shape[0] for f in found] == [2] * len(late_layers(unet, 0.5))
    with torch.no_grad():
        unet(latents, 10, states)
    assert len(found) == len(late_layers(unet, 0.5))


def moved_share(method: Simac, model: Model, ctx: Context) -> list[float]:
    """Share of the weights that change in one block of surrogate steps: of the copy, and of theta."""
    pair = opened(method, model, ctx)
    lesson = pair.studio.clean_lesson(subject("ada"), torch.Generator().manual_seed(0))
    shares = []
    for surrogate in (pair.copy, pair.theta):
        surrogate.learn(lesson, method.surrogate_steps)
        pairs = [(a, b) for a, b in zip(surrogate.parameters, pair.start) if b.abs().max() > 0]
        shares.append(sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs))
    return shares


def test_described_surrogates_learn_at_the_published_rate_and_released_ones_hardly(model: Model, ctx: Context) -> None:
    """bfloat16 rounds steps of 5e-7 away unless a weight is already tiny."""
    assert all(share > 0.5 for share in moved_share(Simac(**FEW), model, ctx))
    assert all(share < 0.05 for share in moved_share(Simac(variant=Variant.released, **FEW), model, ctx))


def test_clipping_limits_the_described_surrogate_only() -> None:
    assert Simac().teaching().clip == 1.0
    assert Simac(variant=Variant.released).teaching().clip is None


def test_the_objective_rises_more_than_under_noise(model: Model, ctx: Context) -> None:
    """White box, frozen surrogate: SimAC's own loss is higher on its photos than on noisy ones."""
    ada = subject("ada")
    method = Simac(**{**FEW, "outer_steps": 12, "surrogate_steps": 0}, eps=32, alpha_255=4, prior_weight=0,
                   search_rounds=0)
    pair, x = opened(method, model, ctx), to_float(ada.published.pixels)
    target, states = aimed(pair, x)

    def loss(pixels: Tensor) -> float:
        generator, total, at = torch.Generator().manual_seed(0), 0.0, to_float(pixels)
        with torch.no_grad():
            for _ in range(10):
                draws = draw(pair.studio.vae, pair.copy.scheduler, x, generator)
                total += objective(method, pair, target, states, draws)(at, slice(0, len(x))).sum().item()
        return total

    protected = loss(method.protect([ada], model, ctx)[0].pixels)
    assert protected > loss(ada.published.pixels)
    assert protected > loss(SignNoise(32).protect([ada], model, ctx)[0].pixels)


def test_neither_order_company_nor_batch_matters(model: Model, ctx: Context) -> None:
    method, people = Simac(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both = method.protect(people, model, ctx)
    swapped = method.protect(people[::-1], model, ctx)
    alone = replace(method, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    assert (alone[0].pixels != both[1].pixels).float().mean() < 0.01


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = Simac(lr=1e-3, **FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("outer_steps", -1), ("batch", 0), ("late", 0),
    ("late", 1.1), ("feature_weight", -1), ("search_tries", 0), ("search_keep", 0), ("variant", "fixed"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"{field}|variant"):
        Simac(**{field: value})


def test_published_defaults() -> None:
    """16 / 255 and 0.005 on the [-1, 1] scale; 50 x (3 + 6 + 3) steps at 5e-7; a search of 5 tries, 20 and 100."""
    method = Simac()
    assert (method.eps, method.alpha_255) == pytest.approx((16 / 255 * 127.5, 0.005 * 127.5))
    assert (method.outer_steps, method.surrogate_steps, method.pgd_steps, method.lr) == (50, 3, 6, 5e-7)
    search = method.search()
    assert (search.rounds, search.tries, search.radius, search.keep) == (50, 5, 20, 100)
