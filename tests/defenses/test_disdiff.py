"""DisDiff: both terms move pixels, steps follow the timestep, the rare word is found, and the budget holds."""

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
from bench.diffusion.losses import tokenise
from bench.diffusion.pairs import Pair, open_pair
from bench.diffusion.surrogates import Draws, draw, open_studio, pixel_gradient
from bench.errors import BenchError
from bench.records import Model
from defenses.disdiff import (
    DisDiff,
    Target,
    Variant,
    alternate,
    averaged,
    erasure,
    merits,
    objective,
    raise_loss,
    word_places,
)
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

FEW: dict[str, Any] = {"outer_steps": 2, "surrogate_steps": 1, "pgd_steps": 2, "class_images": 2, "class_steps": 1,
                       "search_tries": 2, "search_radius": 300, "search_keep": 500}


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def opened(method: DisDiff, model: Model, ctx: Context) -> Pair:
    return open_pair(model, method.teaching(), ctx, half=method.variant is Variant.released)


def aimed(pair: Pair, x: Tensor, kept: Tensor | None = None) -> tuple[Target, Tensor]:
    """A target at all timesteps unless told, and the states of its prompt."""
    ids = tokenise(pair.studio.components.tokenizer, ["a photo of sks person"])
    with torch.no_grad():
        states = pair.copy.states(ids)
    kept = torch.ones(len(x), 1000, dtype=torch.bool) if kept is None else kept
    return Target(x, ids, *word_places(pair.studio, "sks", "person"), kept), states


def drawn(pair: Pair, x: Tensor, seed: int = 1) -> Draws:
    return draw(pair.studio.vae, pair.copy.scheduler, x, torch.Generator().manual_seed(seed))


def test_erasure_is_zero_when_the_rare_word_has_all_attention_and_one_when_it_has_none() -> None:
    on, off = torch.zeros(1, 4, 7), torch.zeros(1, 4, 7)
    on[:, :, 4], off[:, :, 1] = 1, 1
    both = erasure(torch.cat([on, off]), slice(1, 6), slice(4, 5))
    assert both.tolist() == pytest.approx([0, 1], abs=1e-6)
    uniform = erasure(torch.full((1, 4, 7), 1 / 7), slice(1, 6), slice(4, 5))
    assert uniform.item() == pytest.approx((1 - 1 / 5) ** 2)
    halves = torch.zeros(1, 4, 7)
    halves[:, :, 3:5] = 0.5
    assert erasure(halves, slice(1, 6), slice(3, 5)).item() == pytest.approx(0, abs=1e-6)  # a word of two tokens


def test_erasure_falls_with_the_rare_words_attention() -> None:
    maps = torch.rand(3, 16, 8, generator=torch.Generator().manual_seed(0)) / 100
    maps.requires_grad_(True)
    gradient = torch.autograd.grad(erasure(maps, slice(1, 6), slice(4, 5)).sum(), maps)[0]
    assert torch.all(gradient[:, :, 4].mean(1) < 0)
    assert torch.all(gradient[:, :, [0, 6, 7]] == 0)  # start and padding tokens do not count


def test_maps_a_quarter_as_wide_as_the_latents_are_averaged_or_the_nearest() -> None:
    maps = {name: torch.full((1, side * side, 5), value) for name, side, value in (
        ("a", 64, 1.0), ("b", 16, 2.0), ("c", 16, 4.0), ("d", 8, 8.0))}
    assert averaged(maps, 16).shape == (1, 256, 5)
    assert averaged(maps, 16).unique().tolist() == [3.0]
    assert averaged(maps, 12).unique().tolist() == [8.0]  # equally near: the smaller
    assert averaged(maps, 2).unique().tolist() == [8.0]


def test_the_rare_word_is_found_in_the_prompt(model: Model, ctx: Context) -> None:
    """The tiny tokenizer knows letters only: 1 + 5 + 2 letters before "sks", then 3, then 6 of "person"."""
    studio = open_studio(model, DisDiff().teaching(), ctx)
    words, rare = word_places(studio, "sks", "person")
    assert (words, rare) == (slice(1, 18), slice(9, 12))
    ids = tokenise(studio.components.tokenizer, ["a photo of sks person"])[0]
    assert studio.components.tokenizer.decode(ids[rare]).replace(" ", "") == "sks"
    with pytest.raises(BenchError, match="does not fit"):
        word_places(studio, "a" * 40, "person")


