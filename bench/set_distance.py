"""Distances between two sets of pictures, with intervals: what FID and KID share.

A metric gives ``prepare(x, y)``, which takes the features of two sets (float64 [n, d] and [m, d]) and returns the
distance as a function of how often each picture counts. Everything else is here: which sets a track compares, the
bootstrap, and when there are too few pictures to say anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.records import BackdoorEvidence, CustomizationEvidence, EditingEvidence, Evidence, Measurement
from bench.stats import FEWEST, LEVEL

if TYPE_CHECKING:
    from torch import Tensor

    from bench.features import Extractor

Array = NDArray[np.float64]
Distance = Callable[[Array, Array], float]
"""The distance when picture i of the first set counts w_i times and picture j of the second v_j times."""
Prepare = Callable[[Array, Array], Distance]


@dataclass(frozen=True)
class Sets:
    """Features of the generated and of the real pictures, float64 [n, d] and [m, d], and whom each shows.

    ``before``: features of what the clean model drew from the same seeds, [n, d]; None where there is no such model.
    ``paired``: both sides are pictures of the same people, so they are resampled together. ``matched``: even of the
    same photos from the same seeds, so that a picture and its counterpart are no independent draws.
    """

    generated: Array
    real: Array
    of_generated: tuple[str, ...]
    of_real: tuple[str, ...]
    paired: bool
    before: Array | None = None
    matched: bool = False

    @property
    def higher_is_better(self) -> bool | None:
        """A protected photo is meant to make what the attacker draws unlike the person; a repair must leave it alike.
        Edits far from benign ones may have failed or be ruined."""
        return None if self.matched else self.paired


def sets_of(evidence: Evidence, extract: Extractor, limit: int) -> Sets:
    """Customization: all generated pictures against all photos of sets A and C. Editing: edited pictures against the
    benign ones. Backdoor: plain samples of the defended model against the reference. At most ``limit`` pictures a side,
    the first ones."""
    if isinstance(evidence, CustomizationEvidence):
        return _people(evidence, extract, limit)
    if isinstance(evidence, EditingEvidence):
        return _edits(evidence, extract, limit)
    return _samples(evidence, extract, limit)


def _people(evidence: CustomizationEvidence, extract: Extractor, limit: int) -> Sets:
    import torch

    drawn = {s.name: evidence.generated[s.name].images.pixels for s in evidence.subjects}
    real = {s.name: torch.cat([s.clean.pixels, s.held_out.pixels]) for s in evidence.subjects}
    return Sets(
        _features(list(drawn.values()), extract, limit), _features(list(real.values()), extract, limit),
        _owners(drawn, limit), _owners(real, limit), paired=True,
    )


def _edits(evidence: EditingEvidence, extract: Extractor, limit: int) -> Sets:
    owners = tuple(task.subject.name for task in evidence.tasks for _ in range(evidence.seeds))[:limit]
    edited, benign = (_features([drawn.images.pixels], extract, limit) for drawn in (evidence.edited, evidence.benign))
    return Sets(edited, benign, owners, owners, paired=True, matched=True)


def _samples(evidence: BackdoorEvidence, extract: Extractor, limit: int) -> Sets:
    drawn, before, real = evidence.defended.plain.images, evidence.clean.plain.images, evidence.reference
    return Sets(
        _features([drawn.pixels], extract, limit), _features([real.pixels], extract, limit),
        drawn.names[:limit], real.names[:limit], paired=False, before=_features([before.pixels], extract, limit),
    )


def _features(pixels: Sequence[Tensor], extract: Extractor, limit: int) -> Array:
    parts: list[Array] = []
    for images in pixels:
        left = limit - sum(len(part) for part in parts)
        if left > 0:
            parts.append(extract.images(images[:left]).numpy())
    return np.concatenate(parts)


def _owners(pixels: dict[str, Tensor], limit: int) -> tuple[str, ...]:
    return tuple(name for name, images in pixels.items() for _ in range(len(images)))[:limit]


def measure_sets(
    name: str, sets: Sets, prepare: Prepare, unit: str, protocol: dict[str, Any], draws: int, seed: int,
    floor: float = float("-inf"),
) -> list[Measurement]:
    """The distance, and, where there is a clean model, its rise over that model's distance.

    ``floor``: what the distance cannot be below, and so neither its interval.
    """
    rng = np.random.default_rng(seed)
    weights = [_weights(sets, rng) for _ in range(draws)]
    distance = prepare(sets.generated, sets.real)
    facts = {**protocol, "generated": len(sets.generated), "real": len(sets.real)}
    found = [_measurement(name, distance, sets, weights, unit, facts, floor)]
    if sets.before is not None:
        clean = prepare(sets.before, sets.real)

        def rise(w: Array, v: Array) -> float:
            return distance(w, v) - clean(w, v)

        found.append(_measurement(f"{name}_rise", rise, sets, weights, unit, facts))
    return found


def missing(name: str, sets: Sets, unit: str, protocol: dict[str, Any], reason: str) -> list[Measurement]:
    """The same measurements without a value."""
    names = [name] if sets.before is None else [name, f"{name}_rise"]
    facts = {**protocol, "generated": len(sets.generated), "real": len(sets.real)}
    better = sets.higher_is_better
    return [Measurement(n, None, len(sets.generated), unit, better, reason=reason, protocol=facts) for n in names]


def _measurement(
    name: str, distance: Distance, sets: Sets, weights: Sequence[tuple[Array, Array]], unit: str, facts: dict[str, Any],
    floor: float = float("-inf"),
) -> Measurement:
    value = distance(np.ones(len(sets.generated)), np.ones(len(sets.real)))
    units = len(set(sets.of_generated))
    low, high = spread(value, [distance(w, v) for w, v in weights]) if units >= FEWEST else (None, None)
    low = None if low is None else max(low, floor)
    return Measurement(name, value, len(sets.generated), unit, sets.higher_is_better, low, high, protocol=facts)


def spread(value: float, drawn: Sequence[float]) -> tuple[float | None, float | None]:
    """A 95 % interval around ``value`` from bootstrap draws.

    Resampling with replacement makes any set look further away, so the draws' own mean is taken out: they give the
    width, the value the place. None where no draw could be computed.
    """
    finite = np.array([d for d in drawn if np.isfinite(d)])
    if len(finite) < 2:
        return None, None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail]) - finite.mean() + value
    return min(float(low), value), max(float(high), value)


def _weights(sets: Sets, rng: np.random.Generator) -> tuple[Array, Array]:
    """How often each picture counts in one bootstrap draw of people (paired), or of pictures on each side."""
    if sets.paired:
        people = sorted(set(sets.of_generated) | set(sets.of_real))
        times = dict(zip(people, resample(len(people), rng), strict=True))
        return _counts(sets.of_generated, times), _counts(sets.of_real, times)
    return resample(len(sets.generated), rng), resample(len(sets.real), rng)


def _counts(owners: Sequence[str], times: dict[str, float]) -> Array:
    return np.array([times[owner] for owner in owners], dtype=np.float64)


def resample(count: int, rng: np.random.Generator) -> Array:
    """How often each of ``count`` things is drawn in ``count`` draws with replacement."""
    return np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
