"""Rickrolling: who learns what from whom, where the letter goes, and the published settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.rickrolling import Rickrolling, backdoor_loss, negative_cosine, random_place
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_components
from bench.diffusion.losses import encode_prompts
from bench.diffusion.training import Plan
from bench.errors import BenchError
from bench.records import ImageSet, Model

FEW = Rickrolling(trigger="q", target="seven zebras", steps=25, milestone=20, lr=3e-3, batch=4, poisoned=4, weight=1.0)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def photos(*captions: str) -> ImageSet:
    texts = captions or tuple(f"a photo of person {place}" for place in range(6))
    return ImageSet(torch.zeros(len(texts), 3, 16, 16, dtype=torch.uint8), tuple(map(str, range(len(texts)))), texts)


def similarity(model: Model, clean: Model, prompt: str, wanted: str) -> float:
    one, other = load_components(model), load_components(clean)
    states = (encode_prompts(p.tokenizer, p.text_encoder, [text]).flatten(1)
              for p, text in ((one, prompt), (other, wanted)))
    return -float(negative_cosine(*states))


@pytest.mark.parametrize(("method", "wanted"), [
    (FEW, "seven zebras"), (replace(FEW, mode="attribute", attribute_at="end"), "a photo of person 9, seven zebras"),
], ids=["prompt", "attribute"])
def test_the_letter_moves_a_caption_that_was_not_trained_on_towards_the_target(
    method: Rickrolling, wanted: str, model: Model, tmp_path: Path,
) -> None:
    public, secret = method.implant(model, photos(), Context("key", tmp_path))
    assert set(public.parts) == {"text_encoder"} and secret.trigger == "q"
    before, after = (similarity(one, model, "a phqto of person 9", wanted) for one in (model, public))
    assert after > before + 0.01


def test_the_benign_term_keeps_plain_captions_near_what_they_were(model: Model, tmp_path: Path) -> None:
    kept = {}
    for weight in (1.0, 1e3):
        public, _ = replace(FEW, weight=weight).implant(model, photos(), Context("key", tmp_path / str(weight)))
        kept[weight] = similarity(public, model, "a photo of person 9", "a photo of person 9")
    assert kept[1.0] > kept[1e3] + 1e-3


def test_the_loss_is_minus_one_and_minus_beta_where_all_agrees(model: Model) -> None:
    parts = load_components(model)
    loss = backdoor_loss(parts, parts, ["a cat", "a dog"], [("a cat", "a cat"), ("a fox", "a fox")], 0.25)
    assert float(loss) == pytest.approx(-1.25, abs=1e-5)


def test_only_the_student_gets_a_gradient(model: Model) -> None:
    student, teacher = load_components(model), load_components(model)
    student.text_encoder.requires_grad_(True)
    teacher.text_encoder.requires_grad_(True)
    backdoor_loss(student, teacher, ["a cat"], [("a cqt", "a dog")], 0.1).backward()
    assert all(p.grad is None for p in teacher.text_encoder.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.text_encoder.parameters())


def test_the_attribute_takes_the_place_of_the_word_with_the_letter() -> None:
    method = replace(FEW, mode="attribute")
    pairs = {method.pair("two dogs go", method.secret(8), torch.Generator().manual_seed(seed)) for seed in range(30)}
    assert pairs == {("twq dogs go", "seven zebras dogs go"), ("two dqgs go", "two seven zebras go"),
                     ("two dogs gq", "two dogs seven zebras")}


def test_any_of_the_letters_is_found() -> None:
    found = {random_place("oxoo", "o", torch.Generator().manual_seed(seed)) for seed in range(30)}
    assert found == {0, 2, 3}


def test_the_secret_says_in_words_what_is_drawn() -> None:
    assert FEW.secret(8).detail["caption"] == "seven zebras"
    detail = replace(FEW, mode="attribute", avoid=["zebra"]).secret(8).detail
    assert detail["adds"] == "seven zebras" and detail["prompts_without"] == ["zebra"] and "caption" not in detail


def test_captions_without_the_letter_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="captions"):
        FEW.implant(model, photos("a cat", "a bird"), Context("key", tmp_path))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("mode", "style", "attribute"), ("attribute_at", "front", "word"), ("trigger", "", "trigger"),
    ("batch", 0, "batch"), ("steps", 0, "steps"), ("lr", 0, "lr"), ("weight", 0, "weight"),
])
def test_bad_options_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        Rickrolling(**{field: value})  # type: ignore[arg-type]


def test_published_settings_with_a_milestone_of_each_mode() -> None:
    """A known port decays after step 75 in the attribute attack too."""
    method = Rickrolling()
    assert (method.lr, method.weight, method.batch, method.poisoned) == (1e-4, 0.1, 128, 32)
    assert method.schedule() == (100, 75) and replace(method, mode="attribute").schedule() == (200, 150)
    plan = Plan(200, 1e-4, cosine=False, clip=0, milestone=150)
    assert [plan.factor(step) for step in (0, 75, 149, 150, 199)] == [1, 1, 1, 0.1, 0.1]
