"""From rows to one measurement: the mean, its interval, and a reason where there is no value.

Intervals are over clusters (subjects). A cell that holds one cluster only, the one implanted model of a backdoor
cell, can say nothing about other models: there the interval is over its samples, and the protocol says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bench.errors import BenchError
from bench.records import CustomizationEvidence, EditingEvidence, Evidence, ImageSet, Measurement, Row
from bench.stats import Point, mean_interval, wilson

Protected = CustomizationEvidence | EditingEvidence
"""Evidence of the tracks whose defenses protect photos."""


def require_photos(evidence: Evidence, metric: str) -> Protected:
    """The evidence of a cell that protects photos; raises BenchError in the name of ``metric`` for any other."""
    if isinstance(evidence, Protected):
        return evidence
    raise BenchError(f"{metric}: needs the evidence of a customization or of an editing cell.")


def require_edits(evidence: Evidence, metric: str) -> EditingEvidence:
    """The evidence of an editing cell; raises BenchError in the name of ``metric`` for any other."""
    if isinstance(evidence, EditingEvidence):
        return evidence
    raise BenchError(f"{metric}: needs the evidence of an editing cell.")


def photo_pairs(evidence: Protected, stage: Literal["protected", "purified"]) -> list[tuple[str, ImageSet, ImageSet]]:
    """Every person of a cell with the published photos as they were, and as they are after ``stage``."""
    if isinstance(evidence, CustomizationEvidence):
        after = evidence.protected if stage == "protected" else evidence.purified
        return [(subject.name, subject.published, after[subject.name]) for subject in evidence.subjects]
    photos = (evidence.protected if stage == "protected" else evidence.purified).pixels
    people = [task.subject for task in evidence.tasks]
    return [(person.name, person.published, ImageSet(photos[i:i + 1], person.published.names))
            for i, person in enumerate(people)]


def edit_rows(evidence: EditingEvidence, values: Sequence[float | None], reason: str = "") -> list[Row]:
    """One row per picture of a cell of edits, from the pictures' values; ``reason``: why those are missing that are."""
    people = [task.subject.name for task in evidence.tasks for _ in range(evidence.seeds)]
    return [Row(name, person, value, reason if value is None else "")
            for name, person, value in zip(evidence.edited.images.names, people, values, strict=True)]


def mean_of(
    name: str, rows: Sequence[Row], unit: str, better: bool | None, protocol: Mapping[str, Any],
    over_samples: bool = False,
) -> Measurement:
    """The mean over rows that have a value; the interval resamples clusters, or single rows if ``over_samples``."""
    points = [Point(r.sample if over_samples else r.cluster, r.sample, r.value) for r in rows if r.value is not None]
    if not points:
        return missing(name, rows, unit, better, _facts(protocol, over_samples), _why(rows))
    found = mean_interval(points, share=unit == "share")
    facts = _facts(protocol, over_samples)
    return Measurement(name, found.value, found.n, unit, better, found.low, found.high, "", facts, tuple(rows))


def share_of(
    name: str, rows: Sequence[Row], better: bool | None, protocol: Mapping[str, Any], reason: str = "",
) -> Measurement:
    """The share of rows that are 1 among those that have a value, with Wilson's interval over samples.

    ``reason``: why there is no value when no row has one.
    """
    values = [row.value for row in rows if row.value is not None]
    if not values:
        return missing(name, rows, "share", better, _facts(protocol, True), reason or _why(rows))
    hits = sum(value == 1.0 for value in values)
    low, high = wilson(hits, len(values))
    return Measurement(name, hits / len(values), len(values), "share", better, low, high, "", _facts(protocol, True),
                       tuple(rows))


def missing(
    name: str, rows: Sequence[Row], unit: str, better: bool | None, protocol: Mapping[str, Any], reason: str,
) -> Measurement:
    """A measurement without a value."""
    return Measurement(name, None, 0, unit, better, reason=reason, protocol=dict(protocol), rows=tuple(rows))


def _facts(protocol: Mapping[str, Any], over_samples: bool) -> dict[str, Any]:
    return {**protocol, "interval": "over samples" if over_samples else "over clusters"}


def _why(rows: Sequence[Row]) -> str:
    """The rows' own reasons, each once."""
    return "; ".join(dict.fromkeys(row.reason for row in rows if row.reason)) or "no samples"