def test_the_merit_of_timesteps() -> None:
    times = torch.tensor([0, 333, 999])
    assert merits(DisDiff(), times, 1000).tolist() == pytest.approx([1, 0.75, 0], abs=1e-6)
    assert merits(DisDiff(merit=False), times, 1000).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("merit", "share"), [(True, 0.75), (False, 1.0)])
def test_one_step_is_as_long_as_its_timestep_merits(merit: bool, share: float, model: Model, ctx: Context) -> None:
    """And follows the sign of the gradient of the whole objective, which is not zero on any photo."""
    method = DisDiff(pgd_steps=1, alpha_255=2, eps=16, merit=merit)
    pair, x = opened(method, model, ctx), to_float(subject("ada").published.pixels)
    kept = torch.zeros(len(x), 1000, dtype=torch.bool)
    kept[:, 333] = True
    target, states = aimed(pair, x, kept)
    draws = replace(drawn(pair, x), timesteps=torch.full((len(x),), 333))
    gradient = pixel_gradient(x, objective(method, pair.studio, pair.copy, target, states, draws), 4)
    assert torch.all(gradient.abs().amax((1, 2, 3)) > 0)
    moved = raise_loss(method, pair.studio, pair.copy, x, target, torch.Generator().manual_seed(1))
    inside = (x.abs() < 0.95) & (gradient.abs() > 1e-7)
    assert torch.allclose((moved - x)[inside], (share * gradient.sign() * 4 / 255)[inside], atol=1e-6)


@pytest.mark.parametrize("variant", list(Variant))
def test_the_erasure_term_moves_pixels(variant: Variant, model: Model, ctx: Context) -> None:
    """Its own gradient is not zero on any photo, and a step along it takes attention from the rare word."""
    method = DisDiff(variant=variant)
    pair, x = opened(method, model, ctx), to_float(subject("ada").published.pixels)
    target, states = aimed(pair, x)
    draws = drawn(pair, x)

    def gradient(weight: float) -> Tensor:
        own = replace(method, attention_weight=weight)
        return pixel_gradient(x, objective(own, pair.studio, pair.copy, target, states, draws), 4)

    plain, heavy, light = gradient(0), gradient(2000), gradient(1000)
    added = heavy - light
    assert torch.all(added.abs().amax((1, 2, 3)) > 0)
    assert torch.all((light - plain).abs().amax((1, 2, 3)) > 0)
    if variant is Variant.described:
        def term(at: Tensor) -> Tensor:
            with torch.no_grad():
                both = [objective(replace(method, attention_weight=w), pair.studio, pair.copy, target, states, draws)(
                    at, slice(0, len(x))).double() for w in (1000, 0)]
            return both[0] - both[1]

        assert term(x + 0.05 * added.sign()).sum() > term(x).sum()


@pytest.mark.parametrize("change", [
    {"attention_weight": 0}, {"merit": False}, {"search_rounds": 0}, {"surrogate_steps": 0}, {"prior_weight": 0},
])
def test_each_part_changes_the_result(change: dict[str, Any], model: Model, ctx: Context) -> None:
    """Erasure, scheduler, search, the surrogate's instance term (through its training) and its prior term."""
    whole = DisDiff(lr=1e-2, eps=16, alpha_255=4, attention_weight=100, **FEW)
    found, other = (m.protect([subject("ada")], model, ctx)[0].pixels for m in (whole, replace(whole, **change)))
    assert not torch.equal(found, other)


