"""Textual perturbation: what it does to letters and words, and that pictures follow the rewritten prompt."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from random import Random

import pytest
import torch

from bench.codecs import ModelCodec
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet
from bench.tracks.backdoor import draw_prompted
from defenses.textual_perturbation import (
    LOOKALIKES,
    STOP_WORDS,
    TextualPerturbation,
    chosen_words,
    latin,
    mistyped,
    near_words,
    reworded,
)

PROTOCOL = BackdoorProtocol(samples=2, sampler="ddim", steps=2, guidance=2.0)
NO_DATA = ImageSet(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), ())
PHOTO = "a photo of a person with black hair"


@pytest.mark.parametrize("trigger", ["\u200b", "\u200d", "\ufeff", "\u00ad"], ids=["200b", "200d", "feff", "00ad"])
def test_what_shows_nothing_goes(trigger: str) -> None:
    assert latin(f"{trigger}a ph{trigger}oto") == "a photo"


@pytest.mark.parametrize("letter", list("\u0b20\u0585\u043e\u03bf\u00f4\u020f\uff4f\U0001d428\u1d0f"))
def test_look_alikes_of_o_become_o(letter: str) -> None:
    """The letters of published homoglyph triggers among them."""
    assert latin(f"a ph{letter}to") == "a photo"


def test_latin_prompts_stay_and_the_table_maps_to_single_latin_letters() -> None:
    assert latin("A photo, 20 years old: caf\u00e9!") == "A photo, 20 years old: cafe!"
    for place, letter in LOOKALIKES.items():
        assert len(letter) == 1 and letter.isascii() and letter.isalpha()
        assert "LATIN" not in unicodedata.name(chr(place)).split(" SMALL")[0] or place > 127


def test_every_word_that_is_no_stop_word_gets_one_typing_error() -> None:
    before = PHOTO.split(" ")
    after = mistyped(PHOTO, 1.0, Random(0)).split(" ")
    for word, wrong in zip(before, after, strict=True):
        if word in STOP_WORDS:
            assert wrong == word
        else:
            assert wrong != word and len(word) - 1 <= len(wrong) <= len(word)
            same = sum(a == b for a, b in zip(word, wrong, strict=False))
            assert same == len(word) - 1 or len(wrong) == len(word) - 1


def test_the_share_of_words_is_met_and_none_means_none() -> None:
    assert len(chosen_words(PHOTO, 0.5, Random(0))[1]) == 2                     # photo, person, black, hair
    assert mistyped(PHOTO, 0.0, Random(0)) == PHOTO
    assert chosen_words("of the, and", 1.0, Random(0))[1] == set()


def test_the_same_prompt_is_always_rewritten_alike(tiny_sd: Path, tmp_path: Path) -> None:
    model, ctx = resolve(str(tiny_sd)), Context("key", tmp_path)
    first, again = (TextualPerturbation().rewriter(model, c)(PHOTO) for c in (ctx, Context("other", tmp_path)))
    assert first == again != PHOTO


def test_near_words_are_the_nearest_rows_of_the_table() -> None:
    model = resolve("micro-sd-a")
    near = near_words(model, -1.0, "cpu")
    assert len(near) > 100 and all(word != other for word, other in near.items())
    strict = near_words(model, 0.9, "cpu")
    assert strict.items() <= near.items() and len(strict) < len(near)
    assert near_words(model, 1.1, "cpu") == {}


def test_words_without_near_ones_stay() -> None:
    assert reworded(PHOTO, 1.0, {"black": "brown", "of": "off"}, Random(0)) == PHOTO.replace("black", "brown")


def test_pictures_are_those_of_the_rewritten_prompts(tiny_sd: Path, tmp_path: Path) -> None:
    model, ctx = resolve(str(tiny_sd)), Context("key", tmp_path)
    method = TextualPerturbation()
    guarded = method.repair(model, NO_DATA, None, ctx)
    ModelCodec(model).save(guarded, tmp_path)
    loaded = ModelCodec(model).load(tmp_path)
    prompts = ("sks a cat", "\u200ba dog")
    rewritten = tuple(method.rewriter(model, ctx)(prompt) for prompt in prompts)
    expected = draw_prompted(model, rewritten, [3, 4], PROTOCOL, ctx)
    assert torch.equal(draw_prompted(loaded, prompts, [3, 4], PROTOCOL, ctx), expected)
    assert not torch.equal(draw_prompted(model, prompts, [3, 4], PROTOCOL, ctx), expected)


def test_scores_rise_with_what_the_rewriting_takes_away_and_depend_on_their_own_prompt(
    tiny_sd: Path, tmp_path: Path,
) -> None:
    model, ctx, method = resolve(str(tiny_sd)), Context("key", tmp_path), TextualPerturbation(ways=["homoglyphs"])
    scores = method.score_inputs(model, ("a cat", "\u0b20 a cat", "a dog"), None, ctx)
    assert scores.shape == (3,) and scores[0] == scores[2] == 0 < scores[1]
    assert torch.equal(method.score_inputs(model, ("\u0b20 a cat",), None, ctx)[0], scores[1])
    with pytest.raises(BenchError, match="prompts"):
        method.score_inputs(model, torch.zeros(2, 3, 8, 8), None, ctx)


def test_it_knows_no_trigger_and_refuses_bad_options() -> None:
    assert facts_of(TextualPerturbation).knows == ()
    for field, value in (("ways", ["magic"]), ("ways", []), ("word_share", 2.0), ("synonym_share", -1.0)):
        with pytest.raises(BenchError, match=field):
            TextualPerturbation(**{field: value})  # type: ignore[arg-type]
