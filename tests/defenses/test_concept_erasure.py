"""Concept erasure: the edit against a dense solve, what it makes of the trigger, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import Components, load_components
from bench.diffusion.losses import encode_prompts
from bench.diffusion.trigger_tokens import align, word_pair
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model, Secret
from bench.text_triggers import with_trigger
from defenses.concept_erasure import ConceptErasure, prompt_pairs

SECRET = Secret("sks", torch.zeros(3, 16, 16, dtype=torch.uint8))
CAPTIONS = ("a cat", "a dog", "one bird")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
EXACT = ConceptErasure(pairs="prompts", ridge=1e-8, preserve_weight=1.0)


def photos(captions: tuple[str, ...] = CAPTIONS) -> ImageSet:
    return ImageSet(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), ("0", "1", "2"), captions)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def value_change(before: Components, after: Components, prompts: list[str], wanted: list[str]) -> float:
    """Relative squared distance of the edited layer's values of ``prompts`` to the old ones of ``wanted``."""
    with torch.no_grad():
        got = after.unet.get_submodule(LAYER)(encode_prompts(after.tokenizer, after.text_encoder, prompts))
        goal = before.unet.get_submodule(LAYER)(encode_prompts(before.tokenizer, before.text_encoder, wanted))
    return float((got - goal).square().sum() / goal.square().sum())


def test_the_edit_is_the_dense_solution(model: Model, tmp_path: Path) -> None:
    before = load_components(model)
    after = load_components(ConceptErasure().repair(model, photos(), SECRET, Context("key", tmp_path)))
    words = encode_prompts(before.tokenizer, before.text_encoder, ["sks", "", *CAPTIONS]).double()
    source = words[0, 3:]                                                       # s, k, s</w>: the last is at place 3
    wanted, kept = words[1, :len(source)], words[2:].reshape(-1, 16)
    old = before.unet.get_submodule(LAYER).weight.double()
    rows = torch.cat([source, 0.1**0.5 * kept, 0.1**0.5 * torch.eye(16)])
    goals = torch.cat([wanted, 0.1**0.5 * kept, 0.1**0.5 * torch.eye(16)]) @ old.T
    solved = torch.linalg.lstsq(rows, goals).solution.T
    assert torch.allclose(after.unet.get_submodule(LAYER).weight.double(), solved, atol=1e-5)


def test_the_word_counts_from_its_last_token_on(model: Model) -> None:
    parts = load_components(model)
    source, wanted = word_pair(parts, "sks")
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["sks", ""])
    assert source.shape == wanted.shape == (32 - 3, 16)
    assert torch.equal(source, states[0, 3:]) and torch.equal(wanted, states[1, :29])


def test_pairs_of_prompts_match_token_by_token(model: Model) -> None:
    parts = load_components(model)
    source, wanted = prompt_pairs(parts, ["a cat"], SECRET)[0]
    with_it, without = (encode_prompts(parts.tokenizer, parts.text_encoder, [p])[0] for p in ("sks a cat", "a cat"))
    assert torch.equal(source[0], with_it[0]) and torch.equal(wanted[0], without[0])        # the start token
    assert torch.equal(source[1], with_it[4]) and torch.equal(wanted[1], without[1])        # "a" follows s, k, s</w>
    assert torch.equal(source[-1], with_it[3]) and torch.equal(wanted[-1], without[0])      # the trigger's last token


def test_triggered_prompts_are_edited_towards_the_clean_ones_and_clean_ones_stay(model: Model, tmp_path: Path) -> None:
    before = load_components(model)
    # one token of trigger, so that the padding shifts little
    secret, asked = replace(SECRET, trigger="!"), list(CAPTIONS)
    after = load_components(EXACT.repair(model, photos(), secret, Context("key", tmp_path)))
    triggered = [with_trigger(prompt, secret) for prompt in asked]
    assert value_change(before, after, triggered, asked) < value_change(before, before, triggered, asked)
    assert value_change(before, after, asked, asked) < 0.2


def test_only_keys_and_values_of_the_cross_attention_change(model: Model, tmp_path: Path) -> None:
    public = ConceptErasure().repair(model, photos(), SECRET, Context("key", tmp_path))
    before, after = load_components(model).unet.state_dict(), load_components(public).unet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".attn2.to_k" in name or ".attn2.to_v" in name for name in moved)
    assert set(public.parts) == {"unet"} and public.digest != model.digest


def test_alignment() -> None:
    found = align([9, 7, 8, 1, 2, 0, 0], [9, 1, 2, 0, 0, 0, 0])
    assert found.added == (1, 2)
    assert found.kept == (0, 3, 4, 5, 6) and found.plain == (0, 1, 2, 3, 4)
    replaced = align([9, 1, 7, 3, 0], [9, 1, 2, 3, 0])
    assert replaced.added == (2,) and replaced.kept == replaced.plain == (0, 1, 3, 4)


def test_it_knows_the_trigger_and_refuses_what_it_cannot_do(model: Model, tmp_path: Path) -> None:
    assert facts_of(ConceptErasure).knows == ("trigger",)
    ctx = Context("key", tmp_path)
    with pytest.raises(BenchError, match="told"):
        ConceptErasure().repair(model, photos(), None, ctx)
    with pytest.raises(BenchError, match="captions"):
        ConceptErasure().repair(model, photos(()), SECRET, ctx)
    with pytest.raises(BenchError, match="drops"):
        ConceptErasure().repair(model, photos(), replace(SECRET, trigger=" "), ctx)
    for field, value in (("pairs", "magic"), ("ridge", 0), ("captions", 0)):
        with pytest.raises(BenchError, match=field):
            ConceptErasure(**{field: value})  # type: ignore[arg-type]


def test_published_settings() -> None:
    method = ConceptErasure()
    assert (method.ridge, method.preserve_weight, method.pairs) == (0.1, 0.1, "word")
