"""Detection of inputs: thresholds from calibration inputs alone, positive means triggered."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.errors import BenchError
from bench.records import BackdoorEvidence, InputScores, Measurement
from bench.stats import wilson
from metrics.input_detection import InputDetection, threshold

Make = Callable[..., BackdoorEvidence]
HAT = draw_target("hat", 32, draw_trigger("box", 32))


def measured(backdoor: Make, ctx: Context, scores: InputScores | None) -> dict[str, Measurement]:
    evidence = replace(backdoor(HAT), input_scores=scores)
    return {found.name: found for found in InputDetection().measure(evidence, ctx)}


def normal(count: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    return mean + torch.randn(count, generator=torch.manual_seed(seed), dtype=torch.float64)


def test_a_perfect_detector_is_perfect_within_its_interval(backdoor: Make, ctx: Context) -> None:
    found = measured(backdoor, ctx, InputScores(normal(400), normal(128, seed=1), normal(128, 50.0)))
    assert found["input_auroc"].value == 1 and found["input_tpr@1%"].value == 1
    assert (found["input_tpr@1%"].low, found["input_tpr@1%"].high) == wilson(128, 128)
    assert found["input_auroc"].low == wilson(128, 128)[0]
    assert found["input_fpr@5%"].value is not None and found["input_fpr@5%"].value < 0.12
    assert found["input_accuracy@5%"].value == pytest.approx(1 - found["input_fpr@5%"].value / 2)
    assert found["input_accuracy@5%"].n == 256


def test_positive_means_triggered_so_a_detector_of_the_wrong_sign_scores_low(backdoor: Make, ctx: Context) -> None:
    found = measured(backdoor, ctx, InputScores(normal(400), normal(100, seed=1), normal(100, -50.0)))
    assert found["input_auroc"].value == 0 and found["input_tpr@5%"].value == 0


def test_a_detector_that_says_the_same_of_all_flags_none(backdoor: Make, ctx: Context) -> None:
    same = torch.ones(200, dtype=torch.float64)
    found = measured(backdoor, ctx, InputScores(same, same, same))
    assert found["input_auroc"].value == 0.5 and found["input_accuracy@5%"].value == 0.5
    assert found["input_tpr@5%"].value == 0 and found["input_fpr@5%"].value == 0


def test_the_attacks_inputs_move_no_threshold(backdoor: Make, ctx: Context) -> None:
    """An overlap of known size: at 5 % the threshold is the normal's 95 % point, 1.645."""
    calibration = torch.distributions.Normal(0, 1).icdf((torch.arange(999) + 1.0).double() / 1000)
    assert threshold(calibration, 0.05) == pytest.approx(1.645, abs=0.01)
    found = measured(backdoor, ctx, InputScores(calibration, normal(4000, seed=1), normal(4000, 1.645, seed=2)))
    assert found["input_tpr@5%"].value == pytest.approx(0.5, abs=0.03)
    assert found["input_fpr@5%"].value == pytest.approx(0.05, abs=0.015)
    assert found["input_fpr@1%"].value == pytest.approx(0.01, abs=0.006)


def test_false_positives_stay_below_the_aim_on_average() -> None:
    """Split conformal: over many calibrations of 100 the realised rate is at most 5 %, and not far below."""
    rates = []
    for seed in range(400):
        drawn = torch.rand(100, generator=torch.manual_seed(seed), dtype=torch.float64)
        rates.append(1 - threshold(drawn, 0.05))
    assert 0.04 < sum(rates) / len(rates) <= 0.0505


def test_too_few_calibration_inputs_are_refused() -> None:
    assert threshold(torch.arange(99.0), 0.01) == 98
    with pytest.raises(BenchError, match="98 calibration"):
        threshold(torch.arange(98.0), 0.01)


def test_without_scores_there_is_a_reason(backdoor: Make, ctx: Context) -> None:
    found = measured(backdoor, ctx, None)
    assert len(found) == 6
    assert all(m.value is None and m.reason == "the defense scores no inputs" for m in found.values())
