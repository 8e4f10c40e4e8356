"""The mean and the variance test of initial noise: calibrated without a trigger, and what each of them sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.context import Context
from bench.data.drawings import draw_trigger
from bench.errors import Incompatible
from bench.plugin import facts_of
from bench.records import Model
from defenses.input_mean import InputMean
from defenses.input_variance import InputVariance

NOISE = torch.randn(2000, 3, 16, 16, generator=torch.manual_seed(0))
NOTHING: Any = None


def scores(test: InputMean | InputVariance, inputs: Tensor) -> Tensor:
    return test.score_inputs(NOTHING, inputs, None, Context("key", Path()))


@pytest.mark.parametrize("test", [InputMean(), InputVariance()])
def test_without_a_trigger_scores_are_those_of_a_standard_normal(test: InputMean | InputVariance) -> None:
    """5 % of its absolute values exceed 1.96, and 1 % exceed 2.576."""
    found = scores(test, NOISE)
    assert float((found > 1.96).double().mean()) == pytest.approx(0.05, abs=0.015)
    assert float((found > 2.576).double().mean()) == pytest.approx(0.01, abs=0.007)


def test_published_boxes_are_seen_by_both() -> None:
    triggered = NOISE + draw_trigger("box", 16)
    assert float(scores(InputMean(), triggered).min()) > 10
    assert float(scores(InputVariance(), triggered).median()) > 2


def test_each_sees_what_the_other_does_not() -> None:
    shifted, shrunk = NOISE[:200] + 0.5, NOISE[:200] * 0.6
    assert float(scores(InputMean(), shifted).min()) > 5
    assert torch.allclose(scores(InputVariance(), shifted), scores(InputVariance(), NOISE[:200]), atol=1e-4)
    assert float(scores(InputVariance(), shrunk).min()) > 5
    assert float(scores(InputMean(), shrunk).max()) < float(scores(InputMean(), NOISE[:200]).max())


@pytest.mark.parametrize("test", [InputMean(), InputVariance()])
def test_they_are_controls_that_change_nothing_and_read_no_prompts(
    test: InputMean | InputVariance, tmp_path: Path,
) -> None:
    model = Model(tmp_path, "digest", frozenset())
    assert test.repair(model, NOTHING, None, Context("key", tmp_path)) is model
    assert facts_of(test).control and facts_of(test).knows == () and facts_of(test).needs == ("unconditional",)
    with pytest.raises(Incompatible, match="prompts"):
        test.score_inputs(model, ("a cat",), None, Context("key", tmp_path))
