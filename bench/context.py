"""What a stage hands to the method that it runs: a device, a folder, progress, and randomness of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``; engines draw a bar with an ETA from it, tests ignore it."""


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


class Codec(Protocol[T]):
    """How a stage's value becomes files and back."""

    def save(self, value: T, folder: Path) -> None: ...
    def load(self, folder: Path) -> T: ...


class Share(Protocol):
    """A stage inside a stage: something that several methods need alike, built once and stored."""

    def __call__(
        self, name: str, version: int, inputs: Mapping[str, Any], build: Callable[[Context], T], codec: Codec[T],
    ) -> T: ...


@dataclass(frozen=True)
class Context:
    """``key``: the source of all of a stage's randomness. ``folder``: where the artefact is being built; a method
    writes new weights there. ``device``: a torch device name. ``store``: shares what methods need alike."""

    key: str
    folder: Path
    device: str = "cpu"
    progress: Progress = no_progress
    store: Share | None = None

    def share(
        self, name: str, version: int, inputs: Mapping[str, Any], build: Callable[[Context], T], codec: Codec[T],
    ) -> T:
        """Say, the class images of a model: from the store, built now if nobody has; without a store, built here.

        Its randomness comes from ``name`` and ``inputs`` alone, so every method that shares it sees the same.
        """
        if self.store is not None:
            return self.store(name, version, inputs, build, codec)
        from bench.identity import digest

        own = digest({"stage": name, "version": version, "inputs": inputs})
        return build(Context(own, self.folder, self.device, self.progress))

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