@pytest.mark.parametrize(("eps", "size"), [(0, 16), (1, 32), (6.375, 16), (255, 16)])
def test_the_saved_files_are_within_the_budget(
    eps: float, size: int, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = DisDiff(eps=eps, alpha_255=max(2 * eps, 1), **{**FEW, "outer_steps": 1})
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


def moved_share(method: DisDiff, model: Model, ctx: Context) -> list[float]:
    """Share of the weights that a run has changed at its end: of the copy, and of theta."""
    pair = opened(method, model, ctx)
    ada = subject("ada")
    alternate(method, ada, to_float(ada.published.pixels), pair, ctx)
    shares = []
    for surrogate in (pair.copy, pair.theta):
        pairs = [(a, b) for a, b in zip(surrogate.parameters, pair.start) if b.abs().max() > 0]
        shares.append(sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs))
    return shares


def test_surrogates_learn_as_their_variant_says(model: Model, ctx: Context) -> None:
    """``released``: at 5e-7, bfloat16 rounds steps away; at a large rate its one model learns and its copy stays."""
    steps = {**FEW, "surrogate_steps": 3}  # after one step each, two rounds' signs may cancel
    assert all(share > 0.5 for share in moved_share(DisDiff(**steps), model, ctx))
    released = DisDiff(variant=Variant.released, **steps)
    assert all(share < 0.05 for share in moved_share(released, model, ctx))
    copy, theta = moved_share(replace(released, lr=1e-2), model, ctx)
    assert copy == 0
    assert theta > 0.5
    assert (DisDiff().teaching().clip, released.teaching().clip) == (1.0, None)


def test_the_objective_rises_more_than_under_noise(model: Model, ctx: Context) -> None:
    """White box, frozen surrogate: DisDiff's own loss is higher on its photos than on noisy ones."""
    ada = subject("ada")
    method = DisDiff(**{**FEW, "outer_steps": 12, "surrogate_steps": 0}, eps=32, alpha_255=6, prior_weight=0,
                     search_rounds=0)
    pair, x = opened(method, model, ctx), to_float(ada.published.pixels)
    target, states = aimed(pair, x)

    def loss(pixels: Tensor) -> float:
        generator, total, at = torch.Generator().manual_seed(0), 0.0, to_float(pixels)
        with torch.no_grad():
            for _ in range(10):
                draws = draw(pair.studio.vae, pair.copy.scheduler, x, generator)
                total += objective(method, pair.studio, pair.copy, target, states, draws)(
                    at, slice(0, len(x))).sum().item()
        return total

    protected = loss(method.protect([ada], model, ctx)[0].pixels)
    assert protected > loss(ada.published.pixels)
    assert protected > loss(SignNoise(32).protect([ada], model, ctx)[0].pixels)


def test_neither_order_company_nor_batch_matters(model: Model, ctx: Context) -> None:
    method, people = DisDiff(lr=1e-3, eps=16, **FEW), [subject("ada"), subject("bobby")]
    both = method.protect(people, model, ctx)
    swapped = method.protect(people[::-1], model, ctx)
    alone = replace(method, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert torch.equal(both[1].pixels, swapped[0].pixels)
    assert (alone[0].pixels != both[1].pixels).float().mean() < 0.01


def test_the_same_key_gives_the_same_bits_and_another_key_others(model: Model, ctx: Context, tmp_path: Path) -> None:
    method, people = DisDiff(lr=1e-3, **FEW), [subject("ada")]
    first, again = (method.protect(people, model, ctx)[0].pixels for _ in range(2))
    other = method.protect(people, model, Context("other", tmp_path))[0].pixels
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps", 256), ("alpha_255", 0), ("lr", 0), ("outer_steps", -1), ("batch", 0), ("attention_weight", -1),
    ("search_tries", 0), ("search_keep", 0), ("token", " "), ("variant", "fixed"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"{field}|variant"):
        DisDiff(**{field: value})


def test_published_defaults() -> None:
    """0.05 and 0.005 on the [-1, 1] scale; weight 0.1; 50 x (3 + 6 + 3) steps at 5e-7."""
    method = DisDiff()
    assert (method.eps, method.alpha_255) == pytest.approx((0.05 * 127.5, 0.005 * 127.5))
    assert (method.outer_steps, method.surrogate_steps, method.pgd_steps, method.lr) == (50, 3, 6, 5e-7)
    assert (method.attention_weight, method.merit) == (0.1, True)
