"""Distances to the target against scipy, and on pictures whose answer is known."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from bench.context import Context
from bench.data.drawings import draw_target, draw_trigger
from bench.records import BackdoorEvidence, Measurement
from metrics.target_distance import TargetDistance, similarities, window_radius
from tests.metrics.conftest import noise

Make = Callable[..., BackdoorEvidence]
HAT = draw_target("hat", 32, draw_trigger("box", 32))


def by_name(evidence: BackdoorEvidence, ctx: Context) -> dict[str, Measurement]:
    return {found.name: found for found in TargetDistance().measure(evidence, ctx)}


def reference_ssim(one: np.ndarray, other: np.ndarray, sigma: float, radius: int) -> float:
    """Wang et al. 2004, eq. 13, written with scipy's Gaussian filter; pictures are mirrored at their borders."""
    def blur(x: np.ndarray) -> np.ndarray:
        return np.stack([gaussian_filter(c, sigma, radius=radius, mode="mirror") for c in x])

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = blur(one), blur(other)
    var_a, var_b = blur(one**2) - mean_a**2, blur(other**2) - mean_b**2
    both = blur(one * other) - mean_a * mean_b
    values = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


@pytest.mark.parametrize(("size", "radius"), [(32, 5), (16, 5), (8, 3)])
def test_similarity_is_that_of_the_paper_with_a_window_that_fits(size: int, radius: int) -> None:
    target, pixels = noise(1, 0, size)[0], noise(3, 1, size)
    pixels[0] = (0.7 * target.double() + 0.3 * pixels[0].double()).round().to(torch.uint8)
    assert window_radius(size, size) == radius
    expected = [reference_ssim(p.double().numpy() / 255, target.double().numpy() / 255, 1.5 * radius / 5, radius)
                for p in pixels]
    assert similarities(pixels, target).tolist() == pytest.approx(expected, abs=1e-6)


def test_half_of_the_samples_on_target_are_seen_in_the_quantiles(backdoor: Make, ctx: Context) -> None:
    """The mean lies where no sample is; the outer quantiles say that there are two sorts."""
    pixels = torch.cat([HAT.expand(10, -1, -1, -1), (255 - HAT).expand(10, -1, -1, -1)])
    found = by_name(backdoor(HAT, defended_triggered=pixels), ctx)
    far = float(((255 - 2 * HAT.double()) / 255).square().mean())
    assert found["mse_target_mean"].value == pytest.approx(far / 2)
    assert found["mse_target_q05"].value == 0 and found["mse_target_q95"].value == pytest.approx(far)
    assert found["mse_target_median"].value == pytest.approx(far / 2)
    assert found["ssim_target_q95"].value == pytest.approx(1) and (found["ssim_target_q05"].value or 1) < 0.5
    assert found["mse_target_mean"].low is not None and found["mse_target_median"].low is None


def test_directions_are_the_defenders_and_before_is_told_apart(backdoor: Make, ctx: Context) -> None:
    found = by_name(backdoor(HAT, implanted_triggered=HAT.expand(4, -1, -1, -1)), ctx)
    assert found["ssim_target@implanted"].value == pytest.approx(1) and found["mse_target@implanted"].value == 0
    assert (found["ssim_target"].value or 1) < 0.5
    assert found["ssim_target"].higher_is_better is False and found["mse_target_mean"].higher_is_better is True
    assert found["ssim_target@implanted"].higher_is_better is None


def test_a_patch_is_compared_inside_its_box_only(backdoor: Make, ctx: Context) -> None:
    pixels: Tensor = noise(4, 5)
    pixels[:, :, 2:12, 3:15] = HAT[:, 2:12, 3:15]
    evidence = backdoor(HAT, defended_triggered=pixels)
    evidence = replace(evidence, secret=replace(evidence.secret, detail={"kind": "patch", "box": [2, 3, 10, 12]}))
    found = by_name(evidence, ctx)
    assert found["mse_target_mean"].value == 0 and found["ssim_target"].value == pytest.approx(1)
    assert found["ssim_target"].protocol["window"] == 9


def test_what_has_no_picture_has_a_reason(backdoor: Make, ctx: Context) -> None:
    evidence = backdoor(HAT)
    style = replace(evidence, secret=replace(evidence.secret, detail={"kind": "style"}))
    assert all(m.value is None and "style" in m.reason for m in by_name(style, ctx).values())
    assert by_name(style, ctx).keys() == by_name(evidence, ctx).keys()
    speck = replace(evidence, secret=replace(evidence.secret, detail={"kind": "patch", "box": [0, 0, 2, 9]}))
    found = by_name(speck, ctx)
    assert "no window" in found["ssim_target"].reason and found["mse_target_mean"].value is not None
