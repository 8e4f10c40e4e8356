"""Everything that scores the editing track, together: names, order, rows and reasons fit on one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.config import fitting
from bench.context import Context
from bench.discovery import load
from bench.plugin import facts_of
from bench.records import Measurement
from bench.results import CellRecord, ModelRecord, measurement_record, plugin_record
from tests.metrics.edits import answers, drawn, evidence, noisy, originals
from tests.test_leaderboard import NOISE, record

METRICS = {"edit_success", "edit_shift", "edit_direction", "image_quality", "perceptual", "photo_identity",
           "no_reference_quality", "kid"}


def built_in() -> dict[str, Any]:
    """The metrics of the track that ship, in the order of a cell."""
    load()
    return {name: metric for name, metric in fitting({}, "editing")[0].items()
            if facts_of(metric).origin.startswith("metrics.")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measurement]]:
    """Edits of photos under noise, which came out noisy."""
    tasks = drawn(6)
    photos = noisy(originals(tasks, seeds=1), 8)
    shown = evidence(tasks, noisy(answers(tasks), 20), answers(tasks), protected=photos, eps=8)
    folder: Path = tmp_path_factory.mktemp("metrics")
    return {name: metric.measure(shown, Context("key", folder)) for name, metric in built_in().items()}


def test_the_tracks_metrics_lead_with_the_one_that_ranks(measured: dict[str, list[Measurement]]) -> None:
    assert set(measured) == METRICS and next(iter(measured)) == "edit_success"
    first = measured["edit_success"][0]
    assert (first.name, first.higher_is_better, first.unit) == ("edit_success", False, "share")
    assert [name for name, metric in built_in().items() if facts_of(metric).primary] == ["edit_success"]


def test_no_two_measurements_share_a_name(measured: dict[str, list[Measurement]]) -> None:
    names = [m.name for of in measured.values() for m in of]
    assert len(names) == len(set(names))


def test_every_value_and_reason_goes_on_record(measured: dict[str, list[Measurement]]) -> None:
    where = CellRecord(id="x", track="editing", model=ModelRecord(name="m", digest="d"), data=record("data", "faces"),
                       attack=record("attack", "edit"), defense=NOISE, seed=0)
    metrics = built_in()
    for name, of in measured.items():
        for m in of:
            kept = measurement_record(m, plugin_record(metrics[name]), where)
            assert kept.value is not None or kept.reason
            assert kept.clusters == (6 if m.rows and m.value is not None else 0)


def test_pictures_of_all_metrics_are_the_same_samples(measured: dict[str, list[Measurement]]) -> None:
    """So that boards can pair them: a picture has one name in every metric that scores pictures."""
    pictures = {m.name: tuple((row.sample, row.cluster) for row in m.rows)
                for name in ("edit_success", "edit_shift", "edit_direction", "no_reference_quality")
                for m in measured[name] if m.n == 12}
    assert len(set(pictures.values())) == 1 and {"edit_success", "edit_psnr", "edit_direction", "niqe"} <= set(pictures)
