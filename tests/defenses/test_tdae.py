"""TDAE: each part equals its formula, each loss goes the way it should, and the point where nothing moves is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.editors import ask, distances, open_editor, value_and_gradient
from bench.diffusion.images import to_float
from bench.diffusion.losses import latent_distribution
from bench.diffusion.surrogate_free import crowd_of
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model, Subject
from defenses.noise import SignNoise
from defenses.tdae import (
    Base,
    Mend,
    Scene,
    Tdae,
    at,
    climb,
    encoded_target,
    flat_direction,
    loss_of,
    refined,
    unit,
)
from tests.defenses.drawn import subject
from tests.defenses.edits import told

SHORT = Tdae(eps=32, alpha_255=4, steps=6, prompt_every=3, prompt_steps=2)
ADA = told(subject("ada"))


@pytest.fixture(params=["text", "instruct", "inpaint"])
def model(request: Any, tiny_sd: Path, tiny_ip2p: Path, tiny_inpaint: Path) -> Model:
    return resolve(str({"text": tiny_sd, "instruct": tiny_ip2p, "inpaint": tiny_inpaint}[request.param]))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def of_base(base: Base, method: Tdae = SHORT) -> Tdae:
    return replace(method, base=base, prompt=method.prompt and base is not Base.encoder)


def scene_of(method: Tdae, model: Model, ctx: Context, double: bool = False) -> Scene:
    editor, crowd = open_editor(model, ctx), crowd_of([ADA], ctx)
    if double:
        parts = {name: copy.deepcopy(getattr(editor, name)).double() for name in ("vae", "unet", "text_encoder")}
        editor, crowd = replace(editor, **parts), replace(crowd, x=crowd.x.double())
    return Scene(editor, ask(editor, crowd), crowd, encoded_target(method, editor.vae, 16).to(crowd.x))


# -- FlatGrad ----------------------------------------------------------------------------------------------------------


def quadratic(hessian: Tensor, slope: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """L(x) = x H x / 2 + b x of each of two photos [3, 2, 2], H and b their own."""
    def losses(x: Tensor, part: slice) -> Tensor:
        flat = x.flatten(1)
        return (torch.einsum("ni,nij,nj->n", flat, hessian[part], flat) / 2 + (flat * slope[part]).sum(1))

    return losses


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_flat_direction_is_its_formula_on_a_quadratic(sign: float) -> None:
    """-g_FDM = g - k sign(z) h H s with s = g / |g| and z = h s.g + h^2 s.H.s / 2, both signs of z."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    hessian, slope = sign * root @ root.transpose(1, 2), torch.randn(2, 12, generator=generator, dtype=torch.float64)
    x, h, k = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64), 30.0, 0.3
    found = flat_direction(x, quadratic(hessian, slope), h, k, batch=1)
    gradient = torch.einsum("nij,nj->ni", hessian, x.flatten(1)) + slope
    s = gradient / gradient.norm(dim=1, keepdim=True)
    curved = torch.einsum("nij,nj->ni", hessian, s)
    z = h * (s * gradient).sum(1) + h * h * (s * curved).sum(1) / 2
    assert (z * sign > 0).all()
    wanted = gradient - k * z.sign()[:, None] * h * curved
    assert torch.allclose(found.flatten(1), wanted, rtol=1e-9)


