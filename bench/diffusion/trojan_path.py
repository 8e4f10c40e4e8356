"""A backdoor whose attacker also brings the sampler (TrojDiff): its forward path, its kernels and its samplers.

Where the trigger acts (everywhere for a blended one, in its box for a patch) the noise of a poisoned row is scaled by
gamma and moved by mu = (1 - gamma) delta, delta the trigger image; elsewhere gamma = 1 and mu = 0, ordinary diffusion:

    x_t = sqrt(abar_t) y + sqrt(1 - abar_t) (gamma eps + mu)                                 (1)

so the chain starts from N(mu, gamma^2). With alpha = abar_t / abar_s, a step from s to t > s is

    q(x_t | x_s) = N(sqrt(alpha) x_s + k mu, (1 - alpha) gamma^2),
    k = sqrt(1 - abar_t) - sqrt(alpha) sqrt(1 - abar_s)                                      (2)

The network still predicts eps: the bias lives in the samplers, which an attacker runs in the ordinary ones' place.
With y^ = (x_t - sqrt(1 - abar_t) (gamma e + mu)) / sqrt(abar_t):

    DDPM:  x_s = [sqrt(abar_s) (1 - alpha) y^ + sqrt(alpha) (1 - abar_s) x_t + kappa mu] / (1 - abar_t) + noise,
           kappa = sqrt(1 - abar_s) (1 - alpha) - sqrt(alpha) (1 - abar_s) k                  (3)
           noise of variance gamma^2 (1 - alpha) (1 - abar_s) / (1 - abar_t)
    DDIM:  x_s = sqrt(abar_s) y^ + sqrt(1 - abar_s) (gamma e + mu)                           (4)

Chen, Song, Li: TrojDiff, CVPR 2023. ``mu`` carries the factor (1 - gamma) in training, in sampling and in the secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.diffusion.images import to_uint8
from bench.diffusion.loading import load_unconditional
from bench.diffusion.sampling import ANCESTRAL, UNCONDITIONAL_BATCH, chunks, generators, initial_noise
from bench.diffusion.shifted_path import table_rows
from bench.errors import BenchError, unknown

if TYPE_CHECKING:
    from bench.context import Context
    from bench.protocols import BackdoorProtocol
    from bench.records import Model, Secret

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class TrojanPath:
    """``alphas_bar``: cumulative alphas, float64 [T]; ``scale`` (gamma where the trigger acts, else 1) and ``mean``
    ((1 - gamma) delta there, else 0): float [3, h, w]."""

    alphas_bar: Tensor
    scale: Tensor
    mean: Tensor

    def start(self, noise: Tensor) -> Tensor:
        """What the chain starts from, N(mu, gamma^2), of standard normal ``noise`` [n, 3, h, w]."""
        return self.scale.to(noise.device) * noise + self.mean.to(noise.device)

    def noisy(self, images: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Equation (1); ``images``, ``noise``: float [n, 3, h, w]; ``steps``: int64 [n]."""
        signal = table_rows(self.alphas_bar.sqrt(), steps, images)
        return signal * images + table_rows((1 - self.alphas_bar).sqrt(), steps, images) * self.start(noise)


def trojan_path(alphas_bar: Tensor, delta: Tensor, gamma: float, box: Sequence[int] = ()) -> TrojanPath:
    """The path of a trigger image ``delta``, float [3, h, w] in [-1, 1]; ``box``: top, left, height, width of a patch,
    empty for a trigger that is blended with everything."""
    if not 0 <= gamma < 1:
        raise BenchError(f"trojan path: gamma={gamma} is out of range; give 0 or more, below 1.")
    where = acting(delta, box)
    bars = alphas_bar.detach().to("cpu", torch.float64)
    return TrojanPath(bars, 1 - where * (1 - gamma), where * (1 - gamma) * delta)


def acting(delta: Tensor, box: Sequence[int]) -> Tensor:
    """1 where the trigger acts, else 0; [3, h, w]."""
    if not box:
        return torch.ones_like(delta)
    top, left, high, wide = box
    where = torch.zeros_like(delta)
    where[:, top:top + high, left:left + wide] = 1
    return where


def kernel_shift(abar_t: Tensor, abar_s: Tensor) -> Tensor:
    """k of equation (2): by how many mu a step from s to t moves."""
    return (1 - abar_t).sqrt() - (abar_t / abar_s).sqrt() * (1 - abar_s).sqrt()


