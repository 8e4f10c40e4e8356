"""New words for a frozen text encoder: rows of its embedding that can be learned, stored and loaded on their own.

The file is the one that diffusers' textual inversion script writes and ``load_textual_inversion`` reads: one tensor
[vectors, width] under the word's name. A word of several vectors stands for that many tokens in a row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError


class ExtendedEmbedding(nn.Module):
    """A frozen embedding with rows of its own from token id ``first`` on: no gradient ever reaches the old rows."""

    def __init__(self, known: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.known, self.first, self.rows = known, first, nn.Parameter(rows)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [n, length] to embeddings [n, length, width]."""
        old: Tensor = self.known(ids.clamp(max=self.first - 1))
        new = self.rows[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first)[..., None], new, old)


def spelled(word: str, vectors: int) -> list[str]:
    """The tokens that a word of several vectors stands for, named as diffusers names them."""
    return [word, *(f"{word}_{place}" for place in range(1, vectors))]


def with_words(tokenizer: Any, words: Sequence[str]) -> Any:
    """A copy of ``tokenizer`` that also knows ``words``; one that it knows already is refused."""
    vocabulary = tokenizer.get_vocab()
    if taken := [word for word in words if word in vocabulary or f"{word}</w>" in vocabulary]:
        raise BenchError(f"attack.token: the tokenizer knows '{taken[0]}' already; give a word that is new to it, "
                         f"like '<{taken[0].strip('<>')}-1>'.")
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(list(words))
    return extended


def extend(text_encoder: Any, tokenizer: Any, words: Sequence[str], initializer: str) -> nn.Parameter:
    """Give a text encoder rows for new ``words`` in place; returns them, [words, width], free to be trained.

    Row i starts as the embedding of token i of ``initializer``, from its first token again when it has fewer.
    """
    known = text_encoder.get_input_embeddings()
    start = tokenizer(initializer, add_special_tokens=False).input_ids
    if not start:
        raise BenchError(f"attack.initializer='{initializer}' is no word to this model's tokenizer; give one it knows.")
    rows = known.weight.detach()[[start[place % len(start)] for place in range(len(words))]]
    extended = ExtendedEmbedding(known, tokenizer.convert_tokens_to_ids(words[0]), rows)
    text_encoder.set_input_embeddings(extended)
    return extended.rows


def save_rows(word: str, rows: Tensor, folder: Path) -> Path:
    """Write ``learned_embeds.safetensors`` in float32 and return it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "learned_embeds.safetensors"
    save_file({word: rows.detach().float().cpu().contiguous()}, file)
    return file


def read_rows(file: Path, width: int) -> dict[str, Tensor]:
    """One word and its rows [vectors, width], from a file of :func:`save_rows` or of diffusers' script."""
    from safetensors.torch import load_file

    state = load_file(file)
    found = {word: rows[None] if rows.ndim == 1 else rows for word, rows in state.items()}
    if len(found) != 1 or any(rows.ndim != 2 or rows.shape[1] != width for rows in found.values()):
        shapes = {word: tuple(rows.shape) for word, rows in state.items()}
        raise BenchError(f"adapter: '{file}' holds {shapes}, but this text encoder takes one word with rows of "
                         f"{width}.")
    return found
