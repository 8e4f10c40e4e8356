"""The encoder ensemble: each encoder loses the person, each term counts, and the judge is never part of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.data.targets import pattern
from bench.diffusion.checkpoints import resolve
from bench.diffusion.encoders import Embed, open_encoders
from bench.diffusion.images import to_unit
from bench.diffusion.surrogate_free import crowd_of
from bench.diffusion.surrogates import pixel_gradient
from bench.errors import BenchError
from bench.faces import MICRO_ENCODERS
from bench.options import JUDGE
from bench.plugin import facts_of
from bench.records import ImageSet, Model
from defenses.encoder_ensemble import EncoderEnsemble, Features, similarities
from defenses.noise import SignNoise
from tests.defenses.drawn import subject

SHORT = EncoderEnsemble(steps=3, alpha_255=4, random_start=False)
ALL = ["ip_image", "micro-face-1", "micro-face-2"]


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context("key", tmp_path)


def test_every_encoder_loses_the_person_and_noise_hides_nobody(ctx: Context) -> None:
    """On the encoders of the embedded adapters, plain and blurred, against the clean photo and the mask."""
    model, person = resolve("micro-sd-a"), MicroSubjects(count=1, start=100, photos_per_set=2).subjects()[0]
    method = replace(SHORT, encoders=ALL, steps=12)
    protected = method.protect([person], model, ctx)[0]
    noisy = SignNoise(16).protect([person], model, ctx)[0]
    for f in open_encoders(ALL, model, "cpu"):

        def cosines(photos: ImageSet, other: Tensor, f: Embed = f) -> Tensor:
            found, wanted = f(to_unit(photos.pixels)), f(to_unit(other))
            return (torch.nn.functional.normalize(found) * torch.nn.functional.normalize(wanted)).sum(1)

        clean = person.published.pixels
        assert (cosines(protected, clean) < cosines(noisy, clean) - 0.2).all()
        assert (cosines(protected, pattern(64)) > cosines(noisy, pattern(64))).all()


def gradient(method: EncoderEnsemble, ctx: Context) -> Tensor:
    """d L / dx at photos beside the clean ones (at the clean ones the cosine to them is stationary)."""
    model, crowd = resolve("micro-sd-a"), crowd_of([subject("ada", 64)], ctx)
    ensemble = open_encoders(method.encoders, model, "cpu")
    with torch.no_grad():
        own = [f((crowd.x + 1) / 2) for f in ensemble]
        other = [f(to_unit(pattern(64))) for f in ensemble]
    losses = similarities(method, ensemble, own, other, torch.full((3, method.blurs), 1.0))
    return pixel_gradient((crowd.x + 0.1).clamp(-1, 1), losses, 4)


def test_the_gradient_is_the_mean_of_its_terms_and_each_moves_pixels(ctx: Context) -> None:
    """Encoders, and the two halves of the weight."""
    together = gradient(replace(SHORT, encoders=ALL), ctx)
    single = [gradient(replace(SHORT, encoders=[name]), ctx) for name in ALL]
    away, towards = (gradient(replace(SHORT, encoders=ALL, weight=w), ctx) for w in (1.0, 0.0))
    for term in (*single, away, towards):
        assert (term.abs().amax((1, 2, 3)) > 0).all()
    close = {"rtol": 1e-3, "atol": 1e-5 * together.abs().max().item()}
    assert torch.allclose(together, torch.stack(single).mean(0), **close)
    assert torch.allclose(together, (away + towards) / 2, **close)


def test_blurred_copies_features_weight_and_target_matter(model: Model, ctx: Context) -> None:
    methods = [SHORT, replace(SHORT, blurs=0), replace(SHORT, features=Features.hidden), replace(SHORT, weight=0.0),
               replace(SHORT, weight=1.0, random_start=True), replace(SHORT, target="grey")]
    found = [method.protect([subject("ada")], model, ctx)[0].pixels for method in methods]
    assert not any(torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])


def test_the_judge_and_packs_without_gradients_are_refused_before_any_work() -> None:
    assert MICRO_ENCODERS[-1] == JUDGE
    with pytest.raises(BenchError, match="micro-face-3 is the judge"):
        EncoderEnsemble(encoders=["ip_image", "micro-face-3"])
    for name in ("insightface:buffalo_l", "dlib"):
        with pytest.raises(BenchError, match="no gradients"):
            EncoderEnsemble(encoders=[name])


def test_the_planner_learns_what_the_model_must_offer() -> None:
    assert facts_of(EncoderEnsemble()).needs == ("text_to_image", "ip_image")
    assert facts_of(EncoderEnsemble(encoders=["ip_face"])).needs == ("text_to_image", "ip_face")
    assert facts_of(EncoderEnsemble(encoders=["micro-face-1"])).needs == ("text_to_image",)


@pytest.mark.parametrize(("field", "value"), [
    ("eps", 256), ("alpha_255", 0), ("steps", -1), ("weight", 1.1), ("weight", -0.1), ("blurs", -1), ("blur_size", 6),
    ("blur_low", 0), ("blur_high", 0.05), ("pgd_batch", 0), ("target", "zero"), ("features", "pooled"),
    ("encoders", []), ("encoders", ["ip_image", "ip_image"]),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=field):
        EncoderEnsemble(**{field: value})


def test_released_defaults() -> None:
    method = EncoderEnsemble()
    assert (method.eps, method.alpha_255, method.steps, method.weight, method.blur_size) == (16, 1.275, 100, 0.5, 7)
