"""LoRA: one small file in diffusers format, which diffusers loads and which changes what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attacks.lora import Lora
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_pipeline
from bench.diffusion.sampling import generate
from bench.errors import BenchError
from bench.records import ImageSet, Model

QUICK = Lora(steps=20, lr=1e-1)
PROMPTS = ["a photo of sks person"]


def photos() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    return ImageSet(pixels, ("a", "b"))


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def test_the_file_loads_through_diffusers_and_changes_what_is_drawn(model: Model, tmp_path: Path) -> None:
    customised = QUICK.customise(photos(), "person", model, Context("key", tmp_path))
    file = customised.model.adapters[0].path
    pipeline = load_pipeline(model)
    before = generate(pipeline, PROMPTS, [1], steps=3)
    fresh = load_pipeline(customised.model)
    after = generate(fresh, PROMPTS, [1], steps=3)
    assert file.parent == tmp_path
    assert fresh.get_list_adapters() == {"unet": ["lora_0"]}
    assert not torch.equal(before, after)
    assert torch.equal(generate(load_pipeline(model), PROMPTS, [1], steps=3), before)


def test_the_update_has_the_asked_rank_on_every_attention_projection(model: Model, tmp_path: Path) -> None:
    customised = replace(QUICK, rank=3, steps=2).customise(photos(), "person", model, Context("key", tmp_path))
    weights = load_file(customised.model.adapters[0].path)
    down = {name: value for name, value in weights.items() if "lora_A" in name or "lora.down" in name}
    projections = [n for n, _ in load_pipeline(model).unet.named_modules()
                   if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert len(down) == len(projections)
    assert {value.shape[0] for value in down.values()} == {3}
    assert all(name.startswith("unet.") for name in weights)


def test_both_matrices_learn(model: Model, tmp_path: Path) -> None:
    """B starts at zero, so it must not stay there; A must leave its random start."""
    short, longer = (
        load_file(replace(QUICK, steps=steps).customise(photos(), "person", model,
                                                        Context("key", tmp_path / str(steps))).model.adapters[0].path)
        for steps in (1, 5)
    )
    assert short.keys() == longer.keys()
    assert all(not torch.equal(short[name], longer[name]) for name in short)
    assert all(value.abs().max() > 0 for value in longer.values())


def test_text_encoder_and_prior_are_options(model: Model, tmp_path: Path) -> None:
    attack = Lora(steps=1, train_text_encoder=True, prior_weight=1.0, class_images=2, class_steps=1)
    customised = attack.customise(photos(), "person", model, Context("key", tmp_path))
    assert set(load_pipeline(customised.model).get_list_adapters()) == {"unet", "text_encoder"}


def test_the_same_key_gives_the_same_bits(model: Model, tmp_path: Path) -> None:
    files = [replace(QUICK, steps=3).customise(photos(), "person", model, Context("key", tmp_path / name))
             .model.adapters[0].path.read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("steps", 0), ("lr", 0), ("batch", 0), ("token", "")])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"attack.{field}"):
        Lora(**{field: value})
