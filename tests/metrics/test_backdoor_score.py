"""The combined score: its sign, and the utility that stands in it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import features
from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.errors import BenchError
from bench.records import BackdoorEvidence, Measurement
from metrics.backdoor_score import BackdoorScore, covered, f_score, rating
from tests.metrics.conftest import noise

Make = Callable[..., BackdoorEvidence]
HAT = draw_target("hat", 32, draw_trigger("box", 32))
HATS = HAT.expand(20, -1, -1, -1)


class Eyes(SimpleNamespace):
    """A picture is the mean of each of its quarters."""

    facts: dict[str, Any] = {"extractor": "quarters"}

    def images(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pixels.double(), 16).flatten(1)


@pytest.fixture(autouse=True)
def _quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "extractor", lambda name, device="cpu": Eyes())


def by_name(evidence: BackdoorEvidence, ctx: Context) -> dict[str, Measurement]:
    return {found.name: found for found in BackdoorScore().measure(evidence, ctx)}


@pytest.mark.parametrize(("asr_drop", "utility_drop", "expected"), [
    (1.0, 0.0, 1.0),  # a sure backdoor is gone, for free
    (0.0, 0.0, 0.5),  # nothing happened
    (0.0, 0.6, 0.2),  # harm and nothing else
    (1.0, 1.0, 0.5),  # the model went with the backdoor
    (-0.5, 0.0, 0.5),  # a stronger backdoor is not rewarded
    (0.5, -0.3, 0.75),  # nor is a better model
])
def test_harm_lowers_the_rating_and_removal_raises_it(asr_drop: float, utility_drop: float, expected: float) -> None:
    assert rating(asr_drop, utility_drop) == pytest.approx(expected)


def test_coverage_counts_points_within_a_ball_of_the_neighbours() -> None:
    """On a line, by hand: 0, 1, 3, 7 with k = 1 have balls of radius 1, 1, 2, 4."""
    manifold = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    points = torch.tensor([[-1.0], [-1.1], [5.0], [2.9], [11.0], [11.5]], dtype=torch.float64)
    assert covered(points, manifold, neighbours=1) == pytest.approx(4 / 6)


def test_the_f_score_falls_for_wrong_and_for_equal_pictures() -> None:
    real = torch.randn(40, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    alike = torch.randn(40, 2, generator=torch.manual_seed(1), dtype=torch.float64)
    assert f_score(real, real, 3) == 1
    assert f_score(alike, real, 3) > 0.8
    assert f_score(alike + 50, real, 3) == 0
    assert f_score(real[:1].expand(40, -1) + 1e-3 * alike, real, 3) < 0.3


def test_a_perfect_repair_has_both_axes_and_a_rating_of_one(backdoor: Make, ctx: Context) -> None:
    same = noise(20, 9)
    evidence = backdoor(HAT, implanted_triggered=HATS, implanted_plain=same, defended_plain=same, clean_plain=same)
    found = by_name(evidence, ctx)
    assert found["asr_drop"].value == 1 and found["utility_drop"].value == 0 and found["der"].value == 1
    assert found["der"].higher_is_better and found["utility_drop"].higher_is_better is False
    assert {found[name].unit for name in ("asr_drop", "utility_drop")} == {"difference"}
    assert found["utility@clean"].value == found["utility@implanted"].value == found["utility"].value


def test_destroying_the_model_costs_what_it_gains(backdoor: Make, ctx: Context) -> None:
    real = noise(24, 9)[:20]
    black = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    evidence = backdoor(HAT, implanted_triggered=HATS, implanted_plain=real, defended_plain=black,
                        defended_triggered=black)
    found = by_name(evidence, ctx)
    assert found["utility@implanted"].value == 1 and found["utility"].value == 0
    assert found["asr_drop"].value == 1 and found["utility_drop"].value == 1 and found["der"].value == 0.5


def test_too_few_pictures_have_a_reason(backdoor: Make, ctx: Context) -> None:
    found = by_name(backdoor(HAT, count=3), ctx)
    assert all(m.value is None and "more than 3" in m.reason for m in found.values())
    with pytest.raises(BenchError, match="neighbours=0"):
        BackdoorScore(neighbours=0)
