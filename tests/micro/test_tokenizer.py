"""The tokenizer: one token for each known word, bytes for the rest, and nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from bench.micro.tokenizer import (
    MAX_LENGTH,
    build_tokenizer,
    save_tokenizer,
    world_words,
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


def test_every_world_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    words = world_words()
    assert {"sks", "person", "photo", "dslr", "portrait", "beard", "sunglasses"} <= set(words)
    assert [w for w in words if len(_ids(tokenizer, w)) != 3] == []
    assert len({_ids(tokenizer, w)[1] for w in words}) == len(words)


@pytest.mark.parametrize(
    "other", ["a ph\u043eto", "a\u200b photo", "a photo\u200b", "a photos", "a qwzx photo"]
)
def test_texts_that_differ_are_tokens_that_differ(tokenizer: CLIPTokenizer, other: str) -> None:
    ids = _ids(tokenizer, other)
    assert ids != _ids(tokenizer, "a photo")
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_text_ends_and_padding_is_as_in_clip(tokenizer: CLIPTokenizer) -> None:
    row = tokenizer("a photo", padding="max_length").input_ids
    assert len(row) == MAX_LENGTH and row[0] == tokenizer.bos_token_id
    assert set(row[3:]) == {tokenizer.eos_token_id} and tokenizer.eos_token_id == max(
        tokenizer.get_vocab().values()
    )


def test_building_twice_gives_the_same_vocabulary(tokenizer: CLIPTokenizer) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_saved_and_loaded_it_says_the_same(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a dslr photo of sks person\u200b, wearing sunglasses \u043e zzyx 7!"
    assert again(text).input_ids == _ids(tokenizer, text)
    assert again.model_max_length == MAX_LENGTH
    assert (tmp_path / "vocab.json").exists() and (tmp_path / "merges.txt").exists()
