"""What every protection against edits keeps, on every kind of editor: the budget on the file, frozen weights, and
results that company cannot change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_modules
from bench.plugin import facts_of
from bench.records import Model
from defenses.advdm import AdvDm
from defenses.diffusionguard import DiffusionGuard
from defenses.editshield import EditShield
from defenses.facelock import FaceLock
from defenses.mist import Mist
from defenses.photoguard import PhotoGuard
from defenses.photoguard_diffusion import PhotoGuardDiffusion
from defenses.sds import Sds
from defenses.semantic_attack import SemanticAttack
from defenses.tdae import Tdae
from tests.defenses.drawn import subject
from tests.defenses.edits import told

FACES: dict[str, Any] = {"encoders": ["micro-face-1"], "alignment": "whole", "face_size": 64,
                         "perceptual": "autoencoder"}
METHODS = [
    Tdae(steps=2, prompt_every=2, prompt_steps=1),
    Tdae(steps=2, base="target", prompt_every=2, prompt_steps=1),  # type: ignore[arg-type]
    Tdae(steps=2, base="cross_attention", flat=False, prompt=False),  # type: ignore[arg-type]
    Tdae(steps=2, base="encoder", prompt=False),  # type: ignore[arg-type]
    PhotoGuardDiffusion(steps=2, repeats=2, sampler_steps=2),
    EditShield(steps=2), EditShield(steps=2, variant="released", lr=0.01),  # type: ignore[arg-type]
    DiffusionGuard(steps=4), SemanticAttack(steps=2, timesteps=2), FaceLock(steps=3, **FACES),
    AdvDm(steps=2), Mist(steps=2), Sds(steps=2, random_start=True), PhotoGuard(steps=2),
]
KINDS = ("text", "instruct", "inpaint")


def label(method: Any) -> str:
    return "-".join([type(method).__name__, str(getattr(getattr(method, "base", ""), "value", "")),
                     str(getattr(getattr(method, "variant", ""), "value", ""))]).strip("-")


each_method = pytest.mark.parametrize("method", METHODS, ids=label)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def models(tiny_sd: Path, tiny_ip2p: Path, tiny_inpaint: Path) -> dict[str, Model]:
    return {kind: resolve(str(folder)) for kind, folder in zip(KINDS, (tiny_sd, tiny_ip2p, tiny_inpaint))}


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@each_kind
@each_method
def test_files_move_within_the_budget_and_weights_do_not_move(
    method: Any, kind: str, models: dict[str, Model], ctx: Context,
) -> None:
    model, ada = models[kind], told(subject("ada"), masked=True)
    modules = {name: module for name, module in load_modules(model).items() if isinstance(module, torch.nn.Module)}
    before = {name: [p.clone() for p in module.parameters()] for name, module in modules.items()}
    for eps in (0, 6.375):
        found = replace(method, eps=eps, alpha_255=max(eps, 1)).protect([ada], model, ctx)[0]
        assert found.names == ada.published.names
        change = (found.pixels.int() - ada.published.pixels.int()).abs()
        assert change.max() <= eps
        assert eps < 1 or (change.flatten(1).amax(1) > 0).all()
    for name, module in modules.items():
        assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before[name], module.parameters()))


@pytest.mark.parametrize(("method", "kind"), list(zip(METHODS, itertools.cycle(KINDS))),
                         ids=[label(method) for method in METHODS])
def test_neither_order_company_nor_batch_matters(
    method: Any, kind: str, models: dict[str, Model], ctx: Context,
) -> None:
    """Beyond rounding, which may turn the sign of a gradient that is almost zero; told and untold people in company."""
    wide = replace(method, eps=16, pgd_batch=8)
    people = [told(subject("ada"), masked=True), subject("bobby", photos=2), told(subject("cleo", 32))]
    model = models[kind]
    together = [photos.pixels for photos in wide.protect(people, model, ctx)]
    swapped = [photos.pixels for photos in wide.protect(people[::-1], model, ctx)][::-1]
    alone = [replace(wide, pgd_batch=1).protect([person], model, ctx)[0].pixels for person in people]
    for found, other, single in zip(together, swapped, alone):
        assert (found != other).float().mean() < 0.02
        assert (found != single).float().mean() < 0.02


@each_method
def test_the_same_key_gives_the_same_bits_and_another_does_not(
    method: Any, models: dict[str, Model], ctx: Context, tmp_path: Path,
) -> None:
    ada, model = told(subject("ada")), models["instruct"]
    first, again, other = (method.protect([ada], model, place)[0].pixels
                           for place in (ctx, ctx, Context("other", tmp_path)))
    assert torch.equal(first, again)
    drawn = not (isinstance(method, Tdae) and method.base.value == "encoder")
    assert torch.equal(first, other) is not drawn


@each_method
def test_what_is_declared(method: Any) -> None:
    facts = facts_of(method)
    assert facts.acts_on == "images" and "editing" in facts.track and facts.paper
    assert facts.needs in (("text_encoder",), ("latents",))


def test_only_methods_that_are_told_the_edit_say_so() -> None:
    knows = {type(method).__name__: facts_of(type(method)).knows for method in METHODS}
    assert knows == {"Tdae": ("prompt",), "DiffusionGuard": ("mask",), "PhotoGuardDiffusion": (), "EditShield": (),
                     "SemanticAttack": (), "FaceLock": (), "AdvDm": (), "Mist": (), "Sds": (), "PhotoGuard": ()}


@pytest.mark.parametrize("method", [m for m in METHODS if not facts_of(m).knows], ids=label)
def test_those_that_say_they_know_nothing_do_not_look(method: Any, models: dict[str, Model], ctx: Context) -> None:
    """Without a mask, whether the edit is told changes no bit."""
    person = subject("ada")
    one, other = (method.protect([each], models["instruct"], ctx)[0].pixels for each in (person, told(person)))
    assert torch.equal(one, other)
