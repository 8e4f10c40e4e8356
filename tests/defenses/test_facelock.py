"""FaceLock: three terms come in one after the other, each moves pixels, and the face is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.diffusion.encoders import face_encoder
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_modules
from bench.diffusion.surrogate_free import crowd_of
from bench.diffusion.surrogates import pixel_gradient
from bench.errors import BenchError
from bench.records import ImageSet, Model
from defenses.facelock import FaceLock, Tools, Weights, autoencoder_distance, known, objectives
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

SHORT = FaceLock(eps=16, alpha_255=5, steps=20, encoders=["micro-face-1"], alignment="whole", face_size=64,
                 perceptual="autoencoder")


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def tools_of(model: Model) -> Tools:
    vae = load_modules(model)["vae"]
    return Tools(vae, [face_encoder("micro-face-1", "cpu")], autoencoder_distance(vae))


def gradient(weights: Weights, model: Model, ctx: Context) -> Tensor:
    """Of the objective at photos beside the originals."""
    crowd, tools = crowd_of([subject("ada")], ctx), tools_of(model)
    clean = known(SHORT, crowd.x, tools)
    return pixel_gradient((crowd.x + 0.1).clamp(-1, 1), objectives(SHORT, tools, clean, weights), 4)


def test_each_term_moves_pixels_and_they_add_up(model: Model, ctx: Context) -> None:
    alone = [gradient(Weights(*(float(place == one) for place in range(3))), model, ctx) for one in range(3)]
    for term in alone:
        assert (term.flatten(1).abs().amax(1) > 0).all()
    together = gradient(Weights(1.0, 0.2, 1.0), model, ctx)
    wanted = alone[0] + 0.2 * alone[1] + alone[2]
    assert torch.allclose(together, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


def test_terms_come_in_when_the_schedule_says() -> None:
    method = FaceLock()
    assert [method.weights(step) for step in (0, 25, 26, 34, 35, 99)] == [
        Weights(0, 0.2, 0), Weights(0, 0.2, 0), Weights(0, 0.2, 1), Weights(0, 0.2, 1), Weights(1, 0.2, 1),
        Weights(1, 0.2, 1)]
    assert method.step_length(0) == method.alpha_255
    assert method.step_length(99) == pytest.approx(method.alpha_255 * (1 - 0.99 * 0.99))


def test_the_terms_by_hand(model: Model, ctx: Context) -> None:
    crowd, tools = crowd_of([subject("ada", 64)], ctx), tools_of(model)
    clean, x = known(SHORT, crowd.x, tools), (crowd.x + 0.1).clamp(-1, 1)
    embed = face_encoder("micro-face-1", "cpu")
    with torch.no_grad():
        latents, before = (tools.vae.encode(each).latent_dist.mean for each in (x, crowd.x))
        picture = tools.vae.decode(latents).sample.clamp(-1, 1)
        face = (embed((picture + 1) / 2) * embed((crowd.x + 1) / 2)).sum(1)
        wanted = -face + 0.2 * (latents - before).square().mean((1, 2, 3))
        found = objectives(SHORT, tools, clean, Weights(1, 0.2, 0))(x, slice(0, 3))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_looks_are_compared_as_lpips_does(model: Model) -> None:
    vae = load_modules(model)["vae"]
    a, b = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    distance = autoencoder_distance(vae)
    assert distance(a, a).abs().max() == 0
    total, one, other = torch.zeros(2), vae.encoder.conv_in(a), vae.encoder.conv_in(b)
    for block in vae.encoder.down_blocks:
        one, other = block(one), block(other)
        total += (normalize(one, dim=1) - normalize(other, dim=1)).square().sum(1).mean((1, 2))
    assert torch.allclose(distance(a, b), total, rtol=1e-5)


def test_the_reconstruction_loses_the_face_more_than_under_noise(ctx: Context) -> None:
    """On the embedded model and drawn portraits, to both recognisers that were optimised against."""
    model, person = resolve("micro-sd-a"), MicroSubjects(count=1, start=100, photos_per_set=2).subjects()[0]
    method = replace(SHORT, encoders=["micro-face-1", "micro-face-2"], steps=16)
    vae = load_modules(model)["vae"]

    def likeness(photos: ImageSet) -> Tensor:
        with torch.no_grad():
            x, clean = (to_float(each.pixels) for each in (photos, person.published))
            picture = (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) + 1) / 2
            return torch.stack([(f(picture) * f((clean + 1) / 2)).sum(1)
                                for f in (face_encoder(name, "cpu") for name in method.encoders)])

    found = likeness(method.protect([person], model, ctx)[0])
    noisy = likeness(SignNoise(16).protect([person], model, ctx)[0])
    assert (found < noisy).all() and (found.mean(0) < noisy.mean(0) - 0.2).all()


def test_terms_and_encoders_matter(model: Model, ctx: Context) -> None:
    methods = [SHORT, replace(SHORT, latent_weight=2.0), replace(SHORT, looks_from=1.0), replace(SHORT, face_from=1.0),
               replace(SHORT, encoders=["micro-face-2"])]
    found = [m.protect([subject("ada")], model, ctx)[0].pixels for m in methods]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


@pytest.mark.parametrize(("field", "value"), [
    ("eps", 256), ("alpha_255", 0), ("steps", -1), ("latent_weight", -1), ("face_from", -1), ("looks_from", -1),
    ("face_size", 8), ("pgd_batch", 0), ("perceptual", "resnet"), ("encoders", []), ("encoders", ["micro-face-3"]),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        FaceLock(**{field: value})


def test_released_defaults() -> None:
    """0.03 and 0.01 on the [-1, 1] scale."""
    method = FaceLock()
    assert (method.eps, method.alpha_255) == pytest.approx((0.03 * 127.5, 0.01 * 127.5))
    assert (method.steps, method.latent_weight, method.face_from, method.looks_from) == (100, 0.2, 0.35, 0.25)
