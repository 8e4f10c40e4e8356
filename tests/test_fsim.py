"""FSIM against its formulas, computed a second time without Fourier transforms, and against what it must do."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import correlate
from torch import Tensor

from bench.fsim import brought_down, fsim, gradient, log_gabor, luma, phase_congruency, similarity

Array = NDArray[np.float64]


def photos(count: int = 2, side: int = 24, seed: int = 0) -> Tensor:
    """Smooth blobs, so that there are edges of all lengths."""
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=torch.manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (40 + 170 * smooth).to(torch.uint8)


def noisy(pixels: Tensor, levels: float, seed: int = 1) -> Tensor:
    drawn = torch.randn(pixels.shape, generator=torch.manual_seed(seed)) * levels
    return (pixels + drawn).round().clamp(0, 255).to(torch.uint8)


def by_hand(brightness: Array) -> Array:
    """Equations 1 to 4, one frequency and one place at a time."""
    high, wide = brightness.shape
    rows, columns = np.arange(high), np.arange(wide)
    energy, amplitude = np.zeros((high, wide)), np.zeros((high, wide))
    for direction in range(4):
        total = np.zeros((high, wide), complex)
        for wavelength in (6, 12, 24, 48):
            response = np.zeros((high, wide), complex)
            for u in range(high):
                for v in range(wide):
                    down, right = (u if u < high / 2 else u - high) / high, (v if v < wide / 2 else v - wide) / wide
                    if u == v == 0:
                        continue
                    along = math.log(math.hypot(down, right) * wavelength) ** 2 / (2 * 0.5978**2)
                    turn = abs(math.atan2(-down, right) - direction * math.pi / 4) % (2 * math.pi)
                    around = min(turn, 2 * math.pi - turn) ** 2 / (2 * 0.6545**2)
                    wave = np.exp(2j * np.pi * (u * rows[:, None] / high + v * columns[None, :] / wide))
                    response += math.exp(-along - around) * (brightness * wave.conj()).sum() * wave / (high * wide)
            total += response
            amplitude += np.abs(response)
        energy += np.abs(total)
    return energy / (1e-4 + amplitude)


def test_phase_congruency_is_the_papers_frequency_by_frequency() -> None:
    """Odd and even sides, so that the highest frequency is met both ways."""
    for shape in ((9, 12), (8, 7)):
        drawn = np.random.default_rng(0).uniform(0, 255, shape)
        found = phase_congruency(torch.from_numpy(drawn)[None])[0].numpy()
        assert np.allclose(found, by_hand(drawn), atol=1e-9)


def test_fsim_is_equation_8_of_the_papers_features() -> None:
    before, after = photos(1, 16), noisy(photos(1, 16), 12)
    scharr = np.array([[3, 0, -3], [10, 0, -10], [3, 0, -3]]) / 16
    features = []
    for pixels in (before, after):
        y = np.tensordot([0.299, 0.587, 0.114], pixels[0].numpy().astype(float), 1)
        steep = np.hypot(correlate(y, scharr, mode="nearest"), correlate(y, scharr.T, mode="nearest"))
        features.append((by_hand(y), steep))
    (p, g), (q, h) = features
    alike = (2 * p * q + 0.85) / (p**2 + q**2 + 0.85) * (2 * g * h + 160) / (g**2 + h**2 + 160)
    weight = np.maximum(p, q)
    assert fsim(before, after)[0] == pytest.approx((alike * weight).sum() / weight.sum(), abs=1e-9)


def test_the_same_picture_is_1_and_order_does_not_matter() -> None:
    one, other = photos(), noisy(photos(), 20)
    assert fsim(one, one) == pytest.approx([1, 1])
    assert fsim(one, other) == pytest.approx(fsim(other, one))
    assert all(0 < value < 1 for value in fsim(one, other) if value is not None)


def test_more_noise_is_less_alike_for_every_picture() -> None:
    clean = photos(4, 64)
    found = [fsim(clean, noisy(clean, levels)) for levels in (2, 6, 18, 54)]
    for smaller, larger in pairwise(found):
        assert all(a > b for a, b in zip(smaller, larger, strict=True))


def test_pictures_are_compared_one_by_one() -> None:
    before, after = photos(20, 24), noisy(photos(20, 24), 15)
    assert fsim(before, after)[18] == pytest.approx(fsim(before[18:19], after[18:19])[0])


def test_phase_congruency_does_not_see_contrast() -> None:
    """The paper's reason for it: lines of half the contrast are as congruent."""
    y = luma(photos(1, 32))
    pale = (y - y.mean()) / 2 + y.mean()
    assert torch.allclose(phase_congruency(y), phase_congruency(pale), atol=1e-3)


def test_phases_agree_at_an_edge_and_at_a_line() -> None:
    edge = torch.zeros(1, 32, 32, dtype=torch.float64)
    edge[:, :, 8:24] = 200
    line = torch.zeros(1, 32, 32, dtype=torch.float64)
    line[:, :, 16] = 200
    along = phase_congruency(edge)[0, 16], phase_congruency(line)[0, 16]
    assert {int(along[0].argmax())} <= {7, 8, 23, 24}, "on either side of an edge"
    assert int(along[1].argmax()) == 16 and along[1][16] > 0.99


def test_filters_look_to_one_side_and_not_at_brightness() -> None:
    filters = log_gabor(16, 16)
    assert filters.shape == (4, 4, 16, 16)
    assert (filters[:, :, 0, 0] == 0).all()
    assert filters[0, 0, 0, 3] > 0.9 * filters[0, 0].max() > 1e3 * filters[0, 0, 0, 13], "direction 0 looks right"
    assert filters[2, 0, 13, 0] > 1e3 * filters[2, 0, 3, 0], "direction 2 looks up"


def test_the_gradient_of_a_slope_is_its_slope_over_two_pixels() -> None:
    slope = (torch.arange(12, dtype=torch.float64) * 10).expand(12, 12)[None]
    assert torch.allclose(gradient(slope)[0, 1:-1, 1:-1], torch.full((10, 10), 20.0, dtype=torch.float64))
    assert torch.allclose(gradient(slope), gradient(slope.transpose(1, 2)).transpose(1, 2))
    assert gradient(torch.full((1, 6, 6), 99.0, dtype=torch.float64)).abs().max() == 0, "no frame at the border"


def test_similarity_of_known_values() -> None:
    found = similarity(torch.tensor(0.2), torch.tensor(0.4), 0.85)
    assert float(found) == pytest.approx((2 * 0.08 + 0.85) / (0.04 + 0.16 + 0.85))


def test_large_pictures_are_averaged_down_to_about_256() -> None:
    sides = {side: brought_down(torch.zeros(1, side, side, dtype=torch.float64)).shape[-1]
             for side in (64, 300, 512, 768)}
    assert sides == {64: 64, 300: 300, 512: 256, 768: 256}
    blocks = torch.arange(512, dtype=torch.float64).expand(512, 512)[None]
    assert brought_down(blocks)[0, 0, :3].tolist() == [0.5, 2.5, 4.5]


def test_flat_pictures_have_nothing_to_compare() -> None:
    flat = torch.full((1, 3, 24, 24), 130, dtype=torch.uint8)
    assert fsim(flat, flat) == [None]
    value = fsim(flat, photos(1))[0]
    assert value is not None and value < 0.9