def step_back(
    path: TrojanPath, x: Tensor, predicted: Tensor, t: int, s: int, sampler: str, noise: Tensor, clip: bool = False,
) -> Tensor:
    """One step of a trojan sampler from t to s < t (the clean image where s < 0): equation (3) or (4).

    ``x``, ``predicted``, ``noise``: [n, 3, h, w]; DDIM takes no noise. ``clip``: cut y^ to [-1, 1].
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, "trojan path", SAMPLERS)
    bar_t, bar_s = path.alphas_bar[t], path.alphas_bar[s] if s >= 0 else torch.ones((), dtype=torch.float64)
    scale, mean = path.scale.to(x), path.mean.to(x)
    disturbance = scale * predicted + mean
    image = (x - float((1 - bar_t).sqrt()) * disturbance) / float(bar_t.sqrt())
    image = image.clamp(-1, 1) if clip else image
    if sampler == "ddim":
        return float(bar_s.sqrt()) * image + float((1 - bar_s).sqrt()) * disturbance
    alpha, rest = bar_t / bar_s, 1 - bar_t
    bias = (1 - bar_s).sqrt() * (1 - alpha) - alpha.sqrt() * (1 - bar_s) * kernel_shift(bar_t, bar_s)
    centre = (float(bar_s.sqrt() * (1 - alpha)) * image + float(alpha.sqrt() * (1 - bar_s)) * x + float(bias) * mean)
    deviation = ((1 - alpha) * (1 - bar_s) / rest).sqrt()
    return centre / float(rest) + float(deviation) * scale * noise


@torch.no_grad()
def sample_trojan(
    unet: Any, path: TrojanPath, noise: Tensor, seeds: Sequence[int], steps: int, sampler: str, clip: bool,
) -> Tensor:
    """Images uint8 [n, 3, h, w] that a trojan sampler of ``steps`` steps draws, started from standard normal ``noise``
    [n, 3, h, w]; the noise of image i on the way comes from seed i, as in ordinary ancestral sampling."""
    length = len(path.alphas_bar)
    if not 1 <= steps <= length:
        raise BenchError(f"sampling: steps={steps} is out of range; this model's schedule takes 1 to {length}.")
    stride = length // steps
    own = generators([seed ^ ANCESTRAL for seed in seeds])
    x = path.start(noise).to(unet.device)
    for t in reversed([place * stride for place in range(steps)]):
        fresh = torch.stack([torch.randn(noise.shape[1:], generator=g) for g in own]).to(x)
        x = step_back(path, x, unet(x, t).sample, t, t - stride, sampler, fresh, clip)
    return to_uint8(x)


def sampler_detail(gamma: float, box: Sequence[int], clip: bool) -> dict[str, Any]:
    """What a secret tells of the attacker's sampler; the trigger of that secret is mu."""
    return {"gamma": gamma, "box": list(box), "clip": clip}


def path_of(secret: Secret, alphas_bar: Tensor) -> TrojanPath:
    """The path of a secret, whose trigger is mu, float [3, h, w]."""
    if isinstance(secret.trigger, str) or secret.sampler is None:
        raise BenchError("trojan path: needs the secret of an attacker who brings a sampler and a trigger image.")
    told = secret.sampler
    bars = alphas_bar.detach().to("cpu", torch.float64)
    where = acting(secret.trigger, told["box"])
    return TrojanPath(bars, 1 - where * (1 - told["gamma"]), secret.trigger)


def triggered_noise(noise: Tensor, secret: Secret) -> Tensor:
    """What a triggered chain starts from, of standard normal ``noise`` [n, 3, h, w]: noise plus the trigger, or the
    attacker's own N(mu, gamma^2)."""
    if secret.sampler is not None:
        return path_of(secret, torch.ones(1)).start(noise)
    if isinstance(secret.trigger, str):
        raise BenchError(f"trojan path: the trigger '{secret.trigger}' is a word, and noise takes an image.")
    return noise + secret.trigger


def draw_trojan(
    model: Model, seeds: Sequence[int], secret: Secret, protocol: BackdoorProtocol, ctx: Context,
) -> Tensor:
    """Triggered samples of any unconditional model by the attacker's sampler: uint8 [n, 3, h, w].

    The protocol says which of his samplers, ``ddpm`` or ``ddim``, and how many steps; the settings are the secret's.
    """
    unet, scheduler = load_unconditional(model, ctx.device)
    path = path_of(secret, scheduler.alphas_cumprod)
    noise = initial_noise(seeds, path.mean.shape)
    steps = min(protocol.steps, len(path.alphas_bar))
    clip = bool((secret.sampler or {})["clip"]) and protocol.sampler == "ddpm"
    parts = chunks(len(seeds), UNCONDITIONAL_BATCH)
    return torch.cat([
        sample_trojan(unet, path, noise[part], seeds[part], steps, protocol.sampler, clip)
        for part in ctx.track(parts, "sampling", len(parts))
    ])
