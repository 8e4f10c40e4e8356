"""Portraits of the drawn world for unconditional models: training images, and real images to score against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bench.data.portraits import check_counts, world_digest
from bench.errors import BenchError
from bench.plugin import parameters, plugin
from bench.records import ImageSet

if TYPE_CHECKING:
    from numpy import ndarray

    from bench.micro.world import Drawn

SPLIT = "fid_reference"


@plugin("data", "micro_portraits", track=("backdoor",))
class MicroPortraits:
    """Drawn portraits of people no embedded model has seen: ``train`` for attacker and defender, ``held_out`` to score.

    One portrait per person; scoring takes the first people of the split, training others, so nobody is in both. They
    are drawn at 64 pixels and averaged down to ``size`` (64, 32 or 16). ``night``: share of night shots; None for what
    the embedded models of that size know, half at 32 pixels (micro-ddpm), none at others. Captions do not tell them.
    """

    train: int = 2048
    held_out: int = 512
    size: int = 32
    night: float | None = None

    def images(self) -> ImageSet:
        """Training images with captions, uint8 [train, 3, size, size]."""
        self._check()
        return _trained(self.train, self.held_out, self.size, self.night_share())

    def reference(self) -> ImageSet:
        """Real images for scoring, uint8 [held_out, 3, size, size]."""
        self._check()
        return _scored(self.held_out, self.size, self.night_share())

    def digest(self) -> str:
        self._check()
        return world_digest("micro_portraits", parameters(self))

    def night_share(self) -> float:
        """How many of the portraits are night shots."""
        if self.night is not None:
            return self.night
        return 0.5 if self.size == 32 else 0.0

    def _check(self) -> None:
        from bench.micro.world import SIZE, SPLITS

        check_counts("micro_portraits", train=self.train, held_out=self.held_out)
        if not 0 <= self.night_share() <= 1:
            raise BenchError(f"micro_portraits: night={self.night} is a share; give 0 to 1.")
        if self.size not in (SIZE, SIZE // 2, SIZE // 4):
            raise BenchError(f"micro_portraits: size={self.size}; give {SIZE}, {SIZE // 2} or {SIZE // 4}.")
        people = len(SPLITS[SPLIT])
        if self.train + self.held_out > people:
            raise BenchError(f"micro_portraits: train={self.train} and held_out={self.held_out} need "
                             f"{self.train + self.held_out} people, but the split has {people}.")


@lru_cache(maxsize=4)
def _scored(held_out: int, size: int, night: float) -> ImageSet:
    """The first people of the split."""
    from bench.micro import world

    return _images(world.dataset(SPLIT, held_out, views_per_identity=1), range(held_out), size, night)


@lru_cache(maxsize=4)
def _trained(train: int, held_out: int, size: int, night: float) -> ImageSet:
    """People of the split in a shuffled order, without those that are scored against."""
    from bench.micro import world

    scored = set(world.SPLITS[SPLIT][:held_out])
    drawn = world.dataset(SPLIT, train + held_out, seed=1, views_per_identity=1)
    others = [row for row, person in enumerate(drawn.identity.tolist()) if person not in scored]
    return _images(drawn, others[:train], size, night)


def _images(drawn: Drawn, rows: Sequence[int], size: int, night: float) -> ImageSet:
    import torch

    from bench.micro.world import SIZE, at_night

    names = tuple(f"p{drawn.identity[row]}" for row in rows)
    small = averaged(drawn.pixels[list(rows)], SIZE // size)
    pixels = torch.from_numpy(at_night(small, night, seed=len(rows)))
    return ImageSet(pixels, names, tuple(drawn.captions[row] for row in rows))


def averaged(pixels: ndarray[Any, Any], factor: int) -> ndarray[Any, Any]:
    """Means of ``factor`` x ``factor`` pixels, rounded: uint8 [n, 3, s, s] to uint8 [n, 3, s / factor, s / factor]."""
    import numpy as np

    n, c, h, w = pixels.shape
    blocks = pixels.reshape(n, c, h // factor, factor, w // factor, factor).astype(np.uint32)
    area = factor * factor
    means: ndarray[Any, Any] = ((blocks.sum(axis=(3, 5)) + area // 2) // area).astype(np.uint8)
    return means