def test_the_flat_direction_is_the_gradient_of_its_objective(tiny_ip2p: Path, ctx: Context) -> None:
    """Of J = -L + k |L(x + h s) - L(x)| at fixed s, differentiated by autograd, on the surrogate's own loss."""
    scene = scene_of(SHORT, resolve(str(tiny_ip2p)), ctx, double=True)
    losses, h, k = at(loss_of(SHORT, scene), scene.request.states), 0.05, 0.3
    x = scene.crowd.x.clone().requires_grad_(True)
    s = unit(value_and_gradient(x, losses, 4)[1])
    everything = slice(0, len(x))
    here = losses(x, everything)
    objective = -here + k * (losses(x + h * s, everything) - here).abs()
    gradient = torch.autograd.grad(objective.sum(), x)[0]
    assert torch.allclose(flat_direction(scene.crowd.x, losses, h, k, 4), -gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("base", list(Base))
def test_the_finite_difference_is_the_directional_derivative(base: Base, model: Model, ctx: Context) -> None:
    """[L(x + h s) - L(x)] / h against autograd's grad L . s, which for this s is |grad L|, to 1e-3."""
    method = of_base(base)
    scene = scene_of(method, model, ctx, double=True)
    losses = at(loss_of(method, scene), scene.request.states)
    x, h = (scene.crowd.x * 0.9 + 0.01).contiguous(), 1e-5
    here, gradient = value_and_gradient(x, losses, 4)
    ahead, _ = value_and_gradient(x + h * unit(gradient), losses, 4)
    assert torch.allclose((ahead - here) / h, gradient.flatten(1).norm(dim=1), rtol=1e-3)


def test_no_gradient_has_no_direction() -> None:
    assert unit(torch.zeros(1, 3, 2, 2)).abs().max() == 0
    assert unit(torch.ones(2, 3, 2, 2)).flatten(1).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_the_radius_shrinks_with_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    """h = 1 at 512 pixels; the ball's l2 size, eps sqrt(3 H W), shrinks in the same proportion."""
    seen = []

    def note(x: Tensor, losses: Any, radius: float, ratio: float, batch: int) -> Tensor:
        seen.append((radius, ratio))
        return x

    monkeypatch.setattr("defenses.tdae.flat_direction", note)
    for side in (512, 64):
        climb(Tdae(), torch.zeros(1, 3, side, side), lambda x, part: x.sum())
    assert seen == [(1.0, 0.3), (0.125, 0.3)]


# -- Prompt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Base.noise_prediction, Base.target, Base.cross_attention])
def test_a_refined_prompt_stays_in_its_ball_and_lowers_the_loss(base: Base, model: Model, ctx: Context) -> None:
    """On the draws that it was refined on, with photos that were perturbed; the start token does not move."""
    method = replace(of_base(base), prompt_steps=5, eps_prompt=0.2)
    scene = scene_of(method, model, ctx)
    change = torch.randn(scene.crowd.x.shape, generator=torch.Generator().manual_seed(0)) / 10
    x = (scene.crowd.x + change).clamp(-1, 1)
    states = scene.request.states
    loss = loss_of(method, scene)
    found = refined(method, x, states, lambda: loss)
    spread = states[:, 1:].flatten(1).std(dim=1)
    change = (found - states).abs()
    assert (change.flatten(1).amax(1) <= 0.2 * spread * (1 + 1e-5)).all()
    assert (change.flatten(1).amax(1) > 0.19 * spread).all()
    assert change[:, 0].max() == 0
    everything = slice(0, len(x))
    with torch.no_grad():
        assert (loss(x, found, everything) < loss(x, states, everything)).all()


def test_prompts_are_refined_every_so_many_steps_from_nothing(
    tiny_ip2p: Path, ctx: Context, monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts = []

    def note(method: Tdae, x: Tensor, states: Tensor, draw_loss: Any) -> Tensor:
        starts.append(states.clone())
        return states + 0.01

    monkeypatch.setattr("defenses.tdae.refined", note)
    replace(SHORT, steps=7, prompt_every=3).protect([ADA], resolve(str(tiny_ip2p)), ctx)
    assert len(starts) == 2 and torch.equal(*starts)


# -- The zero-gradient trap --------------------------------------------------------------------------------------------


def test_with_the_same_noise_on_both_sides_nothing_ever_moves(model: Model, ctx: Context) -> None:
    """The trap of algorithm 1 at delta = 0, with every part of the method switched on."""
    stuck = replace(SHORT, mend=Mend.none, steps=8).protect([ADA], model, ctx)[0]
    assert torch.equal(stuck.pixels, ADA.published.pixels)


@pytest.mark.parametrize("mend", [Mend.resample, Mend.start])
def test_another_draw_or_another_start_leaves_the_trap(mend: Mend, model: Model, ctx: Context) -> None:
    for switches in ({"flat": False, "prompt": False}, {"prompt": False}, {"prompt_every": 1}):
        moved = replace(SHORT, steps=1, mend=mend, **switches).protect([ADA], model, ctx)[0]
        share = (moved.pixels != ADA.published.pixels).flatten(1).float().mean(1)
        assert (share > 0.8).all()


# -- Losses and switches -----------------------------------------------------------------------------------------------


def edit_shift(model: Model, photos: ImageSet, ctx: Context) -> Tensor:
    """|| f(x', c) - f(x, c) ||^2 of each photo at the same noise, over fixed draws, written out."""
    editor, crowd = open_editor(model, ctx), crowd_of([ADA], Context("held out", ctx.folder))
    request, x, total = ask(editor, crowd), to_float(photos.pixels), torch.zeros(len(photos))
    with torch.no_grad():
        for _ in range(8):
            draws = crowd.draw(editor.vae, editor.scheduler)
            one, other = (editor.look(each, request, request.states, draws, slice(0, 3)).clean
                          for each in (x, crowd.x))
            total += distances(one, other) * editor.scheduler.alphas_cumprod[draws.timesteps]
    return total


def own_loss(base: Base, model: Model, photos: ImageSet, ctx: Context) -> Tensor:
    """What the base lowers, distance to the target or attention to words: its share that is left of the original
    photo's at the same draws, over held-out draws."""
    method = of_base(base)
    scene = scene_of(method, model, Context("held out", ctx.folder))
    x, total, everything = to_float(photos.pixels), torch.zeros(len(photos)), slice(0, len(photos))
    with torch.no_grad():
        for _ in range(16):
            loss = loss_of(method, scene)
            total += (loss(x, scene.request.states, everything)
                      / loss(scene.crowd.x, scene.request.states, everything))
    return total / 16


@pytest.mark.parametrize(("flat", "mend"), [(False, Mend.resample), (True, Mend.resample), (True, Mend.start)])
def test_the_edit_shifts_more_than_under_noise(flat: bool, mend: Mend, model: Model, ctx: Context) -> None:
    method = replace(SHORT, steps=24, prompt=False, flat=flat, mend=mend)
    shift = edit_shift(model, method.protect([ADA], model, ctx)[0], ctx)
    noise = edit_shift(model, SignNoise(32).protect([ADA], model, ctx)[0], ctx)
    assert shift.sum() > 1.2 * noise.sum()


@pytest.mark.parametrize("base", [Base.target, Base.encoder, Base.cross_attention])
def test_each_other_base_lowers_what_it_should_and_noise_does_not(base: Base, model: Model, ctx: Context) -> None:
    method = replace(of_base(base), steps=24, prompt=False)
    found, noisy = (own_loss(base, model, photos, ctx) for photos in (
        method.protect([ADA], model, ctx)[0], SignNoise(32).protect([ADA], model, ctx)[0]))
    assert found.mean() < noisy.mean() and found.mean() < 1


def test_without_extras_a_step_goes_up_the_gradient_of_the_loss(model: Model, ctx: Context) -> None:
    for base in Base:
        method = replace(of_base(base), flat=False, prompt=False, steps=1, alpha_255=2)
        scene = scene_of(method, model, ctx)
        losses = at(loss_of(method, scene), scene.request.states)
        gradient = value_and_gradient(scene.crowd.x, losses, 4)[1]
        moved = method.protect([ADA], model, ctx)[0].pixels.int() - ADA.published.pixels.int()
        clear = (gradient.abs() > gradient.abs().max() * 1e-3) & (scene.crowd.x.abs() < 0.9)
        assert clear.float().mean() > 0.1
        assert torch.equal(moved[clear].sign().float(), gradient[clear].sign())


def test_the_encoders_loss_is_photoguards(model: Model, ctx: Context) -> None:
    method = of_base(Base.encoder)
    scene = scene_of(method, model, ctx)
    grey = latent_distribution(scene.editor.vae, torch.full((1, 3, 16, 16), 128 / 127.5 - 1)).mean
    with torch.no_grad():
        wanted = -(latent_distribution(scene.editor.vae, scene.crowd.x).mean - grey).square().mean((1, 2, 3))
        found = loss_of(method, scene)(scene.crowd.x, scene.request.states, slice(0, 3))
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_switches_matter_and_zeros_switch_off(model: Model, ctx: Context) -> None:
    methods = [replace(SHORT, flat=False, prompt=False), replace(SHORT, prompt=False), SHORT,
               replace(SHORT, flat=False)]
    bare, flat, both, prompt = (m.protect([ADA], model, ctx)[0].pixels for m in methods)
    found = [bare, flat, both, prompt]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])
    off = replace(SHORT, flat_ratio=0.0, prompt_steps=0).protect([ADA], model, ctx)[0].pixels
    assert torch.equal(off, bare)


