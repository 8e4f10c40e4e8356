"""Which timesteps are worth perturbing a photo at: greedy selection of time intervals by the size of pixel gradients.

Wang et al., "SimAC: A simple anti-customization method for protecting face privacy against text-to-image synthesis of
diffusion models", CVPR 2024 (arXiv:2312.07865), adaptive greedy time interval selection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.diffusion.projected_gradient import ascend
from bench.diffusion.surrogates import Draws, denoising_losses, draw, pixel_gradient


@dataclass(frozen=True)
class Search:
    """``tries`` timesteps are compared a round; those within ``radius`` of the worst are dropped; it ends when at most
    ``keep`` are left, or after ``rounds`` rounds. Radius and keep are meant for a chain of 1000 steps."""

    rounds: int = 50
    tries: int = 5
    radius: int = 20
    keep: int = 100


@dataclass(frozen=True)
class Setting:
    """Where the search runs: frozen networks, prompt states [1, length, width], step and budget in 0-255 levels, and
    ``batch`` photos a pass."""

    vae: Any
    unet: Any
    scheduler: Any
    states: Tensor
    alpha_255: float
    eps: float
    batch: int

    def gradient(self, x: Tensor, draws: Draws) -> Tensor:
        """d/dx of each photo's L_ldm."""
        losses = denoising_losses(self.vae, self.unet, self.scheduler, self.states, draws)
        return pixel_gradient(x, losses, self.batch)


def select_intervals(search: Search, setting: Setting, x: Tensor, generator: torch.Generator) -> Tensor:
    """The timesteps that each of n photos keeps, bool [n, T]; every photo keeps at least one.

    A round on a photo: draw ``tries`` of its timesteps; score each by sum |grad_x L_ldm|; drop the worst's
    neighbourhood; take one projected gradient step at the best. The steps only guide the search; ``x`` stays.
    """
    kept = torch.ones(len(x), setting.scheduler.config.num_train_timesteps, dtype=torch.bool)
    moved = x.clone()
    for _ in range(search.rounds):
        open_ = (kept.sum(1) > search.keep).nonzero().flatten()
        if len(open_) == 0:
            break
        best, worst = compare(search.tries, setting, moved[open_], kept[open_], generator)
        kept[open_] = without(kept[open_], worst, search.radius)
        draws = replace(draw_at(setting, moved[open_], generator), timesteps=best)
        gradient = setting.gradient(moved[open_], draws)
        moved[open_] = ascend(moved[open_], x[open_], gradient, setting.alpha_255, setting.eps)
    return kept


def compare(
    tries: int, setting: Setting, x: Tensor, kept: Tensor, generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The timesteps with the largest and the smallest gradient among a few drawn for each photo, int64 [n] twice."""
    times, scores = [], []
    for _ in range(tries):
        times.append(pick(kept, generator))
        gradient = setting.gradient(x, replace(draw_at(setting, x, generator), timesteps=times[-1]))
        scores.append(gradient.abs().flatten(1).sum(1).cpu())
    drawn, score = torch.stack(times), torch.stack(scores)
    return drawn.gather(0, score.argmax(0)[None])[0], drawn.gather(0, score.argmin(0)[None])[0]


def draw_at(setting: Setting, x: Tensor, generator: torch.Generator) -> Draws:
    """Fresh noise; the timesteps in it are to be replaced."""
    return draw(setting.vae, setting.scheduler, x, generator)


def without(kept: Tensor, worst: Tensor, radius: int) -> Tensor:
    """``kept`` less [c - radius, c + radius), c being ``worst`` moved inside the chain by ``radius``: bool [n, T].

    A photo that would be left with nothing keeps what it had.
    """
    total = kept.shape[1]
    centre = worst.clamp(radius, max(radius, total - radius))[:, None]
    places = torch.arange(total)[None]
    left = kept & ~((places >= centre - radius) & (places < centre + radius))
    return torch.where(left.any(1, keepdim=True), left, kept)


def pick(kept: Tensor, generator: torch.Generator) -> Tensor:
    """One of each photo's timesteps, uniformly: int64 [n], on the CPU."""
    return torch.multinomial(kept.float(), 1, generator=generator)[:, 0]
