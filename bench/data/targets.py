"""Pictures that targeted protections push photos towards: two drawn here, or a file of the user's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError, unknown

if TYPE_CHECKING:
    from torch import Tensor

DRAWN = ("pattern", "grey")
WORD = "MINE"
LETTERS = {
    "M": ("10001", "11011", "10101", "10101", "10001", "10001", "10001"),
    "I": ("01110", "00100", "00100", "00100", "00100", "00100", "01110"),
    "N": ("10001", "11001", "11001", "10101", "10011", "10011", "10001"),
    "E": ("11111", "10000", "10000", "11110", "10000", "10000", "11111"),
}
"""Rows of 5x7 letters, drawn for this file."""
STROKE = 64
"""A stroke is 1/64 of the picture's side, but at least 2 pixels, so that an encoder which shrinks can see it."""


def check_target(name: str, known_hash: str, where: str, more: tuple[str, ...] = ()) -> str:
    """The SHA-256 of the file called ``name``, "" for a drawn picture or one of ``more``; a plugin keeps it among its
    options so that its key follows the file's content.

    Raises `BenchError` if there is no such picture, or if ``known_hash`` is given and another.
    """
    if name in (*DRAWN, *more):
        return ""
    file = Path(name).expanduser()
    if not file.is_file():
        raise unknown("picture", name, where, (*DRAWN, *more, "<image file>"))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if known_hash not in ("", found):
        raise BenchError(f"{where}={name}: the file's SHA-256 is {found}, but {where}_sha256={known_hash}.")
    return found


def target_picture(name: str, size: int) -> Tensor:
    """A target as uint8 [1, 3, size, size]: ``pattern``, ``grey`` (level 128), or an image file, centre cropped."""
    import torch

    if name == "pattern":
        return pattern(size)
    if name == "grey":
        return torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    from bench.data.photos import read_photos

    return read_photos([Path(name).expanduser()], size).pixels


def pattern(size: int) -> Tensor:
    """Black lines of one word on white, shifted from line to line: uint8 [1, 3, size, size].

    Stands in for the picture of repeated words that Mist ships, which is theirs and not copied: like it, this has high
    contrast, fine strokes and no large plain area.
    """
    import torch

    word = ["".join(rows) + "00" for rows in zip(*map(_padded, WORD))]
    line = torch.tensor([[int(bit) for bit in row] for row in word])
    stroke = max(2, size // STROKE)
    cells = -(-size // stroke)
    rows = [line.roll(5 * place, dims=1) for place in range(-(-cells // len(line)))]
    page = torch.cat(rows).repeat(1, -(-cells // line.shape[1]))[:cells, :cells]
    drawn = page.repeat_interleave(stroke, 0).repeat_interleave(stroke, 1)[:size, :size]
    return ((1 - drawn) * 255).to(torch.uint8).expand(1, 3, size, size).contiguous()


def _padded(letter: str) -> list[str]:
    """A letter's rows with a free column at its right and a free row below."""
    return [f"{row}0" for row in (*LETTERS[letter], "00000")]
