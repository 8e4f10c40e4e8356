"""Success of edits by judges whose answers are known, and by the embedded ones on the drawn world."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.errors import BenchError
from bench.faces import FaceEncoder, FaceEncoderConfig, save_face_encoder
from bench.features import clip_folder
from bench.records import EditingEvidence, EditTask, Measurement
from metrics.edit_success import (
    NO_ANSWER,
    NO_FACE,
    CaptionJudge,
    EditSuccess,
    FaceJudge,
    Pictures,
    captions_of,
    edits_of,
    judged,
    references,
    summarise,
)
from tests.metrics.edits import answers, drawn, evidence, noisy, originals, task

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class Painter:
    """A caption judge: a picture is as its last row of pixels is coloured, a caption names a colour."""

    facts: dict[str, Any] = {"extractor": "painter"}

    def images(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, -1].double().mean(2)

    def texts(self, prompts: list[str]) -> Tensor:
        return torch.tensor([COLOURS[prompt] for prompt in prompts], dtype=torch.float64)


class Dial:
    """A face recogniser: a face looks to the angle of the first pixel (in degrees), 255 is no face."""

    config = SimpleNamespace(similarity_threshold=0.7)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        first = (pixels[:, 0, 0, 0] * 255).round()
        angle = first * math.pi / 180
        return torch.stack([angle.cos(), angle.sin()], 1), first < 255


def picture(angle: int, colour: str) -> Tensor:
    """uint8 [3, 4, 4]; angle 255 shows no face."""
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[:, -1] = torch.tensor(COLOURS[colour])[:, None] * 200
    pixels[0, 0, 0] = angle
    return pixels


def judges(threshold: float | None = 0.7) -> tuple[CaptionJudge, FaceJudge]:
    return CaptionJudge(Painter()), FaceJudge("dial", Dial(), threshold, {"recogniser": "dial"})  # type: ignore[arg-type]


def measured(shown: EditingEvidence, threshold: float | None = 0.7) -> dict[str, Measurement]:
    captions, face = judges(threshold)
    pictures = edits_of(shown, shown.edited)
    own = summarise(judged(pictures, captions.reads(pictures), face), captions, face)
    return {m.name: m for m in [*own, *references(shown, captions, face)]}


def asked(*photos: tuple[int, str], answer: tuple[int, str] | None = None) -> list[EditTask]:
    """Tasks that want each photo red."""
    right = None if answer is None else picture(*answer)
    return [task(f"s{i}", picture(*photo), answer=right) for i, photo in enumerate(photos)]


def pictures(*shown: tuple[int, str]) -> Tensor:
    return torch.stack([picture(*one) for one in shown])


def values(measurement: Measurement) -> list[float | None]:
    return [row.value for row in measurement.rows]


def test_success_needs_the_edit_and_the_person() -> None:
    """Four outcomes of a photo at 10 degrees that should become red: done, not done, done to another, and ruined."""
    shown = evidence(asked((10, "green"), (10, "green")),
                     pictures((20, "red"), (20, "blue"), (100, "red"), (255, "green")))
    found = measured(shown)
    assert values(found["edit_attribute"]) == [1, 0, 1, 0]
    assert values(found["edit_identity_rate"]) == [1, 1, 0, 0]
    assert values(found["edit_success"]) == [1, 0, 0, 0]
    cosines = [math.cos(math.radians(10)), math.cos(math.radians(10)), 0.0, 0.0]
    assert values(found["edit_identity"]) == pytest.approx(cosines, abs=1e-6)
    assert [found[name].value for name in ("edit_success", "edit_attribute")] == [0.25, 0.5]
    assert all(m.higher_is_better is False for name, m in found.items() if "@" not in name)


def test_it_is_measured_against_the_original_not_what_the_defense_made_of_it() -> None:
    tasks = asked((10, "green"))
    shown = evidence(tasks, pictures((10, "red"), (10, "red")), protected=pictures((170, "green")))
    assert values(measured(shown)["edit_identity"]) == pytest.approx([1, 1])


def test_who_was_asked_to_change_is_known_by_the_right_answer_too() -> None:
    """The edit turns the face from 10 to 100 degrees; a picture at either is the person, one between is neither."""
    shown = evidence(asked((10, "green"), answer=(100, "red")), pictures((100, "red"), (10, "red")))
    found = measured(shown)
    assert values(found["edit_identity"]) == pytest.approx([1, 1]) and found["edit_success"].value == 1
    between = measured(evidence(asked((10, "green"), answer=(130, "red")), pictures((70, "red"), (200, "red"))))
    half = math.cos(math.radians(60))
    assert values(between["edit_identity"]) == pytest.approx([half, math.cos(math.radians(70))])
    assert between["edit_success"].value == 0
    faceless = measured(evidence(asked((10, "green"), answer=(255, "red")), pictures((75, "red"), (10, "red"))))
    assert values(faceless["edit_identity"]) == pytest.approx([math.cos(math.radians(65)), 1])


def test_the_threshold_itself_counts_as_the_same_person() -> None:
    face = judges(0.5)[1]
    assert [face.same(value) for value in (0.5, 0.4999, 0.0, None)] == [1, 0, 0, None]
    assert judges(None)[1].same(0.9) is None


def test_what_no_defense_moves_stands_beside_it() -> None:
    """The editor fails on one of two photos; a judge that turned away from the answer would cap everything at 0."""
    tasks = asked((10, "green"), (10, "red"), answer=(10, "red"))
    benign = pictures((10, "red"), (10, "blue"), (10, "red"), (10, "red"))
    found = measured(evidence(tasks, pictures(*[(255, "blue")] * 4), benign))
    assert found["edit_success"].value == 0
    assert found["edit_success@benign"].value == 0.75 and found["edit_attribute@benign"].value == 0.75
    assert found["edit_success@answer"].value == 1 and found["edit_success@answer"].n == 2
    assert found["edit_attribute@photo"].value == 0.5, "the second photo was red before"
    assert {m.higher_is_better for name, m in found.items() if "@" in name} == {None}


def test_without_known_answers_their_ceiling_has_a_reason() -> None:
    found = measured(evidence(asked((10, "green")), pictures((10, "red"), (10, "red"))))
    assert found["edit_success@answer"].value is None and found["edit_success@answer"].reason == NO_ANSWER


def test_a_photo_without_a_face_has_no_identity_to_keep() -> None:
    shown = evidence(asked((255, "green"), (10, "green")), pictures(*[(10, "red")] * 4))
    found = measured(shown)
    assert values(found["edit_success"]) == values(found["edit_identity_rate"]) == [None, None, 1, 1]
    assert found["edit_success"].rows[0].reason == NO_FACE
    assert values(found["edit_attribute"]) == [1, 1, 1, 1]


def test_a_recogniser_without_a_threshold_says_what_to_set() -> None:
    found = measured(evidence(asked((10, "green")), pictures((10, "red"), (10, "red"))), None)
    assert found["edit_success"].value is None and "edit_success.threshold" in found["edit_success"].reason
    assert found["edit_identity"].value == pytest.approx(1)


def test_every_other_caption_is_a_rival() -> None:
    """Half red, half blue, but greener still: nearer to red than to blue, yet not red."""
    mixed = pictures((10, "green"))
    mixed[0, :, -1] = torch.tensor([150, 200, 100])[:, None]
    judge = judges()[0]
    one = asked((10, "blue"))[0]
    assert judge.reads(Pictures(mixed, ("a",), (one,))) == [0]
    without_green = replace(one, edit=replace(one.edit, others=("blue",)))
    assert judge.reads(Pictures(mixed, ("a",), (without_green,))) == [1]
    tie = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert judge.reads(Pictures(tie, ("a",), (one,))) == [0], "as near to all is no success"


def test_an_edit_without_rivals_or_with_its_target_among_them_is_refused() -> None:
    for others in ((), ("blue", "red")):
        one = asked((10, "green"))[0]
        with pytest.raises(BenchError, match="make it red.*s0"):
            captions_of(replace(one, edit=replace(one.edit, others=others)))


def test_units_of_statistics_are_photos() -> None:
    shown = evidence(asked(*[(10, "green")] * 3), pictures(*[(10, "red")] * 6))
    found = measured(shown)["edit_success"]
    assert (found.n, {row.cluster for row in found.rows}) == (6, {"s0", "s1", "s2"})
    assert [row.sample for row in found.rows][:3] == ["s0_0", "s0_1", "s1_0"]
    assert found.low is not None and found.low < 1


def embedded(shown: EditingEvidence, folder: Path, metric: EditSuccess | None = None) -> dict[str, Measurement]:
    return {m.name: m for m in (metric or EditSuccess()).measure(shown, Context("key", folder))}


def test_the_embedded_judges_know_right_answers_from_photos_and_from_ruins(tmp_path: Path) -> None:
    tasks = drawn(18)
    found = embedded(evidence(tasks, answers(tasks)), tmp_path)
    assert next(iter(found)) == "edit_success", "boards rank by the first"
    assert found["edit_success"].value == found["edit_success@answer"].value > 0.6
    assert found["edit_attribute@photo"].value < 0.2
    assert found["edit_identity@answer"].value == pytest.approx(1)
    kept = embedded(evidence(tasks, originals(tasks)), tmp_path)
    assert kept["edit_attribute"].value == kept["edit_attribute@photo"].value
    assert kept["edit_identity"].value == pytest.approx(1) and kept["edit_identity_rate"].value == 1
    ruined = embedded(evidence(tasks, noisy(originals(tasks), 120)), tmp_path)
    assert ruined["edit_identity"].value < 0.3 and ruined["edit_success"].value < 0.1


def test_recognisers_by_name_and_folder_and_a_judge_by_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FaceEncoderConfig((4, 4, 4, 4), dimension=8, size=16, similarity_threshold=0.99)
    save_face_encoder(FaceEncoder(config), tmp_path / "mine")
    tasks = drawn(4)
    metric = EditSuccess(["micro-face-3", str(tmp_path / "mine")])
    found = embedded(evidence(tasks, answers(tasks), judge=str(clip_folder("micro-clip"))), tmp_path, metric)
    plain = embedded(evidence(tasks, answers(tasks)), tmp_path)
    assert found["edit_attribute"].value == plain["edit_attribute"].value
    name = f"edit_success@{tmp_path / 'mine'}"
    assert found[name].protocol["faces"]["threshold"] == 0.99
    assert f"edit_attribute@{tmp_path / 'mine'}" not in found
    assert found["edit_success"].protocol["captions"]["extractor"] == "micro-clip"


def test_a_threshold_by_hand_is_for_recognisers_that_state_none() -> None:
    class Mute(Dial):
        config = None

    limits = [EditSuccess(threshold=threshold)._face_judge("x", judge).threshold
              for threshold in (None, 0.3) for judge in (Dial(), Mute())]
    assert limits == [0.7, None, 0.7, 0.3]


@pytest.mark.parametrize("metric", [EditSuccess([]), EditSuccess(["micro-face-3"] * 2), EditSuccess(threshold=1.5)])
def test_options_that_make_no_sense_are_refused(metric: EditSuccess, tmp_path: Path) -> None:
    tasks = drawn(2)
    with pytest.raises(BenchError, match="edit_success: (recognisers|threshold)="):
        embedded(evidence(tasks, answers(tasks)), tmp_path, metric)


def test_other_evidence_is_refused(backdoor: object, tmp_path: Path) -> None:
    shown = backdoor(torch.zeros(3, 32, 32, dtype=torch.uint8))  # type: ignore[operator]
    with pytest.raises(BenchError, match="needs the evidence of an editing cell"):
        EditSuccess().measure(shown, Context("key", tmp_path))
