"""How far a picture's local statistics lie from those of clean pictures (NIQE), without any reference for the picture.

Mittal, Soundararajan and Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE Signal Processing Letters
20(3), 2013. Brightness is normalised locally (equation 1 to 3); patches of the result, and products of neighbours in
it, are described by the parameters of generalised Gaussians (equations 4 to 10) at two scales: 36 numbers a patch. A
Gaussian over these numbers is fitted to the sharp patches of clean pictures, another to a picture's own patches; their
distance (equation 11) is the score, 0 at best, without an upper end.

Settings of the paper: 7 x 7 window of sigma 7/6, patches of 96 pixels, sharp where the mean local deviation exceeds
0.75 of the picture's largest. Deviations: clean pictures are the user's own data, not the 125 photographs of the paper,
so scores of different data must not be compared; patches overlap by half, and small pictures have small patches
(`patch_size`), for else they would hold too few; neighbours are multiplied within a patch only, not around its edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError

Array = NDArray[np.float64]
PATCH, SHARP, FEATURES = 96, 0.75, 36
"""The paper's patch size and sharpness threshold; numbers per patch."""
SMALLEST_PATCH = 16
FEWEST = 2 * FEATURES
"""Sharp clean patches below which the covariance of 36 numbers is mostly noise, and so would be the score."""
TINY = 1e-12


@dataclass(frozen=True)
class Gaussian:
    """Mean [36] and covariance [36, 36] of patch features; `count`: of how many patches."""

    mean: Array
    covariance: Array
    count: int


