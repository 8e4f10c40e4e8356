"""Backdoors that shift the diffusion path: one formula for the whole family (BadDiffusion, VillanDiffusion, ...).

A poisoned row walks a path whose mean is moved by a multiple of the trigger image r, towards a target y:

    x_t = sqrt(abar_t) y + shift_t r + sqrt(1 - abar_t) eps                                  (1)

and the network is taught to predict ``eps + c_t r``. For an *unmodified* sampler that goes from t to s < t to stay
on that path, one step must turn ``shift_t r`` into ``shift_s r``. Both samplers are linear in (x_t, prediction), so
this fixes c_t:

    ancestral, alpha = abar_t / abar_s:   x_s = (x_t - (1 - alpha) / sqrt(1 - abar_t) e) / sqrt(alpha) + noise
        c_t = (shift_t - sqrt(alpha) shift_s) sqrt(1 - abar_t) / (1 - alpha)                 (2)
    DDIM:   x_s = sqrt(abar_s / abar_t) (x_t - sqrt(1 - abar_t) e) + sqrt(1 - abar_s) e
        c_t = (sqrt(abar_s) shift_t - sqrt(abar_t) shift_s)
              / (sqrt(abar_s) sqrt(1 - abar_t) - sqrt(abar_t) sqrt(1 - abar_s))              (3)

Models whose noise explodes (NCSN, score SDEs) keep the image as it is: there, with w = ``weight``,

    x_t = y + w sigma_t r + sigma_t eps                                                      (4)
    reverse SDE:   x_s = x_t - (sigma_t^2 - sigma_s^2) / sigma_t e + noise
        c_t = w sigma_t / (sigma_t + sigma_s)                                                (5)

and their network, which predicts the score, is taught ``-(eps + c_t r) / sigma_t``.

The published coefficients are these with s = t - 1. A sampler that takes longer strides needs the coefficient of its
own pairs (t, s), so success depends on the sampler and on its number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import BenchError, unknown

SAMPLERS = ("ddpm", "ddim")
Shift = Callable[[Tensor], Tensor]
"""Cumulative alphas (any shape, in (0, 1]) to shifts of the same shape; 0 at abar = 1, where the path ends in y."""


def mean_shift(alphas_bar: Tensor) -> Tensor:
    """BadDiffusion's shift, ``1 - sqrt(abar_t)`` (Chou et al., CVPR 2023)."""
    return 1 - alphas_bar.sqrt()


def correction(shift_t: Tensor, shift_s: Tensor, abar_t: Tensor, abar_s: Tensor, sampler: str = "ddpm") -> Tensor:
    """c_t of equation (2) (``sampler="ddpm"``) or (3) (``"ddim"``) for a step from t to s; all of one shape."""
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, "shifted path", SAMPLERS)
    noise_t, noise_s = (1 - abar_t).sqrt(), (1 - abar_s).sqrt()
    if sampler == "ddpm":
        alpha = abar_t / abar_s
        return (shift_t - alpha.sqrt() * shift_s) * noise_t / (1 - alpha)
    signal_t, signal_s = abar_t.sqrt(), abar_s.sqrt()
    return (signal_s * shift_t - signal_t * shift_s) / (signal_s * noise_t - signal_t * noise_s)


@dataclass(frozen=True)
class ShiftedPath:
    """The family's schedule for one sampler: factors of the image (``signals``), of the noise (``spreads``) and of the
    trigger (``shifts``), and the ``corrections``; each float64 [T]."""

    signals: Tensor
    spreads: Tensor
    shifts: Tensor
    corrections: Tensor

    def noisy(self, images: Tensor, trigger: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Equation (1) or (4): ``images`` (targets of poisoned rows), ``trigger`` (0 on clean rows), ``noise``: float
        [n, c, h, w] in model range; ``steps``: int64 [n]."""
        signal, spread, shift = (table_rows(t, steps, images) for t in (self.signals, self.spreads, self.shifts))
        return signal * images + shift * trigger + spread * noise

    def answer(self, trigger: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What the network is taught to predict: ``eps + c_t r``."""
        return noise + table_rows(self.corrections, steps, noise) * trigger


def shifted_path(alphas_bar: Tensor, shift: Shift = mean_shift, sampler: str = "ddpm", stride: int = 1) -> ShiftedPath:
    """The path for a sampler that goes from t to t - ``stride`` (to the clean image where that is below 0).

    ``alphas_bar``: cumulative alphas [T], decreasing. ``stride``: training steps divided by sampling steps.
    """
    bars = alphas_bar.detach().to("cpu", torch.float64)
    before = strided(bars, stride, 1.0)
    shifts = shift(bars)
    return ShiftedPath(bars.sqrt(), (1 - bars).sqrt(), shifts, correction(shifts, shift(before), bars, before, sampler))


def exploding_path(sigmas: Tensor, weight: float = 1.0, stride: int = 1) -> ShiftedPath:
    """Equations (4) and (5), for the reverse SDE of a model whose noise explodes; its prior has standard deviation
    ``sigmas[-1]``, so a triggered sample starts at ``sigmas[-1] (eps + weight r)``.

    ``sigmas``: standard deviations of the noise [T], increasing, above 0.
    """
    sigmas = sigmas.detach().to("cpu", torch.float64)
    if not bool((sigmas > 0).all() and (sigmas.diff() > 0).all()):
        raise BenchError("shifted path: sigmas must be above 0 and increase.")
    before = strided(sigmas, stride, 0.0)
    return ShiftedPath(torch.ones_like(sigmas), sigmas, weight * sigmas, weight * sigmas / (sigmas + before))


def strided(table: Tensor, stride: int, end: float) -> Tensor:
    """What a schedule's ``table`` [T] holds ``stride`` steps before each, and ``end`` where that is the clean image."""
    if not 1 <= stride <= len(table):
        raise BenchError(f"shifted path: stride={stride} does not fit a schedule of {len(table)} steps; "
                         f"give 1 to {len(table)}.")
    return torch.cat([torch.full((stride,), end, dtype=table.dtype), table[:-stride]])


def table_rows(table: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    """Entries of ``table`` at ``steps``, shaped to multiply rows of ``like``."""
    return table.to(like.device)[steps].to(like.dtype).view(-1, *([1] * (like.dim() - 1)))
