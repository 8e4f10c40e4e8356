"""PhotoGuard's diffusion attack: the whole edit comes nearer to its target, in either ball."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.editors import ask, decoded, edited_latents, open_editor
from bench.diffusion.images import levels, to_float
from bench.diffusion.surrogate_free import crowd_of
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.noise import SignNoise
from defenses.photoguard_diffusion import Norm, PhotoGuardDiffusion, approach, losses_of, moved, picture
from tests.defenses.drawn import subject

SHORT = PhotoGuardDiffusion(eps=32, alpha_255=4, steps=12, repeats=1, sampler_steps=2, pgd_batch=4)


@pytest.fixture(params=["text", "instruct"])
def model(request: Any, tiny_sd: Path, tiny_ip2p: Path) -> Model:
    return resolve(str({"text": tiny_sd, "instruct": tiny_ip2p}[request.param]))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def distance(method: PhotoGuardDiffusion, model: Model, photos: ImageSet, ctx: Context) -> Tensor:
    """|| f(x) - x_target || of each photo, over held-out noise, written out."""
    editor, crowd = open_editor(model, ctx), crowd_of([subject("ada")], Context("held out", ctx.folder))
    request, x, total = ask(editor, crowd, ""), to_float(photos.pixels), torch.zeros(len(photos))
    with torch.no_grad():
        for _ in range(6):
            draws = crowd.draw(editor.vae, editor.scheduler)
            latents = edited_latents(editor, x, request, draws, slice(0, 3), method.course())
            total += (decoded(editor.vae, latents) - picture(method, x)).square().sum((1, 2, 3)).sqrt()
    return total


@pytest.mark.parametrize("target", ["zero", "pattern"])
def test_edits_come_nearer_to_the_target_and_noise_does_not_do_that(target: str, model: Model, ctx: Context) -> None:
    ada, method = subject("ada"), replace(SHORT, target=target)
    found, noisy, clean = (distance(method, model, photos, ctx).sum() for photos in (
        method.protect([ada], model, ctx)[0], SignNoise(32).protect([ada], model, ctx)[0], ada.published))
    assert found < clean and found < noisy


def test_the_first_step_goes_down_the_mean_gradient_of_its_repetitions(model: Model, ctx: Context) -> None:
    editor, method = open_editor(model, ctx), replace(SHORT, steps=1, repeats=3, alpha_255=2)
    found = approach(method, crowd_of([subject("ada")], ctx), editor, ctx)
    crowd = crowd_of([subject("ada")], ctx)
    request, total = ask(editor, crowd, ""), torch.zeros_like(crowd.x)
    for _ in range(3):
        x = crowd.x.clone().requires_grad_(True)
        draws = crowd.draw(editor.vae, editor.scheduler)
        losses_of(method, editor, request, draws, picture(method, x))(x, slice(0, 3)).sum().backward()
        assert x.grad is not None
        total += x.grad
    clear = (crowd.x.abs() < 0.95) & (total.abs() > total.abs().max() * 1e-3)
    assert clear.any()
    assert torch.allclose((found - crowd.x)[clear], (-total.sign() * levels(2))[clear], atol=1e-6)


def test_steps_in_the_l2_ball_have_the_published_length_and_stay_in_both_budgets() -> None:
    generator = torch.Generator().manual_seed(0)
    method = PhotoGuardDiffusion(norm=Norm.l2, eps=255)
    origin, gradient = torch.zeros(2, 3, 512, 512), torch.randn(2, 3, 512, 512, generator=generator)
    one = moved(method, origin, origin, gradient)
    assert one.flatten(1).norm(dim=1).tolist() == pytest.approx([1, 1], rel=1e-4)
    assert (one * gradient <= 0).all()
    x = origin
    for _ in range(20):
        x = moved(method, x, origin, gradient)
    assert x.flatten(1).norm(dim=1).tolist() == pytest.approx([16, 16], rel=1e-4)
    tight = moved(replace(method, eps=1.0), x, origin, gradient)
    assert tight.abs().max() <= levels(1.0) + 1e-7
    small = moved(method, origin[:, :, :64, :64], origin[:, :, :64, :64], gradient[:, :, :64, :64])
    assert small.flatten(1).norm(dim=1).tolist() == pytest.approx([1 / 8] * 2, rel=1e-4)


def test_norms_prompt_and_target_matter(model: Model, ctx: Context) -> None:
    methods = [SHORT, replace(SHORT, norm=Norm.l2), replace(SHORT, prompt="a photo of a cat"),
               replace(SHORT, target="pattern"), replace(SHORT, sampler_steps=3)]
    found = [replace(m, steps=4).protect([subject("ada")], model, ctx)[0].pixels for m in methods]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


@pytest.mark.parametrize(("field", "value"), [
    ("eps", 256), ("alpha_255", 0), ("steps", -1), ("repeats", 0), ("norm", "l1"), ("l2", 0), ("l2_step", 0),
    ("sampler_steps", 0), ("guidance", -1), ("image_guidance", -1), ("strength", 0), ("strength", 1.1),
    ("target", "black"), ("pgd_batch", 0),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        PhotoGuardDiffusion(**{field: value})


def test_released_defaults() -> None:
    """0.1 and 0.006 on the [-1, 1] scale; l2 16 in steps of 1; 200 steps of 10 gradients through 4 sampler steps."""
    method = PhotoGuardDiffusion()
    assert (method.eps, method.alpha_255) == pytest.approx((0.1 * 127.5, 0.006 * 127.5))
    assert (method.l2, method.l2_step, method.steps, method.repeats) == (16, 1, 200, 10)
    assert (method.sampler_steps, method.guidance, method.strength, method.prompt) == (4, 7.5, 0.7, "")
