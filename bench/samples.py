"""The rows of a result by measurement, as columns: what boards of thousands of results are made of in seconds.

Results that scored the same samples share one object that says which these are, so that two of them are compared
without a look at any name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import cast

from bench.errors import BenchError
from bench.results import SAMPLES, Block, Result, SampleRow, blocks_of

KEPT = 4096
"""Sets of samples that are remembered."""


@dataclass(frozen=True, eq=False)
class Places:
    """Which samples: the cluster and the name of each."""

    clusters: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


@lru_cache(KEPT)
def places_of(clusters: tuple[str, ...], names: tuple[str, ...]) -> Places:
    """One object for equal ones."""
    return Places(clusters, names)


@dataclass(frozen=True, eq=False)
class Samples:
    """One measurement's values. ``reasons``: why those are missing that are, by their place."""

    metric: str
    places: Places
    values: tuple[float | None, ...]
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[SampleRow]:
        for place, value in enumerate(self.values):
            yield SampleRow(self.metric, self.places.names[place], self.places.clusters[place], value,
                            self.reasons.get(place, ""))

    @cached_property
    def known(self) -> tuple[float, ...]:
        if None not in self.values:
            return cast(tuple[float, ...], self.values)
        return tuple(value for value in self.values if value is not None)

    @cached_property
    def known_places(self) -> Places:
        """Those of the values that there are."""
        if len(self.known) == len(self.values):
            return self.places
        there = [place for place, value in enumerate(self.values) if value is not None]
        return places_of(tuple(self.places.clusters[i] for i in there), tuple(self.places.names[i] for i in there))

    @cached_property
    def missing(self) -> frozenset[str]:
        """The names of samples without a value."""
        return frozenset(name for name, value in zip(self.places.names, self.values, strict=True) if value is None)

    @cached_property
    def mean(self) -> float | None:
        return math.fsum(self.known) / len(self.known) if self.known else None


def read_samples(result: Result, folder: Path) -> dict[str, Samples]:
    """By measurement; raises BenchError when the rows are not those that were written with the result."""
    parts: dict[str, list[Block]] = {}
    for block in blocks_of(result, folder):
        for metric in block.values:
            parts.setdefault(metric, []).append(block)
    made, places = {}, dict[tuple[int, ...], Places]()
    try:
        for metric, of in parts.items():
            which = tuple(map(id, of))
            if which not in places:
                places[which] = places_in(of)
            made[metric] = joined(metric, of, places[which])
        return made
    except ValueError as error:
        raise BenchError(f"results: {folder / SAMPLES} holds a row that is not valid: {error}.") from error


def places_in(blocks: Sequence[Block]) -> Places:
    return places_of(tuple(chain.from_iterable([block.cluster] * len(block.samples) for block in blocks)),
                     tuple(chain.from_iterable(block.samples for block in blocks)))


def joined(metric: str, blocks: Sequence[Block], places: Places) -> Samples:
    """One measurement of all clusters."""
    values = tuple(chain.from_iterable(block.values[metric] for block in blocks))
    if any(len(block.values[metric]) != len(block.samples) for block in blocks):
        raise ValueError(f"{metric} has {len(values)} values of {len(places)} samples")
    reasons: dict[int, str] = {}
    start = 0
    for block in blocks:
        if metric in block.reasons:
            reasons.update({start + int(place): why for place, why in block.reasons[metric].items()})
        start += len(block.samples)
    return checked(Samples(metric, places, values, reasons))


def checked(samples: Samples) -> Samples:
    """Raises ValueError where a missing value has no reason."""
    for place, value in enumerate(samples.values) if None in samples.values else ():
        if value is None and not samples.reasons.get(place):
            raise ValueError(f"{samples.metric} of {samples.places.names[place]}: a missing value needs a reason")
    return samples


def of_rows(metric: str, rows: Iterable[SampleRow]) -> Samples:
    """As columns."""
    found = list(rows)
    return Samples(metric, places_of(tuple(row.cluster for row in found), tuple(row.sample for row in found)),
                   tuple(row.value for row in found), {i: row.reason for i, row in enumerate(found) if row.reason})
