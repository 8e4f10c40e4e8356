"""Reports of defenses, from disk and as measurements."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.records import BackdoorEvidence, Measurement, Report, Verdict
from bench.reports import read_report, write_report
from metrics.defense_report import DefenseReport

Make = Callable[..., BackdoorEvidence]
HAT = draw_target("hat", 32, draw_trigger("box", 32))


def by_name(evidence: BackdoorEvidence, ctx: Context) -> dict[str, Measurement]:
    return {found.name: found for found in DefenseReport().measure(evidence, ctx)}


def test_a_report_comes_back_from_disk(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    report = Report(Verdict("mine", 0.75, True), torch.randn(3, 4, 4), {"removed_share": 0.01})
    write_report(report, tmp_path)
    back = read_report(tmp_path)
    assert back is not None and back.verdict == report.verdict and back.facts == report.facts
    assert back.trigger is not None and report.trigger is not None and torch.equal(back.trigger, report.trigger)


def test_a_report_without_verdict_and_trigger_comes_back(tmp_path: Path) -> None:
    write_report(Report(facts={"updates": 3}), tmp_path)
    assert read_report(tmp_path) == Report(facts={"updates": 3})


def test_verdict_share_and_distance_to_the_true_trigger(backdoor: Make, ctx: Context) -> None:
    true = draw_trigger("box", 32)
    evidence = backdoor(HAT)
    evidence = replace(evidence, secret=replace(evidence.secret, trigger=true))
    report = Report(Verdict("mine", 0.75, True), -2 * true, {"removed_share": 0.01})
    found = by_name(replace(evidence, report=report), ctx)
    assert found["model_flagged"].value == 1 and found["model_score"].value == 0.75
    assert found["removed_share"].value == 0.01
    assert found["trigger_cosine"].value == pytest.approx(-1) and found["trigger_norm_ratio"].value == pytest.approx(2)


def test_what_a_defense_does_not_say_is_missing_with_its_reason(backdoor: Make, ctx: Context) -> None:
    found = by_name(backdoor(HAT), ctx)
    assert all(m.value is None and m.reason for m in found.values())
    worded = replace(backdoor(HAT), report=Report(trigger=torch.ones(3, 2, 2)))
    worded = replace(worded, secret=replace(worded.secret, trigger="word"))
    assert "word" in by_name(worded, ctx)["trigger_cosine"].reason
    other = replace(backdoor(HAT), report=Report(trigger=torch.ones(3, 2, 2)))
    assert "shape" in by_name(other, ctx)["trigger_cosine"].reason
