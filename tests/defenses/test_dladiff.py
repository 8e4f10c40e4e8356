"""DLADiff: each loss moves pixels, each surrogate learns, both layers stay within their budgets, encoders go blind."""

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
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.diffusion.encoders import face_encoder
from bench.diffusion.images import to_float, to_unit
from bench.diffusion.surrogates import draw, pixel_gradient
from bench.errors import BenchError
from bench.faces import FaceEncoder, FaceEncoderConfig, save_face_encoder
from bench.records import ImageSet, Model, Subject
from defenses.dladiff import (
    DlaDiff,
    attention_losses,
    attention_maps,
    map_distance,
    noise_losses,
    open_workshop,
    protect_from_encoders,
    teach_static,
)
from defenses.noise import SignNoise


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


@pytest.fixture
def few(tmp_path: Path) -> DlaDiff:
    """All of the method, a few steps of it, against two random encoders."""
    for number in (1, 2):
        torch.manual_seed(number)
        encoder = FaceEncoder(FaceEncoderConfig(widths=(8, 8, 8, 8), dimension=16, size=16)).eval()
        save_face_encoder(encoder, tmp_path / f"face{number}")
    return DlaDiff(
        eps=16, eps_tuning=7, alpha_255=2, eps_face=9, alpha_face_255=1, static_steps=2, static_lr=1e-3, rounds=2,
        attention_steps=2, noise_steps=2, dynamic_steps=1, lr=1e-3, batch=2, class_images=3, class_steps=1,
        map_factors=[1, 2], encoders=[str(tmp_path / "face1"), str(tmp_path / "face2")], alignment="whole",
        face_size=16, face_steps=6,
    )


def subject(name: str, size: int = 16) -> Subject:
    generator = torch.Generator().manual_seed(len(name))

    def photos() -> ImageSet:
        pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
        return ImageSet(pixels, ("a", "b", "c"))

    return Subject(name, photos(), photos(), photos())


def states_of(method: DlaDiff, workshop: Any, who: Subject) -> Tensor:
    with torch.no_grad():
        return workshop.dynamic.states(workshop.studio.ids(who))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_both_losses_of_layer_one_have_a_gradient_on_every_photo(few: DlaDiff, model: Model, ctx: Context) -> None:
    ada, workshop = subject("ada"), open_workshop(few, model, ctx)
    x, states = to_float(ada.published.pixels), states_of(few, workshop, ada)
    teach_static(few, ada, workshop, seeded())
    for losses in (attention_losses(few, workshop, x, x, states, seeded()),
                   noise_losses(workshop, x, states, seeded())):
        assert torch.all(pixel_gradient(x, losses, 2).abs().amax((1, 2, 3)) > 0)


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_each_kind_of_attention_adds_to_the_loss(kind: str, few: DlaDiff, model: Model, ctx: Context) -> None:
    ada, workshop = subject("ada"), open_workshop(few, model, ctx)
    x, states = to_float(ada.published.pixels).requires_grad_(True), states_of(few, workshop, ada)
    draws = draw(workshop.studio.vae, workshop.studio.scheduler, x, seeded())
    teach_static(few, ada, workshop, seeded())
    with torch.no_grad():
        wanted = attention_maps(few, workshop.studio, workshop.static.unet, x, states, draws, slice(0, 3))
    found = attention_maps(few, workshop.studio, workshop.dynamic.unet, x, states, draws, slice(0, 3))
    distance = map_distance(getattr(wanted, kind), getattr(found, kind))
    assert torch.all(distance > 0)
    assert torch.autograd.grad(distance.sum(), x)[0].abs().sum() > 0


def test_map_distance_is_the_squared_norm_averaged_over_layers() -> None:
    a = {"one": torch.zeros(2, 2, 3), "two": torch.zeros(2, 4, 5)}
    b = {"one": torch.ones(2, 2, 3), "two": 2 * torch.ones(2, 4, 5)}
    assert map_distance(a, b).tolist() == [(6 + 80) / 2] * 2


def test_the_static_branch_without_learning_and_noise_equals_the_dynamic_one(
    few: DlaDiff, model: Model, ctx: Context,
) -> None:
    """Same weights, same photo, same noise and timestep: the distance is zero, so noise and time are shared."""
    ada, workshop = subject("ada"), open_workshop(few, model, ctx)
    x, states = to_float(ada.published.pixels), states_of(few, workshop, ada)
    losses = attention_losses(few, workshop, x, x, states, seeded())
    assert losses(x, slice(0, 3)).abs().max() < 1e-9


def test_both_surrogates_learn_and_the_static_one_then_stays(few: DlaDiff, model: Model, ctx: Context) -> None:
    ada, workshop = subject("ada"), open_workshop(few, model, ctx)
    teach_static(few, ada, workshop, seeded())
    learned = [p.clone() for p in workshop.static.parameters]
    moved = sum(int((a != b).sum()) for a, b in zip(learned, workshop.static_start))
    assert moved > 0.5 * sum(p.numel() for p in learned)
    dynamic = [p.clone() for p in workshop.dynamic.parameters]
    lesson = workshop.studio.lesson(ada, workshop.studio.encode(to_float(ada.published.pixels)), seeded())
    workshop.dynamic.learn(lesson, 1)
    assert any(not torch.equal(a, b) for a, b in zip(dynamic, workshop.dynamic.parameters))
    assert all(torch.equal(a, b) for a, b in zip(learned, workshop.static.parameters))


