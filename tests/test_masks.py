"""Regions of a picture, checked cell by cell."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.masks import grown, on_grid, shifted


def picture(*places: tuple[int, int], side: int = 8) -> Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    for row, column in places:
        mask[row, column] = True
    return mask


def painted(mask: Tensor) -> set[tuple[int, int]]:
    return {(row, column) for row, column in mask.nonzero().tolist()}


def test_a_region_grows_to_every_side_and_stops_at_the_border() -> None:
    assert painted(grown(picture((3, 4)), 1)) == {(r, c) for r in (2, 3, 4) for c in (3, 4, 5)}
    assert painted(grown(picture((0, 7)), 2)) == {(r, c) for r in (0, 1, 2) for c in (5, 6, 7)}
    assert painted(grown(picture(), 3)) == set()


def test_a_region_moves_right_and_down_and_out_of_the_picture() -> None:
    before = picture((0, 0), (3, 6), (7, 7))
    assert painted(shifted(before, 2)) == {(2, 2)}
    assert painted(before) == {(0, 0), (3, 6), (7, 7)}, "the mask that was given stays as it was"
    assert painted(shifted(before, 1)) == {(1, 1), (4, 7)}


def test_squares_that_are_touched_are_taken_whole() -> None:
    assert painted(on_grid(picture((1, 2), (6, 7)), 4)) == {(r, c) for r in range(4) for c in range(4)} | {
        (r, c) for r in range(4, 8) for c in range(4, 8)}
    assert painted(on_grid(picture((5, 1)), 1)) == {(5, 1)}
