"""PGD steps against an oracle in plain Python."""

from __future__ import annotations

import pytest
import torch

from bench.diffusion.projected_gradient import ascend, descend, project


def step_by_hand(x: float, origin: float, gradient: float, step: float, eps: float) -> float:
    """One pixel in 0-255 levels, computed without torch."""
    moved = x + (step if gradient > 0 else -step if gradient < 0 else 0.0)
    return min(max(moved, origin - eps, 0.0), origin + eps, 255.0)


@pytest.mark.parametrize("eps", [0.0, 1.0, 6.375, 16.0, 255.0])
@pytest.mark.parametrize("step", [0.6375, 1.0, 40.0])
def test_ascend_matches_the_oracle(eps: float, step: float) -> None:
    generator = torch.Generator().manual_seed(int(eps))
    origin, start, gradient = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(3))
    origin, gradient = 255 * origin, (gradient - 0.5) * (gradient > 0.2)
    start = (origin + (2 * start - 1) * eps).clamp(0, 255)
    found = ascend(start / 127.5 - 1, origin / 127.5 - 1, gradient, step, eps)
    wanted = [step_by_hand(*values, step, eps) for values in zip(start.tolist(), origin.tolist(), gradient.tolist())]
    assert torch.allclose((found + 1) * 127.5, torch.tensor(wanted, dtype=torch.float64), atol=1e-9)


def test_projection_is_the_nearest_point_of_the_ball() -> None:
    generator = torch.Generator().manual_seed(3)
    origin = 2 * torch.rand(2000, generator=generator) - 1
    outside = origin + torch.randn(2000, generator=generator)
    found = project(outside, origin, 16)
    candidates = torch.linspace(-1, 1, 4001)[None]
    feasible = (candidates - origin[:, None]).abs() <= 32 / 255
    distance = (candidates - outside[:, None]).abs().masked_fill(~feasible, torch.inf).min(1).values
    assert torch.all((found - outside).abs() <= distance + 1e-6)
    assert torch.all((found - origin).abs() <= 32 / 255 + 1e-6)


def test_projection_is_idempotent_and_keeps_what_is_inside() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(project(x, x, 0), x)
    once = project(x + 0.5, x, 16)
    assert torch.equal(project(once, x, 16), once)


def test_descend_goes_the_other_way() -> None:
    origin, gradient = torch.zeros(4), torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert torch.equal(descend(origin, origin, gradient, 2, 16), -ascend(origin, origin, gradient, 2, 16))


def test_no_gradient_flows_through_a_step() -> None:
    x = torch.zeros(3, requires_grad=True)
    assert not ascend(x, torch.zeros(3), torch.ones(3), 1, 16).requires_grad