def patch_size(height: int, width: int) -> int:
    """The paper's 96 pixels, or where they are more than a quarter of a side that quarter, as a multiple of 4, but no
    less than 16."""
    return min(PATCH, max(SMALLEST_PATCH, min(height, width) // 16 * 4))


def brightness(pixels: NDArray[np.uint8]) -> Array:
    """uint8 [n, 3, h, w] to luma [n, h, w] in 0-255 (ITU-R BT.601)."""
    luma: Array = np.einsum("nchw,c->nhw", pixels.astype(np.float64), [0.299, 0.587, 0.114])
    return luma


def normalised(luma: Array) -> tuple[Array, Array]:
    """Equations 1 to 3 on [n, h, w]: (I - mu) / (sigma + 1), and sigma."""
    from scipy.ndimage import gaussian_filter

    def blur(x: Array) -> Array:
        found: Array = gaussian_filter(x, (0, 7 / 6, 7 / 6), radius=(0, 3, 3), mode="nearest")
        return found

    mean = blur(luma)
    deviation = np.sqrt(np.abs(blur(luma * luma) - mean * mean))
    return (luma - mean) / (deviation + 1), deviation


def patches(x: Array, size: int) -> Array:
    """[n, h, w] to [n, p, size, size], overlapping by half, row by row."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, :: size // 2, :: size // 2]
    return windows.reshape(len(x), -1, size, size)


@lru_cache(maxsize=1)
def _shapes() -> tuple[Array, Array]:
    """rho(a) = Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)), rising, and the shapes a from 0.2 to 10 that it belongs to."""
    from scipy.special import gammaln

    shape = np.arange(0.2, 10.0005, 0.001)
    return np.exp(2 * gammaln(2 / shape) - gammaln(1 / shape) - gammaln(3 / shape)), shape


def symmetric(x: Array) -> Array:
    """Shape and variance of a zero-mean generalised Gaussian (equation 4) by matching moments: [..., m] to [..., 2]."""
    power = (x * x).mean(-1)
    ratio, shape = _shapes()
    return np.stack([np.interp(np.abs(x).mean(-1) ** 2 / (power + TINY), ratio, shape), power], -1)


def asymmetric(x: Array) -> Array:
    """Shape, left and right scale and mean of an asymmetric generalised Gaussian (equations 8 and 10) by the moments of
    Lasmar, Stitou and Berthoumieu, ICIP 2009: [..., m] to [..., 4]."""
    from scipy.special import gammaln

    left, right = np.sqrt(_mean_where(x * x, x < 0)), np.sqrt(_mean_where(x * x, x > 0))
    balance = left / (right + TINY)
    moment = np.abs(x).mean(-1) ** 2 / ((x * x).mean(-1) + TINY)
    ratio, shapes = _shapes()
    shape = np.interp(moment * (balance**3 + 1) * (balance + 1) / (balance**2 + 1) ** 2, ratio, shapes)
    scale = np.exp((gammaln(1 / shape) - gammaln(3 / shape)) / 2)
    mean = (right - left) * scale * np.exp(gammaln(2 / shape) - gammaln(1 / shape))
    return np.stack([shape, left * scale, right * scale, mean], -1)


def _mean_where(x: Array, chosen: NDArray[np.bool_]) -> Array:
    found: Array = (x * chosen).sum(-1) / np.maximum(chosen.sum(-1), 1)
    return found


def describe(x: Array) -> Array:
    """The 18 numbers of normalised patches [..., k, k]: the patch itself, then products of neighbours (equation 7)
    along rows, columns and both diagonals."""
    products = (x[..., :, :-1] * x[..., :, 1:], x[..., :-1, :] * x[..., 1:, :],
                x[..., :-1, :-1] * x[..., 1:, 1:], x[..., :-1, 1:] * x[..., 1:, :-1])
    parts = [symmetric(x.reshape(*x.shape[:-2], -1))]
    parts += [asymmetric(product.reshape(*product.shape[:-2], -1)) for product in products]
    return np.concatenate(parts, -1)


def features(pixels: NDArray[np.uint8], size: int) -> tuple[Array, Array]:
    """Patch features [n, p, 36] and sharpness [n, p] of pictures uint8 [n, 3, h, w]; patches of `size` pixels.

    Raises `BenchError` where a patch does not fit.
    """
    if size % 4 or size < SMALLEST_PATCH or size > min(pixels.shape[2:]):
        raise BenchError(f"niqe: patch={size} must be a multiple of 4, at least {SMALLEST_PATCH}, and fit the "
                         f"pictures, which are {pixels.shape[2]} x {pixels.shape[3]}.")
    luma = brightness(pixels)
    fine, deviation = normalised(luma)
    coarse, _ = normalised(_halved(luma))
    numbers = np.concatenate([describe(patches(fine, size)), describe(patches(coarse, size // 2))], -1)
    return numbers, patches(deviation, size).mean((-1, -2))


def _halved(luma: Array) -> Array:
    """Half the size, bicubic with antialiasing."""
    import torch
    from torch.nn.functional import interpolate

    size = (luma.shape[1] // 2, luma.shape[2] // 2)
    small = interpolate(torch.from_numpy(luma)[:, None], size, mode="bicubic", antialias=True, align_corners=False)
    found: Array = small[:, 0].numpy()
    return found


def gaussian(numbers: Array) -> Gaussian:
    """Mean and covariance of patch features [p, 36]; no spread where there is one patch only."""
    spread = np.cov(numbers, rowvar=False) if len(numbers) > 1 else np.zeros((numbers.shape[1],) * 2)
    return Gaussian(numbers.mean(0), spread, len(numbers))


def fit(numbers: Array, sharpness: Array) -> Gaussian:
    """The Gaussian of clean pictures' sharp patches: features [n, p, 36], sharpness [n, p]."""
    return gaussian(numbers[sharpness > SHARP * sharpness.max(1, keepdims=True)])


def distance(one: Gaussian, other: Gaussian) -> float:
    """Equation 11: sqrt((m1 - m2)^T ((S1 + S2) / 2)^-1 (m1 - m2)), with the pseudo-inverse."""
    apart = one.mean - other.mean
    squared = apart @ np.linalg.pinv((one.covariance + other.covariance) / 2) @ apart
    return math.sqrt(max(float(squared), 0.0))


def scores(pixels: NDArray[np.uint8], clean: Gaussian, size: int) -> list[float]:
    """NIQE of each picture, uint8 [n, 3, h, w]."""
    return [distance(clean, gaussian(numbers)) for numbers in features(pixels, size)[0]]
