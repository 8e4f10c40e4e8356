"""What a stage hands to the method that it runs: a device, a folder, progress, and randomness of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``; engines draw a bar with an ETA from it, tests ignore it."""


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Context:
    """``key``: the stage's content key, the source of all its randomness. ``folder``: where the artefact is being
    built; a method writes new weights there. ``device``: a torch device name."""

    key: str
    folder: Path
    device: str = "cpu"
    progress: Progress = no_progress

    def seed(self, *names: str | int) -> int:
        """A 63-bit seed that depends on the stage's key and on ``names`` only."""
        text = "/".join([self.key, *map(str, names)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *names: str | int) -> torch.Generator:
        """A CPU generator of its own for ``names`` (say, a subject), so that order and batching change nothing."""
        import torch

        return torch.Generator("cpu").manual_seed(self.seed(*names))

    def track(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Yield ``items`` while reporting progress."""
        for done, item in enumerate(items):
            self.progress(what, done, total)
            yield item
        self.progress(what, total, total)
