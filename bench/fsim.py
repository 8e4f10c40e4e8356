"""Feature similarity of two pictures: how much of what stands out in one, edges and lines, stands in the other.

Zhang, Zhang, Mou and Zhang, "FSIM: A Feature Similarity Index for Image Quality Assessment", IEEE Transactions on Image
Processing 20(8), 2011, the version for brightness. Two features are compared at every place: phase congruency, how far
waves of all lengths agree there in phase, whatever the contrast, and the strength of the gradient; places count by
their phase congruency.

Settings of the paper: log-Gabor filters of 4 wavelengths (6, 12, 24 and 48 pixels) in 4 directions, of width sigma_r
= 0.5978 and sigma_theta = 0.6545, Scharr's gradient, T1 = 0.85, T2 = 160, alpha = beta = 1, pictures larger than 256
pixels averaged down to about that. The formulas are the paper's own. Its released program takes phase congruency from
older code that also subtracts an estimate of the noise and punishes phases that disagree, so its values differ from
ours. Deviation: borders are continued by their own pixels where the gradient is taken, not by zeros, which would draw a
frame around both pictures and call it alike.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

WAVELENGTHS = (6.0, 12.0, 24.0, 48.0)
DIRECTIONS = 4
SIGMA_R, SIGMA_THETA = 0.5978, 0.6545
"""Widths of the filters along the logarithm of the frequency, and around their direction in radians."""
T1, T2 = 0.85, 160.0
EPSILON = 1e-4
"""Against division by zero where nothing is to be seen, on brightness of 0 to 255."""
SIDE = 256
LUMA = (0.299, 0.587, 0.114)
SCHARR = ((3.0, 0.0, -3.0), (10.0, 0.0, -10.0), (3.0, 0.0, -3.0))
FACTS = {"channels": "luma", "wavelengths": list(WAVELENGTHS), "directions": DIRECTIONS, "T1": T1, "T2": T2,
         "phase_congruency": "as printed: no noise threshold"}
"""What a comparison must share."""
BATCH = 16


def luma(pixels: Tensor) -> Tensor:
    """Pictures uint8 [n, 3, h, w] to brightness float64 [n, h, w] in 0 to 255."""
    return torch.einsum("nchw,c->nhw", pixels.double(), torch.tensor(LUMA, dtype=torch.float64))


def brought_down(brightness: Tensor) -> Tensor:
    """[n, h, w] averaged over blocks so that the shorter side is about 256; smaller pictures stay as they are."""
    block = max(1, math.floor(min(brightness.shape[1:]) / SIDE + 0.5))
    return functional.avg_pool2d(brightness[:, None], block)[:, 0] if block > 1 else brightness


@lru_cache(maxsize=4)
def log_gabor(height: int, width: int) -> Tensor:
    """Equation 3 on the frequencies of a picture, in the order of its Fourier transform: float64 [4 directions, 4
    wavelengths, h, w]. Each filter is on one side of the spectrum, so its response is complex: the even part is real,
    the odd one imaginary."""
    y, x = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    frequency = torch.hypot(y[:, None], x[None, :])
    frequency[0, 0] = 1.0  # any number: the mean brightness is taken out below
    # rows are numbered downwards, angles turn upwards
    angle = torch.atan2(-y[:, None].expand(height, width), x[None, :].expand(height, width))
    directions = torch.arange(DIRECTIONS, dtype=torch.float64) * math.pi / DIRECTIONS
    apart = angle - directions[:, None, None]
    apart = torch.atan2(apart.sin(), apart.cos())
    around = torch.exp(-apart.square() / (2 * SIGMA_THETA**2))
    logarithms = torch.log(frequency * torch.tensor(WAVELENGTHS, dtype=torch.float64)[:, None, None])
    along = torch.exp(-logarithms.square() / (2 * SIGMA_R**2))
    along[:, 0, 0] = 0.0
    return around[:, None] * along[None]


def phase_congruency(brightness: Tensor) -> Tensor:
    """Equation 4 with equation 1's energies: [n, h, w] in 0 to 255 to [n, h, w] in 0 to 1."""
    spectrum = torch.fft.fft2(brightness)
    energy, amplitude = torch.zeros_like(brightness), torch.zeros_like(brightness)
    for filters in log_gabor(*brightness.shape[1:]):
        responses = torch.fft.ifft2(spectrum[:, None] * filters)
        energy += responses.sum(1).abs()  # sqrt(F^2 + H^2), the sums over wavelengths of the even and of the odd parts
        amplitude += responses.abs().sum(1)
    return energy / (EPSILON + amplitude)


def gradient(brightness: Tensor) -> Tensor:
    """The strength of Scharr's gradient, [n, h, w]."""
    across = torch.tensor(SCHARR, dtype=brightness.dtype) / 16
    kernels = torch.stack([across, across.T])[:, None]
    padded = functional.pad(brightness[:, None], (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, kernels).square().sum(1).sqrt()


def similarity(one: Tensor, other: Tensor, constant: float) -> Tensor:
    """Equations 5 and 6: 1 where both are the same, towards 0 where they are far apart against ``constant``."""
    return (2 * one * other + constant) / (one.square() + other.square() + constant)


def fsim(before: Tensor, after: Tensor) -> list[float | None]:
    """Equation 8 of each pair of pictures, uint8 [n, 3, h, w]: above 0, 1 for the same. None where neither picture
    shows anything, so that no place counts."""
    parts = [_fsim(before[i:i + BATCH], after[i:i + BATCH]) for i in range(0, len(before), BATCH)]
    values: list[float | None] = [value if math.isfinite(value) else None for part in parts for value in part.tolist()]
    return values


def _fsim(before: Tensor, after: Tensor) -> Tensor:
    one, other = (brought_down(luma(pixels)) for pixels in (before, after))
    phases = phase_congruency(one), phase_congruency(other)
    alike = similarity(*phases, T1) * similarity(gradient(one), gradient(other), T2)  # equation 7
    weight = torch.maximum(*phases)
    weight = torch.where(weight > EPSILON, weight, 0.0)  # rounding of a flat picture is no feature
    return (alike * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
