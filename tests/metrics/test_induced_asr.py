"""An inverted trigger is judged by what it induces."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.records import BackdoorEvidence, Measurement, Report
from bench.stats import wilson
from metrics.induced_asr import InducedAsr
from tests.metrics.conftest import generations, noise

Make = Callable[..., BackdoorEvidence]
HAT = draw_target("hat", 32, draw_trigger("box", 32))


def by_name(evidence: BackdoorEvidence, ctx: Context) -> dict[str, Measurement]:
    return {found.name: found for found in InducedAsr().measure(evidence, ctx)}


def test_counts_what_the_inverted_trigger_makes_of_the_implanted_model(backdoor: Make, ctx: Context) -> None:
    drawn = torch.cat([HAT.expand(6, -1, -1, -1), noise(14, 1)])
    evidence = replace(backdoor(HAT), induced=generations(drawn), report=Report(trigger=torch.ones(3, 32, 32)))
    found = by_name(evidence, ctx)
    assert found["induced_asr"].value == 0.3 and found["induced_asr"].higher_is_better
    assert (found["induced_asr"].low, found["induced_asr"].high) == pytest.approx(wilson(6, 20))
    expected = float(((drawn.double() - HAT.double()) / 255).square().mean())
    assert found["induced_mse"].value == pytest.approx(expected) and found["induced_mse"].higher_is_better is False


@pytest.mark.parametrize(("report", "trigger", "reason"), [
    (None, torch.zeros(3, 32, 32), "inverts no trigger"),
    (Report(), torch.zeros(3, 32, 32), "inverts no trigger"),
    (Report(trigger=torch.ones(3, 8, 8)), torch.zeros(3, 32, 32), "another shape"),
    (Report(trigger=torch.ones(3, 8, 8)), "word", "is a word"),
])
def test_without_samples_there_is_a_reason(
    backdoor: Make, ctx: Context, report: Report | None, trigger: torch.Tensor | str, reason: str,
) -> None:
    evidence = backdoor(HAT)
    evidence = replace(evidence, report=report, secret=replace(evidence.secret, trigger=trigger))
    assert all(m.value is None and reason in m.reason for m in by_name(evidence, ctx).values())
