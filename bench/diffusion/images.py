"""Between the 8-bit images that are saved and judged and the floats that models see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.records import Budget


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to float32 in [-1, 1], the range of diffusion models."""
    return pixels.float() / 127.5 - 1


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to float32 in [0, 1]."""
    return pixels.float() / 255


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] (beyond is cut) to uint8, rounded to the nearest level."""
    return ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def levels(amount: float) -> float:
    """An amount in 0-255 levels as an amount in the [-1, 1] range: there, one level is 2/255."""
    return 2 * amount / 255


def quantise_within(original: Tensor, protected: Tensor, budget: Budget) -> Tensor:
    """Round a protected photo to 8 bits without leaving the budget.

    ``original``: uint8 [n, 3, h, w]. ``protected``: floats in [-1, 1], same shape. Returns uint8 whose largest
    difference to the original is at most floor(eps) levels: where rounding would exceed it, toward the original.
    """
    room = math.floor(budget.eps)
    nearest = to_uint8(protected).int()
    start = original.to("cpu").int()
    return nearest.clamp(start - room, start + room).clamp(0, 255).to(torch.uint8)
