"""How far pictures lie apart: VIF against a second implementation, and where there is no number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.signal import convolve2d
from torch import Tensor

from bench.picture_distance import information, peak_ratio, similarity

Array = NDArray[np.float64]


def photos(count: int = 1, side: int = 64, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=torch.manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (40 + 170 * smooth).to(torch.uint8)


def noisy(pixels: Tensor, levels: float) -> Tensor:
    drawn = torch.randn(pixels.shape, generator=torch.manual_seed(1)) * levels
    return (pixels + drawn).round().clamp(0, 255).to(torch.uint8)


def luma(pixels: Tensor) -> Array:
    found: Array = np.tensordot([0.299, 0.587, 0.114], pixels.numpy().astype(float), 1)
    return found


def vif_by_hand(reference: Array, changed: Array) -> float:
    """Sheikh and Bovik in the pixel domain: at four scales, information through a channel that fades by g and adds
    noise of variance v, over information without it; the eye adds noise of variance 2."""
    kept = whole = 0.0
    for scale in range(4):
        side = 2 ** (4 - scale) + 1
        axis = np.arange(side) - side // 2
        bell = np.exp(-axis**2 / (2 * (side / 5) ** 2))
        window = np.outer(bell, bell) / bell.sum() ** 2

        def blur(x: Array, window: Array = window) -> Array:
            return convolve2d(x, window, mode="valid")

        if scale:
            reference, changed = blur(reference)[::2, ::2], blur(changed)[::2, ::2]
        spread = blur(reference**2) - blur(reference) ** 2
        other = blur(changed**2) - blur(changed) ** 2
        both = blur(reference * changed) - blur(reference) * blur(changed)
        fade = both / (spread + 1e-10)
        noise = np.where(fade < 0, other, other - fade * both)
        fade = np.maximum(fade, 0)
        kept += np.log10(1 + fade**2 * spread / (np.maximum(noise, 1e-10) + 2)).sum()
        whole += np.log10(1 + spread / 2).sum()
    return float(kept / whole)


def test_vif_agrees_with_a_second_implementation() -> None:
    before = photos()
    for after in (noisy(before, 10), photos(seed=3), (before // 2 + 60).to(torch.uint8)):
        expected = vif_by_hand(luma(before[0]), luma(after[0]))
        assert information(before, after)[0] == pytest.approx(expected, rel=1e-4)


def test_vif_of_the_same_is_1_and_falls_with_noise() -> None:
    clean = photos(3)
    assert information(clean, clean) == pytest.approx([1, 1, 1], abs=1e-4)
    found = [information(clean, noisy(clean, levels)) for levels in (2, 6, 18, 54)]
    for smaller, larger in pairwise(found):
        assert all(a > b for a, b in zip(smaller, larger, strict=True))


def test_more_contrast_is_more_information_and_the_reference_comes_first() -> None:
    before = (photos() // 2 + 60).to(torch.uint8)
    after = ((before.float() - 120) * 1.6 + 120).clamp(0, 255).to(torch.uint8)
    assert information(before, after)[0] > 1 > information(after, before)[0]


def test_small_and_flat_pictures_have_no_vif() -> None:
    assert information(photos(2, 40), photos(2, 40)) == [None, None]
    flat = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    assert information(flat, photos()) == [None]
    assert information(photos(), flat)[0] == pytest.approx(0, abs=1e-6), "nothing is left"


def test_one_picture_is_a_list_of_one() -> None:
    before = photos()
    assert len(similarity(before, noisy(before, 9))) == len(peak_ratio(before, noisy(before, 9))) == 1
