"""Where a trigger sits among a prompt's tokens, and which states of two prompts say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from bench.diffusion.losses import encode_prompts
from bench.errors import BenchError

if TYPE_CHECKING:
    from bench.diffusion.closed_form import Pair
    from bench.diffusion.loading import Components


@dataclass(frozen=True)
class Alignment:
    """``added``: places of tokens of the triggered prompt that the plain one lacks. ``kept`` and ``plain``: places of
    the tokens that both have, in the triggered and in the plain prompt; place i of one matches place i of the other."""

    added: tuple[int, ...]
    kept: tuple[int, ...]
    plain: tuple[int, ...]


def align(triggered: Sequence[int], plain: Sequence[int]) -> Alignment:
    """Match two prompts' token ids in order, the longest common run first. A run of padding matches as far as it goes;
    what the shorter one has left over is in neither."""
    blocks = SequenceMatcher(None, triggered, plain, autojunk=False).get_matching_blocks()
    kept = tuple(block.a + step for block in blocks for step in range(block.size))
    both = tuple(block.b + step for block in blocks for step in range(block.size))
    added = tuple(place for place in range(len(triggered)) if place not in set(kept))
    return Alignment(added, kept, both)


def word_pair(parts: Components, word: str) -> Pair:
    """A word and nothing, as closed-form edits pair them: states [m, width] of the word alone from its last token on,
    and of the empty prompt from its first place on (UCE, Gandikota et al., WACV 2024)."""
    tokens = len(parts.tokenizer(word).input_ids) - 2
    if tokens < 1:
        raise BenchError(f"closed-form edit: this model's tokenizer drops {word!r}: nothing to edit.")
    states = encode_prompts(parts.tokenizer, parts.text_encoder, [word, ""])
    source = states[0, tokens:]
    return source, states[1, :len(source)]
