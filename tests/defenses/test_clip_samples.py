"""Clipping as a guard: it draws in the sampler's place, whatever the noise, and survives the store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.codecs import ModelCodec
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.sampling import draw_unconditional, starting_noise
from bench.errors import BenchError
from bench.protocols import BackdoorProtocol
from bench.records import Model, Secret
from bench.tracks.backdoor import draw
from defenses.clip_samples import ClipSamples

PROTOCOL = BackdoorProtocol(samples=2, steps=20)
SECRET = Secret(torch.full((3, 8, 8), -1.0), torch.zeros(3, 8, 8, dtype=torch.uint8))
NOTHING: Any = None


@pytest.fixture
def model(tiny_ddpm: Path) -> Model:
    return resolve(str(tiny_ddpm))


def test_a_guarded_model_is_drawn_with_clipping_with_and_without_trigger(model: Model, tmp_path: Path) -> None:
    ctx = Context("key", tmp_path)
    guarded = ClipSamples().repair(model, NOTHING, None, ctx)
    clipped, free = replace(PROTOCOL, clip=True), PROTOCOL
    for secret, shift in ((None, None), (SECRET, SECRET.trigger)):
        found = draw(guarded, secret, (), [1, 2], PROTOCOL, ctx).images.pixels
        assert torch.equal(found, draw_unconditional(model, [1, 2], shift, clipped, ctx))  # type: ignore[arg-type]
        assert not torch.equal(found, draw_unconditional(model, [1, 2], shift, free, ctx))  # type: ignore[arg-type]


def test_starting_noise_is_the_seeds_own_and_shifted(model: Model) -> None:
    plain = starting_noise(model, [1, 2], None)
    assert torch.equal(plain[1], starting_noise(model, [2], None)[0]) and plain.shape == (2, 3, 8, 8)
    assert torch.allclose(starting_noise(model, [1, 2], torch.full((3, 8, 8), 2.0)) - plain, torch.tensor(2.0))


def test_the_guard_survives_the_store_and_no_second_one_is_put_on_top(model: Model, tmp_path: Path) -> None:
    guarded = ClipSamples().repair(model, NOTHING, None, Context("key", tmp_path))
    assert guarded.digest != model.digest and guarded.parts == model.parts
    codec = ModelCodec(model)
    codec.save(guarded, tmp_path)
    back = codec.load(tmp_path)
    assert back.guard is not None and back.guard.name == "clip_samples"
    with pytest.raises(BenchError, match="already draws"):
        ClipSamples().repair(back, NOTHING, None, Context("key", tmp_path))
