"""The semantic attack: attention leaves the word that names what is in the photo, at all timesteps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.editors import open_editor
from bench.diffusion.images import to_float
from bench.diffusion.surrogate_free import crowd_of
from bench.diffusion.surrogates import pixel_gradient
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.noise import SignNoise
from defenses.semantic_attack import SemanticAttack, attentions, described, distract, stratified
from tests.defenses.drawn import subject

SHORT = SemanticAttack(eps=32, alpha_255=4, steps=16, timesteps=2)


@pytest.fixture(params=["text", "instruct"])
def model(request: Any, tiny_sd: Path, tiny_ip2p: Path) -> Model:
    return resolve(str({"text": tiny_sd, "instruct": tiny_ip2p}[request.param]))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def attention(model: Model, photos: ImageSet, ctx: Context) -> Tensor:
    """What is left in the places that attended in the original, over held-out draws."""
    editor, crowd = open_editor(model, ctx), crowd_of([subject("ada")], Context("held out", ctx.folder))
    request, total = described(SHORT, crowd, editor), torch.zeros(len(photos))
    with torch.no_grad():
        for _ in range(16):
            draws = crowd.draw(editor.vae, editor.scheduler)
            total += attentions(SHORT, editor, request, crowd.x, draws)(to_float(photos.pixels), slice(0, 3))
    return total


def test_attention_falls_and_noise_does_not_do_that(model: Model, ctx: Context) -> None:
    found, noisy, clean = (attention(model, photos, ctx).sum() for photos in (
        SHORT.protect([subject("ada")], model, ctx)[0], SignNoise(32).protect([subject("ada")], model, ctx)[0],
        subject("ada").published))
    assert found < noisy and found < clean


def test_a_step_goes_down_the_sum_of_gradients_over_timesteps(model: Model, ctx: Context) -> None:
    editor, method = open_editor(model, ctx), replace(SHORT, steps=1, timesteps=3)
    found = distract(method, crowd_of([subject("ada")], ctx), editor, ctx)
    crowd = crowd_of([subject("ada")], ctx)
    request, total = described(method, crowd, editor), torch.zeros_like(crowd.x)
    for place in range(3):
        draws = stratified(crowd.draw(editor.vae, editor.scheduler), place, 3, editor)
        total += pixel_gradient(crowd.x, attentions(method, editor, request, crowd.x, draws), 4)
    clear = (crowd.x.abs() < 0.9) & (total.abs() > total.abs().max() * 1e-3)
    assert clear.any()
    assert torch.equal((found - crowd.x)[clear].sign(), -total[clear].sign())


def test_every_part_of_the_chain_is_visited(model: Model, ctx: Context) -> None:
    editor, crowd = open_editor(model, ctx), crowd_of([subject("ada")], ctx)
    for _ in range(20):
        draws = crowd.draw(editor.vae, editor.scheduler)
        for place in range(10):
            moved = stratified(draws, place, 10, editor).timesteps
            assert ((moved >= 100 * place) & (moved < 100 * (place + 1))).all()


def test_only_the_class_noun_counts_and_each_subject_has_its_own(model: Model, ctx: Context) -> None:
    """One token per letter: "a photo of a" has nine, "person" six and "dog" three."""
    editor = open_editor(model, ctx)
    dog = replace(subject("bob", photos=1), class_noun="dog")
    request = described(SHORT, crowd_of([subject("ada", photos=1), dog], ctx), editor)
    assert request.words[0].nonzero()[:, 0].tolist() == [10, 11, 12, 13, 14, 15]
    assert request.words[1].nonzero()[:, 0].tolist() == [10, 11, 12]
    assert torch.allclose(request.states[1], editor.states(["a photo of a dog"])[0], atol=1e-6)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("alpha_255", 0), ("steps", -1), ("timesteps", 0), ("pgd_batch", 0), ("prompt", "a photo"),
    ("prompt", "a {noun} in a photo"), ("prompt", "a {colour} {noun}"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        SemanticAttack(**{field: value})


def test_published_defaults() -> None:
    """kappa = 0.06 on the [-1, 1] scale, N = 100, T = 10."""
    method = SemanticAttack()
    assert (method.eps, method.steps, method.timesteps) == (pytest.approx(0.06 * 127.5), 100, 10)
