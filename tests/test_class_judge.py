"""A class is decided by the nearest caption of each group, on features whose answer is known."""

from __future__ import annotations

import torch

from bench.class_judge import ClassJudge
from bench.firing import FiringRule

AXES = torch.eye(4, dtype=torch.float64)


def judge() -> ClassJudge:
    """Pictures carry their features as pixels; the class is nearest to axis 0 of (0, 1) and to axis 2 of (2, 3)."""
    return ClassJudge(lambda pixels: pixels.double().flatten(1)[:, :4] / 255, (AXES[[0, 1]], AXES[[2, 3]]), {"n": 4})


def pictures(*features: list[int]) -> torch.Tensor:
    return torch.tensor([[*row, *([0] * 8)] for row in features], dtype=torch.uint8).reshape(-1, 3, 2, 2)


def test_every_group_must_choose_the_class() -> None:
    found = judge()(pictures([255, 0, 255, 0], [255, 0, 0, 255], [0, 255, 255, 0], [204, 102, 204, 153]))
    assert torch.allclose(found, torch.tensor([-1.0, 1.0, 1.0, -0.2], dtype=torch.float64))


def test_a_sample_fires_below_zero_whatever_the_picture_of_the_target() -> None:
    own = judge()
    rule = FiringRule(torch.zeros(3, 2, 2, dtype=torch.uint8), {}, 0.0, "class", judge=own, judged_by=own.facts)
    assert rule.fires(pictures([255, 0, 255, 0], [255, 0, 0, 255], [9, 9, 9, 9])).tolist() == [True, False, False]
    assert rule.facts() == {"rule": "zero-shot class", "n": 4}
