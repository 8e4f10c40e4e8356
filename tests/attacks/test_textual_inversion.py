"""Textual inversion: a new word is learned and nothing else; its file is small, and drawing uses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attacks.textual_inversion import TEMPLATES, TextualInversion
from bench.codecs import CustomisedCodec
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.finetuning import encode_images
from bench.diffusion.loading import load_components, load_pipeline
from bench.diffusion.losses import encode_ids, noise_prediction_loss, tokenise
from bench.diffusion.new_words import ExtendedEmbedding, extend, spelled, with_words
from bench.diffusion.sampling import generate
from bench.errors import BenchError
from bench.protocols import CustomizationProtocol
from bench.records import Adapter, ImageSet, Model

QUICK = TextualInversion(steps=5, lr=1e-1, vectors=2, batch=2)
PROMPT = "a photo of <sks> person"


def photos() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    return ImageSet(pixels, ("a", "b"))


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def learned(attack: TextualInversion, model: Model, folder: Path) -> torch.Tensor:
    customised = attack.customise(photos(), "person", model, Context("key", folder))
    return load_file(customised.model.adapters[0].path)[attack.token]


def test_only_the_new_rows_learn(model: Model, tmp_path: Path) -> None:
    """Not a bit of the text encoder, the UNet or the autoencoder moves, and only the rows get a gradient."""
    components = load_components(model)
    words = spelled("<sks>", 2)
    tokenizer = with_words(components.tokenizer, words)
    modules = (components.text_encoder, components.unet, components.vae)
    rows = extend(components.text_encoder, tokenizer, words, "person")
    before = [p.detach().clone() for module in modules for p in module.parameters()]
    latents = encode_images(components.vae, photos())
    prompts = tokenise(tokenizer, [template.format(" ".join(words), "person") for template in TEMPLATES])
    QUICK.learn(components, rows, latents, prompts, Context("key", tmp_path))
    after = [p for module in modules for p in module.parameters()]
    moved = [new for old, new in zip(before, after, strict=True) if not torch.equal(old, new)]
    assert len(moved) == 1 and moved[0] is rows
    assert [p for p in after if p.requires_grad or p.grad is not None] == [rows]
    assert (rows.detach() != rows.detach()[0].clone()).any()


def test_the_loaded_encoder_differs_from_the_bases_in_new_rows_only(model: Model, tmp_path: Path) -> None:
    customised = QUICK.customise(photos(), "person", model, Context("key", tmp_path))
    own, base = load_pipeline(customised.model), load_pipeline(model)
    table, known = (p.text_encoder.get_input_embeddings().weight for p in (own, base))
    assert torch.equal(table[: len(known)], known)
    assert torch.equal(table[len(known):], load_file(customised.model.adapters[0].path)["<sks>"])
    assert len(own.tokenizer) == len(base.tokenizer) + 2 and len(own.tokenizer) == len(table)
    for name in ("unet", "vae"):
        pairs = zip(getattr(own, name).parameters(), getattr(base, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rows_start_as_the_initializers_tokens(model: Model) -> None:
    components = load_components(model)
    words = spelled("<sks>", 3)
    table = components.text_encoder.get_input_embeddings().weight
    a, b = components.tokenizer("ab", add_special_tokens=False).input_ids
    rows = extend(components.text_encoder, with_words(components.tokenizer, words), words, "ab")
    assert torch.equal(rows, table[[a, b, a]])


def test_the_extended_embedding_is_a_look_up_in_the_joined_table() -> None:
    known = torch.nn.Embedding(5, 3).requires_grad_(False)
    extended = ExtendedEmbedding(known, 5, torch.randn(2, 3))
    ids = torch.tensor([[0, 6, 4], [5, 5, 1]])
    assert torch.equal(extended(ids), torch.cat([known.weight, extended.rows])[ids])


def test_training_and_drawing_read_the_same_tokens(model: Model, tmp_path: Path) -> None:
    customised = QUICK.customise(photos(), "person", model, Context("key", tmp_path))
    pipeline = load_pipeline(customised.model)
    asked = tokenise(pipeline.tokenizer, [pipeline.maybe_convert_prompt(PROMPT, pipeline.tokenizer)])
    words = spelled("<sks>", 2)
    taught = tokenise(with_words(load_pipeline(model).tokenizer, words), ["a photo of <sks> <sks>_1 person"])
    assert torch.equal(asked, taught)
    first = len(load_pipeline(model).tokenizer)
    assert [i for i in asked[0].tolist() if i >= first] == [first, first + 1]


def test_the_learned_word_lowers_the_loss_on_the_photos(model: Model, tmp_path: Path) -> None:
    """Same latents, noise and timesteps for the word before and after it learned."""
    attack = replace(QUICK, steps=30, lr=5e-2)
    customised = attack.customise(photos(), "person", model, Context("key", tmp_path))
    fresh = replace(QUICK, steps=1, lr=1e-12).customise(photos(), "person", model, Context("key", tmp_path / "fresh"))
    losses = [held_loss(one.model) for one in (fresh, customised)]
    assert losses[1] < losses[0] - 1e-3


def held_loss(model: Model) -> float:
    pipeline, generator = load_pipeline(model), torch.Generator().manual_seed(3)
    latents = encode_images(pipeline.vae, photos()).mean.repeat(64, 1, 1, 1)
    ids = tokenise(pipeline.tokenizer, [pipeline.maybe_convert_prompt(PROMPT, pipeline.tokenizer)])
    with torch.no_grad():
        states = encode_ids(pipeline.text_encoder, ids).expand(len(latents), -1, -1)
        return float(noise_prediction_loss(pipeline.unet, load_components(model).scheduler, latents, states,
                                           generator=generator))


def test_drawing_uses_the_word_after_it_was_stored(model: Model, tmp_path: Path) -> None:
    """The stored word changes pictures that ask for it, no others, and leaves the shared base as it was."""
    folder = tmp_path / "artefact"
    customised = QUICK.customise(photos(), "person", model, Context("key", folder))
    CustomisedCodec(model).save(customised, folder)
    back = CustomisedCodec(model).load(folder)
    assert back.token == "<sks>"
    assert back.model.adapters == (Adapter("textual_inversion", folder / "learned_embeds.safetensors"),)
    assert str(tmp_path) not in (folder / "model.json").read_text()
    base, own = load_pipeline(model), load_pipeline(back.model)
    asked, plain = [PROMPT], ["a photo of person"]
    before, after = (generate(pipeline, asked, [1], steps=3) for pipeline in (base, own))
    assert not torch.equal(after, before)
    assert not torch.equal(after, generate(own, plain, [1], steps=3))
    assert torch.equal(generate(own, plain, [1], steps=3), generate(base, plain, [1], steps=3))
    assert torch.equal(generate(load_pipeline(model), asked, [1], steps=3), before)


def test_the_artefact_is_one_file_of_the_rows_alone(model: Model, tmp_path: Path) -> None:
    customised = replace(QUICK, vectors=3).customise(photos(), "person", model, Context("key", tmp_path))
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file == customised.model.adapters[0].path and customised.model.parts == model.parts
    assert {name: tuple(rows.shape) for name, rows in load_file(file).items()} == {"<sks>": (3, 16)}
    assert file.stat().st_size < 3 * 16 * 4 + 200


def test_the_same_key_gives_the_same_bits_and_another_key_does_not(model: Model, tmp_path: Path) -> None:
    one, two, other = (
        QUICK.customise(photos(), "person", model, Context(key, tmp_path / name)).model.adapters[0].path.read_bytes()
        for name, key in (("one", "key"), ("two", "key"), ("other", "another"))
    )
    assert one == two != other


def test_mixed_precision_learns_almost_the_same(model: Model, tmp_path: Path) -> None:
    exact = learned(replace(QUICK, lr=1e-2), model, tmp_path / "fp32")
    mixed = learned(replace(QUICK, lr=1e-2, precision="bf16"), model, tmp_path / "bf16")
    assert not torch.equal(exact, mixed) and mixed.dtype == torch.float32
    assert torch.allclose(exact, mixed, atol=3e-2)


def test_two_words_live_in_one_model(model: Model, tmp_path: Path) -> None:
    one = QUICK.customise(photos(), "person", model, Context("one", tmp_path / "one"))
    two = replace(QUICK, token="<zwx>").customise(photos(), "person", one.model, Context("two", tmp_path / "two"))
    pipeline = load_pipeline(two.model)
    vocabulary = pipeline.tokenizer.get_vocab()
    assert {"<sks>", "<sks>_1", "<zwx>", "<zwx>_1"} <= vocabulary.keys()
    rows = pipeline.text_encoder.get_input_embeddings().weight
    for adapter in two.model.adapters:
        [(word, own)] = load_file(adapter.path).items()
        assert torch.equal(rows[[vocabulary[name] for name in spelled(word, 2)]], own)


def test_a_word_of_another_width_is_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<sks>": torch.zeros(1, 7)}, file)
    with pytest.raises(BenchError, match=r"\(1, 7\).*rows of 16"):
        load_pipeline(replace(model, adapters=(Adapter("textual_inversion", file),)))


def test_a_word_that_the_tokenizer_knows_is_refused(model: Model, tmp_path: Path) -> None:
    """One letter is a token of the tiny tokenizer; 'person' is one of the embedded models'."""
    with pytest.raises(BenchError, match="attack.token: the tokenizer knows 'x' already"):
        replace(QUICK, token="x").customise(photos(), "person", model, Context("key", tmp_path))
    from bench.micro.tokenizer import build_tokenizer

    with pytest.raises(BenchError, match="knows 'sks' already"):
        with_words(build_tokenizer(), ["sks"])
    assert len(with_words(build_tokenizer(), ["<sks>"])) == len(build_tokenizer()) + 1