def test_being_told_matters_except_to_the_encoder(model: Model, ctx: Context) -> None:
    def pixels(base: Base, person: Subject) -> Tensor:
        return of_base(base).protect([person], model, ctx)[0].pixels

    for base in (Base.noise_prediction, Base.cross_attention):
        assert not torch.equal(pixels(base, ADA), pixels(base, subject("ada")))
    assert torch.equal(pixels(Base.encoder, ADA), pixels(Base.encoder, subject("ada")))


# -- Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("alpha_255", 0), ("steps", -1), ("flat_ratio", -0.1), ("flat_radius", 0), ("prompt_every", 0),
    ("prompt_steps", -1), ("eps_prompt", 0), ("pgd_batch", 0), ("target", "black"), ("base", "decoder"),
    ("mend", "wait"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        Tdae(**{field: value})


def test_no_prompt_can_be_refined_in_the_encoders_loss() -> None:
    with pytest.raises(BenchError, match="prompt=false"):
        Tdae(base=Base.encoder)
    facts = facts_of(Tdae(base=Base.encoder, prompt=False))
    assert (facts.needs, facts.knows) == (("latents",), ())
    assert (facts_of(Tdae()).needs, facts_of(Tdae()).knows) == (("text_encoder",), ("prompt",))


def test_defaults() -> None:
    """0.03 on [0, 1] and 100 steps of the sibling papers; lambda / h as published."""
    method = Tdae()
    assert (method.eps, method.steps, method.flat_ratio) == (pytest.approx(0.03 * 255), 100, 0.3)
    assert (method.base, method.flat, method.prompt) == (Base.noise_prediction, True, True)
