"""Where a track gets its stages from: the store, with a note of every stage that a cell used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bench.context import Codec, Context, Progress, no_progress

if TYPE_CHECKING:
    from torch import Tensor

    from bench.records import Evidence
    from bench.store import Store, Stored

T = TypeVar("T")


@dataclass
class Workbench:
    """``used``: every stage the cell asked for, in order, with its cost and whether it was already there."""

    store: Store
    device: str = "cpu"
    progress: Progress = no_progress
    used: list[tuple[str, Stored[Any]]] = field(default_factory=list)

    def stage(
        self, name: str, version: int, inputs: Mapping[str, Any], build: Callable[[Context], T], codec: Codec[T],
        seeded_by: Mapping[str, Any],
    ) -> Stored[T]:
        """Get or build one stage.

        ``inputs``: everything that the result depends on. ``seeded_by``: the part of it that its randomness
        depends on: two defenses meet the same noise in the attack that follows, so that they can be compared
        pair by pair.
        """
        stored = self.store.stage(
            name, version, inputs, build, codec, device=self.device, progress=self.progress, seeded_by=seeded_by,
        )
        self.used.append((name, stored))
        return stored


@dataclass(frozen=True)
class Outcome:
    """What a track hands to the runner. ``inputs``: the keys that the evidence came from, hence the metrics' inputs.
    ``pictures``: a few strips for the reader, name -> uint8 [3, h, w]."""

    evidence: Evidence
    inputs: Mapping[str, Any]
    pictures: Mapping[str, Tensor]
