"""From floats to files without leaving the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.diffusion.images import levels, quantise_within, to_float, to_uint8, to_unit
from bench.records import Budget


def test_every_level_survives_the_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every).min() == -1
    assert to_float(every).max() == 1
    assert to_unit(every).max() == 1


def test_one_level_is_two_255ths() -> None:
    assert levels(1) == pytest.approx(float(to_float(torch.tensor([101])) - to_float(torch.tensor([100]))), abs=1e-7)


@pytest.mark.parametrize("eps", [0, 0.5, 1, 6.375, 16, 255])
@pytest.mark.parametrize("size", [1, 32, 65])
def test_the_saved_file_is_within_the_budget(eps: float, size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.int32).to(torch.uint8)
    wild = to_float(original) + 4 * torch.randn(original.shape, generator=generator)
    Image.fromarray(quantise_within(original, wild, Budget(eps))[0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    saved = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    assert np.abs(saved - original[0].permute(1, 2, 0).numpy()).max() <= eps


def test_inside_the_budget_it_is_plain_rounding() -> None:
    original = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    moved = to_float(original) + levels(3.4)
    assert torch.equal(quantise_within(original, moved, Budget(16)), original + 3)
