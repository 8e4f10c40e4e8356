"""Identity score on embeddings that are known, through a recogniser that reads them off the picture."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.errors import BenchError
from bench.faces import FaceEncoder, FaceEncoderConfig, threshold_of, weights_mark
from bench.records import CustomizationEvidence, Generations, ImageSet, Subject
from metrics.ism import IdentityScore, picture_rows, score, summarise, template


class Dial:
    """A picture's embedding points at the angle of its first pixel (in degrees); a black picture has no face."""

    config = SimpleNamespace(similarity_threshold=0.7)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        angle = (pixels[:, 0, 0, 0] * 255).round() * math.pi / 180
        return torch.stack([angle.cos(), angle.sin()], 1), pixels.flatten(1).amax(1) > 0


def pictures(*angles: int) -> ImageSet:
    """One picture per angle; -1 for a black one."""
    pixels = torch.zeros(len(angles), 3, 4, 4, dtype=torch.uint8)
    for i, angle in enumerate(angles):
        pixels[i] = 200 if angle >= 0 else 0
        pixels[i, 0, 0, 0] = max(angle, 0)
    return ImageSet(pixels, tuple(f"{i}" for i in range(len(angles))))


def evidence(**people: tuple[ImageSet, ImageSet, ImageSet, ImageSet]) -> CustomizationEvidence:
    """Per person: sets A, B, C and what was generated."""
    subjects = tuple(Subject(name, a, b, c) for name, (a, b, c, _) in people.items())
    drawn = {name: Generations(g, ("",) * len(g), tuple(range(len(g)))) for name, (*_, g) in people.items()}
    published = {s.name: s.published for s in subjects}
    return CustomizationEvidence(subjects, published, published, drawn, None)


def values(found: CustomizationEvidence) -> dict[str, float | None]:
    return {m.name: m.value for m in summarise(score(found, Dial()), {}, "")}


def test_cosine_to_the_mean_of_sets_a_and_c() -> None:
    """A looks to 20 and 40 degrees, C to 30: the template is 30. Pictures at 30 and 90 score 1 and cos 60."""
    shown = values(evidence(ann=(pictures(20, 40), pictures(180), pictures(30), pictures(30, 90))))
    assert shown["ism"] == pytest.approx((1 + 0.5) / 2, abs=1e-6)
    assert shown["reid_rate"] == 0.5 and shown["fdfr"] == 0


def test_the_protected_set_is_no_part_of_the_template() -> None:
    one = values(evidence(ann=(pictures(20, 40), pictures(0, 0), pictures(30), pictures(30))))
    other = values(evidence(ann=(pictures(20, 40), pictures(180, 90), pictures(30), pictures(30))))
    assert one == other


def test_a_picture_without_a_face_counts_zero_in_ism_and_nothing_in_the_conditional() -> None:
    shown = values(evidence(ann=(pictures(30), pictures(30), pictures(30), pictures(30, -1))))
    assert shown["ism"] == pytest.approx(0.5) and shown["ism_conditional"] == pytest.approx(1.0)
    assert shown["fdfr"] == 0.5 and shown["reid_rate"] == 0.5


def test_when_no_picture_has_a_face_the_conditional_has_a_reason() -> None:
    found = summarise(score(evidence(ann=(pictures(30), pictures(30), pictures(30), pictures(-1, -1))), Dial()), {}, "")
    missing = {m.name: m for m in found}["ism_conditional"]
    assert missing.value is None and "no face found" in missing.reason


def test_photos_without_a_face_do_not_pull_the_template() -> None:
    shown = values(evidence(ann=(pictures(30, -1), pictures(30), pictures(-1, 30), pictures(30))))
    assert shown["ism"] == pytest.approx(1.0, abs=1e-6)


def test_a_person_without_any_face_in_the_photos_has_no_score() -> None:
    shown = evidence(ann=(pictures(-1), pictures(30), pictures(-1), pictures(30)))
    assert values(shown)["ism"] is None and values(shown)["fdfr"] == 0


def test_long_embeddings_weigh_no_more_than_short_ones() -> None:
    long_and_short = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    known = template(long_and_short, torch.tensor([True, True]))
    assert known is not None and torch.allclose(known, torch.tensor([0.5, 0.5]).sqrt())


def test_without_a_calibrated_threshold_there_is_no_reid_rate() -> None:
    rows = picture_rows(["a"], "ann", torch.tensor([[1.0, 0.0]]), torch.tensor([True]), torch.tensor([1.0, 0.0]), None)
    assert rows["reid_rate"][0].value is None and "threshold" in rows["reid_rate"][0].reason


def test_intervals_are_over_people_not_pictures() -> None:
    one = {"ann": (pictures(30), pictures(30), pictures(30), pictures(*range(20, 40)))}
    assert summarise(score(evidence(**one), Dial()), {}, "")[0].low is None
    four = dict.fromkeys("abcd", one["ann"])
    assert summarise(score(evidence(**four), Dial()), {}, "")[0].low is not None


def test_recognisers_must_be_named_once(tmp_path: Path) -> None:
    shown = evidence(ann=(pictures(30), pictures(30), pictures(30), pictures(30)))
    for wrong in ([], ["micro-face-3", "micro-face-3"]):
        with pytest.raises(BenchError, match="recognisers="):
            IdentityScore(recognisers=wrong).measure(shown, Context("key", tmp_path))


def test_threshold_and_weights_of_an_encoder_are_part_of_the_protocol() -> None:
    def encoder(seed: int) -> FaceEncoder:
        torch.manual_seed(seed)
        return FaceEncoder(FaceEncoderConfig((4, 4, 4, 4), dimension=8, size=16, similarity_threshold=0.31))

    assert threshold_of(encoder(0)) == 0.31
    assert weights_mark(encoder(0)) == weights_mark(encoder(0)) != weights_mark(encoder(1))
