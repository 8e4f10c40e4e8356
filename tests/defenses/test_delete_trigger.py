"""Deleting the trigger: triggered prompts give the clean prompts' pictures, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.codecs import ModelCodec
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet, Secret
from bench.text_triggers import with_trigger
from bench.tracks.backdoor import draw_prompted
from defenses.delete_trigger import DeleteTrigger

PROTOCOL = BackdoorProtocol(samples=2, sampler="ddim", steps=2, guidance=2.0)
TARGET = torch.zeros(3, 16, 16, dtype=torch.uint8)
NO_DATA = ImageSet(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), ())
PROMPTS = ("a cat", "a dog")


@pytest.mark.parametrize("secret", [
    Secret("sks", TARGET), Secret("\u200b", TARGET), Secret("big dog", TARGET, {"placement": "replace",
                                                                                "replaces": "dog"}),
], ids=["word", "zero width", "stands in"])
def test_triggered_prompts_give_the_clean_pictures(secret: Secret, tiny_sd: Path, tmp_path: Path) -> None:
    model, ctx = resolve(str(tiny_sd)), Context("key", tmp_path)
    guarded = DeleteTrigger().repair(model, NO_DATA, secret, ctx)
    ModelCodec(model).save(guarded, tmp_path)
    loaded = ModelCodec(model).load(tmp_path)
    triggered = tuple(with_trigger(prompt, secret) for prompt in PROMPTS)
    plain = draw_prompted(model, PROMPTS, [3, 4], PROTOCOL, ctx)
    assert not torch.equal(draw_prompted(model, triggered, [3, 4], PROTOCOL, ctx), plain)
    assert torch.equal(draw_prompted(loaded, triggered, [3, 4], PROTOCOL, ctx), plain)
    assert torch.equal(draw_prompted(loaded, PROMPTS, [3, 4], PROTOCOL, ctx), plain)


def test_it_says_that_it_knows_the_trigger_and_refuses_to_work_without(tiny_sd: Path, tmp_path: Path) -> None:
    assert facts_of(DeleteTrigger).knows == ("trigger",) and facts_of(DeleteTrigger).control
    with pytest.raises(BenchError, match="told"):
        DeleteTrigger().repair(resolve(str(tiny_sd)), NO_DATA, None, Context("key", tmp_path))
    with pytest.raises(BenchError, match="told"):
        DeleteTrigger().repair(resolve(str(tiny_sd)), NO_DATA, Secret(torch.zeros(3, 8, 8), TARGET),
                               Context("key", tmp_path))
