"""Portraits of the drawn world for unconditional models: training images, and real images to score against."""

from __future__ import annotations

from functools import lru_cache

from bench.data.portraits import check_counts, portraits, world_digest
from bench.plugin import parameters, plugin
from bench.records import ImageSet


@plugin("data", "micro_portraits", track=("backdoor",))
class MicroPortraits:
    """Drawn portraits of people no embedded model has seen: ``train`` for attacker and defender, ``held_out`` to score.

    The two halves of the split ``fid_reference`` serve them, so nobody appears in both. One view per person, then a
    second view of each, and so on.
    """

    train: int = 2048
    held_out: int = 512
    size: int = 32

    def images(self) -> ImageSet:
        """Training images with captions, uint8 [train, 3, size, size]."""
        self._check()
        return _half(1, self.train, self.size)

    def reference(self) -> ImageSet:
        """Real images for scoring, uint8 [held_out, 3, size, size]."""
        self._check()
        return _half(0, self.held_out, self.size)

    def digest(self) -> str:
        self._check()
        return world_digest("micro_portraits", parameters(self))

    def _check(self) -> None:
        check_counts("micro_portraits", train=self.train, held_out=self.held_out, size=self.size)


@lru_cache(maxsize=4)
def _half(half: int, count: int, size: int) -> ImageSet:
    from bench.micro.world import SPLITS

    people = SPLITS["fid_reference"]
    middle = len(people) // 2
    side = people[middle:] if half else people[:middle]
    rows = [(side[i % len(side)], (i // len(side),)) for i in range(count)]
    names = [f"{i:05d}" for i in range(count)]
    return portraits([person for person, _ in rows], [view for _, view in rows], names, size)
