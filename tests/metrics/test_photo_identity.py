"""photo_identity: 1 for untouched photos, 0 where the face is gone, null where there never was one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.errors import BenchError
from bench.records import CustomizationEvidence, ImageSet, Measurement
from metrics.photo_identity import PhotoIdentity
from tests.metrics.edits import drawn, evidence, originals

SUBJECT = MicroSubjects(count=1, start=40).subjects()[0]


def measured(photos: ImageSet, original: ImageSet = SUBJECT.published) -> list[Measurement]:
    subject = replace(SUBJECT, published=original)
    evidence = CustomizationEvidence((subject,), {}, {subject.name: photos}, {}, None)
    return PhotoIdentity().measure(evidence, Context("key", Path(".")))


def test_untouched_photos_score_one_by_every_recogniser() -> None:
    found = measured(SUBJECT.published)
    assert [m.name for m in found] == ["photo_ism", "photo_ism@micro-face-1", "photo_ism@micro-face-2"]
    assert [m.value for m in found] == pytest.approx([1, 1, 1])
    assert {m.higher_is_better for m in found} == {False}


def test_a_photo_without_a_face_counts_zero_and_another_person_little() -> None:
    grey = replace(SUBJECT.published, pixels=torch.full_like(SUBJECT.published.pixels, 128))
    assert measured(grey)[0].value == 0
    other = MicroSubjects(count=1, start=41).subjects()[0].published
    assert abs(measured(other)[0].value or 0) < 0.6


def test_an_original_without_a_face_has_no_value_but_a_reason() -> None:
    grey = replace(SUBJECT.published, pixels=torch.full_like(SUBJECT.published.pixels, 128))
    found = measured(SUBJECT.published, grey)[0]
    assert found.value is None
    assert "no face was found in the original" in found.reason


def test_a_recogniser_named_twice_is_refused() -> None:
    with pytest.raises(BenchError, match="none twice"):
        PhotoIdentity(["micro-face-1", "micro-face-1"]).measure(
            CustomizationEvidence((), {}, {}, {}, None), Context("key", Path(".")))


def test_on_the_editing_track_photos_are_those_of_the_tasks() -> None:
    tasks = drawn(3)
    photos = torch.cat([one.subject.published.pixels for one in tasks])
    photos[1] = 128
    shown = evidence(tasks, originals(tasks), protected=photos)
    rows = PhotoIdentity().measure(shown, Context("key", Path(".")))[0].rows
    assert [row.value for row in rows] == pytest.approx([1, 0, 1])
    assert [row.cluster for row in rows] == [one.subject.name for one in tasks]
