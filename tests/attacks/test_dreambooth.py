"""DreamBooth: it learns, it writes what it trained, and the model draws something else afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.dreambooth import DreamBooth
from attacks.purifier_none import NoPurifier
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_components, load_pipeline
from bench.diffusion.losses import latent_distribution, noise_prediction_loss
from bench.diffusion.sampling import draw_customised, generate
from bench.errors import BenchError
from bench.protocols import CustomizationProtocol
from bench.records import ImageSet, Model

QUICK = DreamBooth(steps=40, lr=1e-2, class_images=4, class_steps=1)
PROMPTS = ["a photo of sks person"] * 2


def photos(size: int = 16) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
    return ImageSet(pixels, ("a", "b", "c"))


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def photo_loss(model: Model) -> float:
    """L_ldm of the photos under their prompt, over many draws, with the weights that were written."""
    parts = load_components(model)
    generator = torch.Generator().manual_seed(1)
    ids = parts.tokenizer(PROMPTS[:1], padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        states = parts.text_encoder(ids)[0].expand(3, -1, -1)
        found = latent_distribution(parts.vae, photos().pixels.float() / 127.5 - 1)
        losses = [noise_prediction_loss(parts.unet, parts.scheduler, found.sample(generator), states,
                                        generator=generator) for _ in range(40)]
    return torch.stack(losses).mean().item()


def test_the_written_model_has_learnt_the_photos(model: Model, tmp_path: Path) -> None:
    customised = QUICK.customise(photos(), "person", model, Context("key", tmp_path))
    assert photo_loss(customised.model) < 0.9 * photo_loss(model)
    assert customised.token == "sks"
    assert set(customised.model.parts) == {"unet", "text_encoder"}
    assert all(folder.parent == tmp_path for folder in customised.model.parts.values())


def test_the_model_draws_something_else_afterwards(model: Model, tmp_path: Path) -> None:
    ctx = Context("key", tmp_path)
    customised = QUICK.customise(photos(), "person", model, ctx)
    drawn = draw_customised(customised, PROMPTS, [1, 2], CustomizationProtocol(steps=3), ctx)
    assert drawn.shape == (2, 3, 16, 16)
    assert not torch.equal(drawn, generate(load_pipeline(model), PROMPTS, [1, 2], steps=3))


def test_weights_move_only_where_they_are_trained(model: Model, tmp_path: Path) -> None:
    attack = replace(QUICK, steps=1, train_text_encoder=False)
    customised = attack.customise(photos(), "person", model, Context("key", tmp_path))
    assert set(customised.model.parts) == {"unet"}
    after, before = load_components(customised.model), load_components(model)
    moved = [not torch.equal(a, b) for a, b in zip(after.unet.parameters(), before.unet.parameters())]
    assert sum(moved) > 0.8 * len(moved)


def test_the_same_key_gives_the_same_bits(model: Model, tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        customised = replace(QUICK, steps=3).customise(photos(), "person", model, Context("key", tmp_path / name))
        runs.append(load_components(customised.model).unet.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_prior_preservation_changes_the_result_and_can_be_off(model: Model, tmp_path: Path) -> None:
    runs = []
    for weight in (0.0, 1.0):
        attack = replace(QUICK, steps=3, prior_weight=weight)
        customised = attack.customise(photos(), "person", model, Context("key", tmp_path / str(weight)))
        runs.append(load_components(customised.model).unet.conv_out.weight)
    assert not torch.equal(runs[0], runs[1])


def test_checkpointing_and_mixed_precision_run(model: Model, tmp_path: Path) -> None:
    attack = replace(QUICK, steps=1, gradient_checkpointing=True, precision="bf16")
    assert attack.customise(photos(), "person", model, Context("key", tmp_path)).model.parts


def test_photos_of_a_size_that_does_not_fit_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="photos are 15x15 pixels"):
        QUICK.customise(photos(15), "person", model, Context("key", tmp_path))


@pytest.mark.parametrize(("field", "value"), [
    ("steps", 0), ("lr", 0), ("lr", 2), ("batch", 0), ("prior_weight", -1), ("class_images", 0), ("token", " "),
    ("precision", "fp8"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"attack.{field}|precision"):
        DreamBooth(**{field: value})


def test_no_purifier_changes_nothing(model: Model, tmp_path: Path) -> None:
    given = photos()
    assert NoPurifier().purify(given, model, Context("key", tmp_path)) is given