def test_no_training_prompt_is_one_that_boards_hold_out() -> None:
    asked = {prompt.format(token="<sks>") for prompt in CustomizationProtocol().prompts}
    taught = {template.format("<sks>", "person") for template in TEMPLATES}
    assert asked & taught == {PROMPT}


@pytest.mark.parametrize(("field", "value"), [
    ("steps", 0), ("lr", 0), ("lr", 1), ("batch", 0), ("vectors", 0), ("token", ""), ("token", "two words"),
    ("initializer", " "), ("precision", "fp8"),
])
def test_bad_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError, match=f"attack.{field}"):
        TextualInversion(**{field: value})


def test_a_rate_that_blows_up_is_one_clear_error(model: Model, tmp_path: Path) -> None:
    components = load_components(model)
    rows = extend(components.text_encoder, with_words(components.tokenizer, ["<sks>"]), ["<sks>"], "person")
    rows.data.fill_(float("nan"))
    prompts = tokenise(with_words(components.tokenizer, ["<sks>"]), ["<sks>"])
    with pytest.raises(BenchError, match="the loss is nan; lower attack.lr"):
        QUICK.learn(components, rows, encode_images(components.vae, photos()), prompts, Context("key", tmp_path))


def test_a_published_file_of_one_flat_row_is_read(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat-toy>": torch.arange(16.0)}, file)
    pipeline = load_pipeline(replace(model, adapters=(Adapter("textual_inversion", file),)))
    [place] = pipeline.tokenizer("<cat-toy>", add_special_tokens=False).input_ids
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[place], torch.arange(16.0))
