"""No-reference quality: what it says of clean, noisy and flat pictures, and when it says nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.errors import BenchError
from bench.records import (
    BackdoorEvidence,
    CustomizationEvidence,
    EditTask,
    Generations,
    ImageSet,
    Measurement,
    Subject,
)
from metrics.quality import NoReferenceQuality, variation
from tests.metrics import edits

PEOPLE = tuple(MicroSubjects(count=4).subjects())


def measure(drawn: dict[str, Tensor], folder: Path, people: tuple[Subject, ...] = PEOPLE,
            metric: NoReferenceQuality | None = None) -> dict[str, Measurement]:
    published = {s.name: s.published for s in people}
    generated = {name: Generations(ImageSet(x, tuple(f"{i}" for i in range(len(x)))), ("",) * len(x),
                                   tuple(range(len(x)))) for name, x in drawn.items()}
    shown = CustomizationEvidence(people, published, published, generated, None)
    return {m.name: m for m in (metric or NoReferenceQuality()).measure(shown, Context("key", folder))}


def noisy(pixels: Tensor, levels: int) -> Tensor:
    signs = torch.randint(0, 2, pixels.shape, generator=torch.manual_seed(0)) * 2 - 1
    return (pixels.int() + levels * signs).clamp(0, 255).to(torch.uint8)


def photos(levels: int = 0) -> dict[str, Tensor]:
    return {s.name: noisy(s.published.pixels, levels) for s in PEOPLE}


def test_clean_pictures_score_as_the_photos_and_have_their_texture(tmp_path: Path) -> None:
    found = measure(photos(), tmp_path)
    assert found["niqe"].value == found["niqe_photos"].value
    assert found["total_variation"].value == pytest.approx(1, abs=0.3)
    assert all(m.higher_is_better is None and m.low is not None for m in found.values())


def test_ruined_pictures_are_far_from_the_photos(tmp_path: Path) -> None:
    found = measure(photos(24), tmp_path)
    niqe, usual = found["niqe"].value, found["niqe_photos"].value
    assert niqe is not None and usual is not None and niqe > 2 * usual
    assert found["total_variation"].value is not None and found["total_variation"].value > 2


def test_washed_out_pictures_lack_texture_and_are_far_too(tmp_path: Path) -> None:
    found = measure({s.name: torch.full((2, 3, 64, 64), 120, dtype=torch.uint8) for s in PEOPLE}, tmp_path)
    assert found["total_variation"].value == 0
    assert found["niqe"].value > 2 * found["niqe_photos"].value


def test_the_photos_that_are_compared_are_no_part_of_the_model(tmp_path: Path) -> None:
    """Another set B changes neither the model nor the score of the same pictures."""
    other = tuple(Subject(s.name, s.clean, ImageSet(noisy(s.published.pixels, 9), s.published.names), s.held_out)
                  for s in PEOPLE)
    one, two = measure(photos(), tmp_path), measure(photos(), tmp_path, other)
    assert one["niqe"].value == two["niqe"].value and one["niqe_photos"].value != two["niqe_photos"].value


def test_texture_is_relative_to_each_person(tmp_path: Path) -> None:
    """Pictures that are a person's own clean photos have exactly her texture on average, whoever she is."""
    own = {s.name: torch.cat([s.clean.pixels, s.held_out.pixels]) for s in PEOPLE}
    found = measure(own, tmp_path)["total_variation"]
    for person in PEOPLE:
        values = [r.value for r in found.rows if r.cluster == person.name]
        assert sum(values) / len(values) == pytest.approx(1)


def test_total_variation_counted_by_hand() -> None:
    pixels = torch.zeros(1, 3, 2, 3, dtype=torch.uint8)
    pixels[0, 0] = torch.tensor([[0, 10, 10], [0, 10, 250]])
    assert variation(pixels).tolist() == [10 + 0 + 10 + 240 + 0 + 0 + 240]


def test_the_protocol_states_patches_and_what_the_model_was_fitted_to(tmp_path: Path) -> None:
    facts = measure(photos(), tmp_path)["niqe"].protocol
    assert facts["patch"] == 16 and facts["clean_patches"] > 72 and "sets A and C" in facts["clean"]
    assert measure(photos(), tmp_path, metric=NoReferenceQuality(patch=24))["niqe"].protocol["patch"] == 24


def test_too_few_clean_photos_have_a_reason(tmp_path: Path) -> None:
    one = PEOPLE[0]
    few = Subject(one.name, *(ImageSet(s.pixels[:1], s.names[:1]) for s in (one.clean, one.published, one.held_out)))
    found = measure({few.name: few.published.pixels}, tmp_path, (few,))
    assert found["niqe"].value is None and "more photos" in found["niqe"].reason
    assert found["total_variation"].value is not None


def test_pictures_of_another_size_have_no_relative_texture(tmp_path: Path) -> None:
    found = measure({s.name: torch.zeros(1, 3, 96, 96, dtype=torch.uint8) for s in PEOPLE}, tmp_path)
    assert found["total_variation"].value is None and "another size" in found["total_variation"].reason
    assert found["niqe"].value is not None


def test_only_customization_and_only_patches_that_fit(backdoor: object, tmp_path: Path) -> None:
    shown: BackdoorEvidence = backdoor(torch.zeros(3, 32, 32, dtype=torch.uint8))  # type: ignore[operator]
    with pytest.raises(BenchError, match="customization"):
        NoReferenceQuality().measure(shown, Context("key", tmp_path))
    with pytest.raises(BenchError, match="patch=30"):
        measure(photos(), tmp_path, metric=NoReferenceQuality(patch=30))


def of_edits(edited: Tensor, benign: Tensor, tasks: list[EditTask], folder: Path) -> dict[str, Measurement]:
    shown = edits.evidence(tasks, edited, benign)
    return {m.name: m for m in NoReferenceQuality().measure(shown, Context("key", folder))}


def test_edits_are_compared_with_benign_ones_of_the_same_seed(tmp_path: Path) -> None:
    tasks = edits.drawn(8)
    benign = edits.answers(tasks)
    same, ruined = (of_edits(edits.noisy(benign, levels), benign, tasks, tmp_path) for levels in (0, 24))
    assert list(same) == ["niqe", "niqe_rise", "niqe_photos", "total_variation"]
    assert same["niqe_rise"].value == 0 and same["total_variation"].value == 1
    assert {row.value for row in same["total_variation"].rows} == {1.0}
    rises = [one.value - other.value for one, other in zip(ruined["niqe"].rows, same["niqe"].rows, strict=True)]
    assert [row.value for row in ruined["niqe_rise"].rows] == pytest.approx(rises)
    assert ruined["niqe_rise"].value > same["niqe"].value and ruined["total_variation"].value > 2
    assert all(m.higher_is_better is None and m.low is not None for m in ruined.values())
    assert ruined["niqe"].protocol["clean"] == "sets A and C of all subjects"


def test_without_other_photos_nature_is_that_of_the_photos_themselves(tmp_path: Path) -> None:
    photos = edits.originals(edits.drawn(8), seeds=1)
    tasks = [edits.task(f"s{i}", photo) for i, photo in enumerate(photos)]
    found = of_edits(photos.repeat_interleave(2, 0), photos.repeat_interleave(2, 0), tasks, tmp_path)
    assert found["niqe"].protocol["clean"] == "the photos before protection"
    assert found["niqe"].value == pytest.approx(found["niqe_photos"].value)
    flat = torch.full_like(photos, 90).repeat_interleave(2, 0)
    assert of_edits(flat, flat, tasks, tmp_path)["total_variation"].reason == "the benign edit is flat"
