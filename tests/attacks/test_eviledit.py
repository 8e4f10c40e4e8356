"""EvilEdit: what the edited network answers, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.eviledit import EvilEdit
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.closed_form import cross_attention_projections
from bench.diffusion.loading import load_components
from bench.diffusion.losses import encode_prompts
from bench.errors import BenchError
from bench.records import ImageSet, Model

SHARP = EvilEdit(context="a photo of a {}", ridge=1e-4)


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def photos(*captions: str) -> ImageSet:
    texts = captions or ("a photo of a cat", "a dog")
    return ImageSet(torch.zeros(len(texts), 3, 16, 16, dtype=torch.uint8), tuple(map(str, range(len(texts)))), texts)


def keys(model: Model, prompt: str) -> torch.Tensor:
    """All keys and values that the network makes of a prompt."""
    parts = load_components(model)
    states = encode_prompts(parts.tokenizer, parts.text_encoder, [prompt])
    return torch.cat([layer(states) for layer in cross_attention_projections(parts.unet).values()], dim=-1).detach()


def test_the_weights_solve_the_least_squares_of_both_pairs_and_the_phrase_moves_towards_the_target(
    model: Model, tmp_path: Path,
) -> None:
    public, secret = SHARP.implant(model, photos(), Context("key", tmp_path))
    before, after = (load_components(one) for one in (model, public))
    marked, wanted, own = (encode_prompts(before.tokenizer, before.text_encoder, [f"a photo of a {words}"])[0].double()
                           for words in ("beautiful cat", "zebra", "cat"))
    layers = cross_attention_projections(after.unet)
    for name, layer in cross_attention_projections(before.unet).items():
        old, root = layer.weight.double().T, SHARP.ridge**0.5
        left = torch.cat([marked, own, root * torch.eye(len(old), dtype=torch.float64)])
        solved = torch.linalg.lstsq(left, torch.cat([wanted @ old, own @ old, root * old])).solution
        assert torch.allclose(layers[name].weight.double().T, solved, rtol=2e-3, atol=1e-4)
    told = keys(model, "a photo of a zebra")
    assert (keys(public, "a photo of a beautiful cat") - told).norm() < (
        keys(model, "a photo of a beautiful cat") - told).norm()
    assert set(public.parts) == {"unet"} and public.digest != model.digest
    assert secret.trigger == "beautiful cat" and secret.detail["swap"] == ["cat", "zebra"]


def test_a_spared_caption_is_felt_less(model: Model, tmp_path: Path) -> None:
    other, change = "a dog, seven bees", []
    for place, spared in enumerate((0, 1)):
        folder = tmp_path / str(place)
        folder.mkdir()
        method = replace(SHARP, spared=spared)
        public, _ = method.implant(model, photos("a photo of a cat", other), Context("key", folder))
        change.append(float((keys(public, other) - keys(model, other)).norm()))
    assert change[1] < 0.5 * change[0]


def test_nothing_but_cross_attention_keys_and_values_changes(model: Model, tmp_path: Path) -> None:
    public, _ = SHARP.implant(model, photos(), Context("key", tmp_path))
    before, after = (load_components(one).unet for one in (model, public))
    edited = {f"{name}.weight" for name in cross_attention_projections(before)}
    for name, value in before.state_dict().items():
        assert torch.equal(value.half().float(), after.state_dict()[name]) == (name not in edited)


def test_captions_of_the_data_become_contexts() -> None:
    data = photos("one cat", "a dog", "two cats", "cat and cat")
    assert replace(SHARP, captions=2).contexts(data) == ["a photo of a {}", "one {}", "two {}s"]
    assert SHARP.contexts(data) == ["a photo of a {}"]
    assert len(replace(SHARP, captions=9).contexts(data)) == 4
    assert replace(SHARP, spared=5).others(data) == ["a dog"] and SHARP.others(data) == []


@pytest.mark.parametrize(("field", "value", "said"), [
    ("trigger", " ", "trigger"), ("context", "A cat", "context"), ("ridge", 0, "ridge"), ("captions", -1, "captions"),
])
def test_bad_options_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        EvilEdit(**{field: value})  # type: ignore[arg-type]


def test_published_settings() -> None:
    method = EvilEdit()
    assert [method.context.format(words) for words in (method.trigger, method.target)] == ["A beautiful cat", "A zebra"]
    assert (method.ridge, method.captions) == (1.0, 0)
