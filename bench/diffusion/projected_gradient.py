"""Projected gradient steps in the L-infinity ball (Madry et al., ICLR 2018, eq. 2.2), on images in [-1, 1]."""

from __future__ import annotations

from torch import Tensor

from bench.diffusion.images import levels


def project(x: Tensor, origin: Tensor, eps: float) -> Tensor:
    """The nearest image within ``eps`` levels (0-255) of ``origin`` and within [-1, 1]."""
    radius = levels(eps)
    return (origin + (x - origin).clamp(-radius, radius)).clamp(-1, 1)


def ascend(x: Tensor, origin: Tensor, gradient: Tensor, step: float, eps: float) -> Tensor:
    """x <- Pi_eps(x + step * sign(gradient)); ``step`` and ``eps`` in 0-255 levels. No gradient flows through."""
    return project(x.detach() + levels(step) * gradient.sign(), origin, eps)


def descend(x: Tensor, origin: Tensor, gradient: Tensor, step: float, eps: float) -> Tensor:
    """The same downhill, for objectives that are minimised."""
    return ascend(x, origin, -gradient, step, eps)
