"""Direction of edits: vectors whose angle is known, and the drawn world's own edits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.errors import BenchError
from bench.records import Measurement
from metrics.edit_direction import EditDirection, delta, directions
from tests.metrics.edits import answers, drawn, evidence, noisy, originals, task


def test_the_cosine_of_both_differences() -> None:
    """A picture that turns from right to up, and words that turn from right to up, to the left and into depth."""
    right, up, left, deep = (torch.tensor([v], dtype=torch.float64)
                             for v in ([3.0, 0, 0], [0, 5.0, 0], [-1.0, 0, 0], [0, 0, 2.0]))
    moved = delta(right, up)
    assert moved.tolist() == [[-1, 1, 0]], "lengths do not count"
    assert directions(moved, delta(right, up)) == pytest.approx([1])
    assert directions(moved, delta(up, right)) == pytest.approx([-1])
    assert directions(moved, delta(right, left)) == pytest.approx([math.cos(math.pi / 4)])
    assert directions(moved, delta(right, deep)) == pytest.approx([0.5])


def test_a_picture_that_stands_still_scores_0_and_words_that_do_have_no_score() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 1e-7], [0.0, 1.0]], dtype=torch.float64)
    assert directions(delta(one, other), delta(one, one.flip(1))) == pytest.approx([0, 1])
    assert directions(delta(one, one.flip(1)), delta(one, one)) == [None, None]


def measure(edited: torch.Tensor, benign: torch.Tensor, folder: Path) -> dict[str, Measurement]:
    return {m.name: m for m in EditDirection().measure(evidence(drawn(12), edited, benign), Context("key", folder))}


def test_right_answers_move_with_the_words_and_others_do_not(tmp_path: Path) -> None:
    right, photos = answers(drawn(12)), originals(drawn(12))
    found = measure(right, right, tmp_path)
    assert found["edit_direction"].value == found["edit_direction@benign"].value > 0.3
    assert found["edit_direction"].higher_is_better is False and found["edit_direction@benign"].higher_is_better is None
    still = measure(photos, right, tmp_path)
    assert still["edit_direction"].value == pytest.approx(0, abs=1e-6)
    assert still["edit_direction@benign"].value == found["edit_direction"].value
    ruined = measure(noisy(photos, 60), right, tmp_path)["edit_direction"].value
    assert ruined is not None and ruined < found["edit_direction"].value / 2


def test_captions_that_say_the_same_have_a_reason(tmp_path: Path) -> None:
    photo = originals(drawn(1))[0]
    same = [task("ann", photo, target="a photo of a person", others=("a photo of a person",))]
    shown = evidence(same, torch.stack([photo, photo]))
    found = EditDirection().measure(shown, Context("key", tmp_path))[0]
    assert found.value is None and "both captions" in found.reason


def test_other_evidence_is_refused(backdoor: object, tmp_path: Path) -> None:
    shown = backdoor(torch.zeros(3, 32, 32, dtype=torch.uint8))  # type: ignore[operator]
    with pytest.raises(BenchError, match="needs the evidence of an editing cell"):
        EditDirection().measure(shown, Context("key", tmp_path))
