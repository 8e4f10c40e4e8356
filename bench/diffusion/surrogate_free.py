"""What protections without a surrogate share: the photos of several people side by side in one batch.

Nothing is learned about a person here, so people can share every pass through the networks. Each person's randomness
still comes from their own generator, drawn before the first photo is computed: company, order and batch size change a
result by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.diffusion.finetuning import check_photos
from bench.diffusion.images import levels, quantise_within, to_float
from bench.diffusion.losses import LatentDistribution, latent_distribution
from bench.diffusion.projected_gradient import project
from bench.diffusion.surrogates import Draws, draw
from bench.records import Budget, ImageSet, Model, Subject

if TYPE_CHECKING:
    from bench.context import Context


@dataclass(frozen=True)
class Crowd:
    """Photos of some people, one after the other. ``x``: [n, 3, h, w] in [-1, 1]; ``counts``: photos of each person;
    ``generators``: each person's own; ``subjects``: the people."""

    x: Tensor
    counts: tuple[int, ...]
    generators: tuple[torch.Generator, ...]
    subjects: tuple[Subject, ...] = ()

    def uniform(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        """[n, *shape] numbers in [low, high), each person's from their own generator."""
        drawn = [torch.rand((count, *shape), generator=generator)
                 for count, generator in zip(self.counts, self.generators)]
        return torch.cat(drawn).to(self.x) * (high - low) + low

    def start(self, eps: float, random: bool) -> Tensor:
        """Where the steps begin: the photos, or a uniformly random point within ``eps`` levels of them."""
        if not random:
            return self.x
        radius = levels(eps)
        return project(self.x + self.uniform(self.x.shape[1:], -radius, radius), self.x, eps)

    def draw(self, vae: Any, scheduler: Any) -> Draws:
        """One round's posterior noise, noise and timestep of every photo."""
        people = torch.split(self.x, list(self.counts))
        parts = [draw(vae, scheduler, x, generator) for x, generator in zip(people, self.generators)]
        return Draws(*(torch.cat([getattr(part, name) for part in parts])
                       for name in ("posterior", "noise", "timesteps")))


def protect_crowds(
    subjects: Sequence[Subject], budget: Budget, model: Model, ctx: Context, what: str, batch: int,
    perturb: Callable[[Crowd], Tensor],
) -> list[ImageSet]:
    """Set B of each subject after ``perturb(crowd)``: photos in [-1, 1] in, photos within the budget out.

    ``batch``: subjects are gathered until their photos fill it.
    """
    for subject in subjects:
        check_photos(subject.published, model, f"defense {what}, {subject.name}")
    found: list[ImageSet] = []
    groups = list(gather(subjects, batch))
    for group in ctx.track(groups, what, len(groups)):
        perturbed = torch.split(perturb(crowd_of(group, ctx)), [len(s.published) for s in group])
        for subject, x in zip(group, perturbed):
            pixels = quantise_within(subject.published.pixels, x, budget)
            found.append(replace(subject.published, pixels=pixels))
    return found


def gather(subjects: Sequence[Subject], batch: int) -> Iterator[list[Subject]]:
    """Neighbours with photos of one size, as few as make ``batch`` photos."""
    group: list[Subject] = []
    for subject in subjects:
        if group and (_size(subject) != _size(group[0]) or sum(len(s.published) for s in group) >= batch):
            yield group
            group = []
        group.append(subject)
    if group:
        yield group


def _size(subject: Subject) -> tuple[int, ...]:
    return tuple(subject.published.pixels.shape[2:])


def crowd_of(subjects: Sequence[Subject], ctx: Context) -> Crowd:
    """The published photos of ``subjects`` on the device."""
    x = torch.cat([to_float(s.published.pixels) for s in subjects]).to(ctx.device)
    return Crowd(x, tuple(len(s.published) for s in subjects), tuple(ctx.generator(s.name) for s in subjects),
                 tuple(subjects))


@torch.no_grad()
def target_latents(vae: Any, picture: Tensor) -> Tensor:
    """Mean of the encoder's posterior of a picture uint8 [1, 3, h, w], scaled as all latents are: [1, c, h/8, w/8]."""
    found: LatentDistribution = latent_distribution(vae, to_float(picture).to(vae.device))
    return found.mean