@pytest.mark.parametrize("change", [
    {"attention_steps": 0}, {"noise_steps": 0}, {"dual": False}, {"alternation": False}, {"dynamic_steps": 0},
    {"prior_weight": 0.0}, {"layers": "tuning"}, {"layers": "face"}, {"layers": "reversed"},
], ids=str)
def test_every_part_and_ablation_changes_the_result(
    change: dict[str, Any], few: DlaDiff, model: Model, ctx: Context,
) -> None:
    strong, ada = replace(few, lr=3e-2, face_steps=2), subject("ada")
    whole = strong.protect([ada], model, ctx)[0].pixels
    assert not torch.equal(whole, replace(strong, **change).protect([ada], model, ctx)[0].pixels)


@pytest.mark.parametrize(("layers", "eps"), [("both", 16), ("tuning", 7), ("face", 9), ("reversed", 16), ("both", 4)])
@pytest.mark.parametrize("size", [16, 24])
def test_each_layer_keeps_its_budget_on_the_saved_file(
    layers: str, eps: float, size: int, few: DlaDiff, model: Model, ctx: Context, tmp_path: Path,
) -> None:
    ada = subject("ada", size)
    method = replace(few, layers=layers, eps=min(eps, 16), alpha_255=8, alpha_face_255=8, map_factors=[1])
    for before, after in zip(ada.published.pixels, method.protect([ada], model, ctx)[0].pixels):
        Image.fromarray(after.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert 0 < np.abs(saved - before.permute(1, 2, 0).numpy()).max() <= eps


def similarities(method: DlaDiff, before: ImageSet, after: ImageSet) -> Tensor:
    """Cosines [encoders, n] on the 8-bit files."""
    found = []
    for embed in (face_encoder(name, "cpu") for name in method.encoders):
        found.append((embed(to_unit(before.pixels)) * embed(to_unit(after.pixels))).sum(1))
    return torch.stack(found)


def test_layer_two_blinds_both_encoders_and_noise_does_not(ctx: Context) -> None:
    """On drawn people, with the embedded encoders and the settings of the preset `dladiff_face_micro`."""
    people, model = MicroSubjects(count=1, start=60).subjects(), resolve("micro-sd-a")
    method = DlaDiff(layers="face", eps=16, eps_face=16, alpha_face_255=0.5, face_steps=100, jitter_pixels=0.5,
                     encoders=["micro-face-1", "micro-face-2"], alignment="whole", face_size=64)
    protected, noisy = (m.protect(people, model, ctx)[0] for m in (method, SignNoise(16)))
    assert similarities(method, people[0].published, protected).mean(1).amax() <= 0.2
    assert similarities(method, people[0].published, noisy).mean(1).amin() > 0.5


def test_layer_two_stops_at_the_threshold(few: DlaDiff, ctx: Context) -> None:
    """With a threshold that every photo meets from the start nothing moves."""
    ada = subject("ada")
    x = to_float(ada.published.pixels)
    encoders = [face_encoder(name, "cpu") for name in few.encoders]
    still = replace(few, face_threshold=1.01, jitter=0, jitter_pixels=0)
    assert torch.equal(protect_from_encoders(still, ada, x, x, encoders, ctx), x)


def test_neither_order_company_nor_batch_matters(few: DlaDiff, model: Model, ctx: Context) -> None:
    people = [subject("ada"), subject("bobby")]
    both, swapped = few.protect(people, model, ctx), few.protect(people[::-1], model, ctx)
    alone = replace(few, pgd_batch=1).protect(people[1:], model, ctx)
    assert torch.equal(both[0].pixels, swapped[1].pixels)
    assert (alone[0].pixels != both[1].pixels).float().mean() < 0.01


@pytest.mark.parametrize(("field", "value"), [
    ("eps", -1), ("eps_face", 256), ("alpha_255", 0), ("lr", 0), ("layers", "third"), ("batch", 0), ("map_factors", []),
    ("encoders", []), ("encoders", ["micro-face-1", "micro-face-1"]),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match="eps" if "eps" in field else field):
        DlaDiff(**{field: value})


def test_maps_that_the_model_does_not_have_are_refused(few: DlaDiff, model: Model, ctx: Context) -> None:
    with pytest.raises(BenchError, match="map_factors"):
        replace(few, map_factors=[8]).protect([subject("ada")], model, ctx)


def test_the_judge_is_refused(few: DlaDiff, model: Model, ctx: Context) -> None:
    with pytest.raises(BenchError, match="judge"):
        replace(few, encoders=["micro-face-3"]).protect([subject("ada")], model, ctx)


def test_published_defaults() -> None:
    """7/255 and 11/255 on the [0, 1] scale; steps 5e-3 on [-1, 1] and 8e-4 on [0, 1]."""
    method = DlaDiff()
    assert (method.eps_tuning, method.eps_face, method.eps) == (7, 11, 18)
    assert (method.alpha_255, method.alpha_face_255) == pytest.approx((5e-3 * 127.5, 8e-4 * 255))
