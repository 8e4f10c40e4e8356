"""Quality of protected photos against hand-computed values and a second SSIM."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from bench.context import Context
from bench.picture_distance import peak_ratio, similarity
from bench.records import Budget, CustomizationEvidence, ImageSet, Measurement, Subject
from metrics.image_quality import ImageQuality
from tests.metrics.edits import evidence, task


def photos(count: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(40, 216, (count, 3, size, size), generator=torch.manual_seed(seed)).to(torch.uint8)


def measure(before: Tensor, after: Tensor, eps: float | None, folder: Path) -> dict[str, Measurement]:
    def images(pixels: Tensor) -> ImageSet:
        return ImageSet(pixels, tuple(f"{i}" for i in range(len(pixels))))

    subject = Subject("ann", images(before), images(before), images(before))
    protected = {"ann": images(after)}
    shown = CustomizationEvidence((subject,), protected, protected, {}, None if eps is None else Budget(eps))
    return {m.name: m for m in ImageQuality().measure(shown, Context("key", folder))}


def test_a_change_of_known_size(tmp_path: Path) -> None:
    before = photos()
    found = measure(before, before + 5, 8, tmp_path)
    assert found["linf"].value == 5
    assert found["psnr"].value == pytest.approx(20 * math.log10(255 / 5))


def test_linf_is_the_worst_channel_of_the_worst_photo(tmp_path: Path) -> None:
    before = photos()
    after = before.clone()
    after[1, 2, 3, 4] -= 7
    after[2, 0, 0, 0] += 3
    assert measure(before, after, 8, tmp_path)["linf"].value == 7


def test_a_photo_over_its_budget_makes_everything_invalid(tmp_path: Path) -> None:
    before = photos()
    after = before.clone()
    after[0, 0, 0, 0] += 9
    for one in measure(before, after, 8, tmp_path).values():
        assert one.value is None and one.reason.startswith("invalid: ") and "9" in one.reason
    assert measure(before, after, 9, tmp_path)["linf"].value == 9


def test_untouched_photos_have_no_psnr_but_a_reason(tmp_path: Path) -> None:
    found = measure(photos(), photos(), 0, tmp_path)
    assert found["psnr"].value is None and "infinite" in found["psnr"].reason
    assert found["ssim"].value == pytest.approx(1) and found["linf"].value == 0


def test_psnr_agrees_with_its_formula() -> None:
    before, after = photos(seed=0), photos(seed=1)
    error = ((before.double() - after.double()) ** 2)[0].mean()
    assert peak_ratio(before, after)[0] == pytest.approx(float(10 * torch.log10(255**2 / error)))


def test_ssim_agrees_with_a_second_implementation() -> None:
    """Wang et al. 2004 with scipy's Gaussian, away from the borders where paddings differ."""
    smooth = gaussian_filter(photos(1, 48)[0].numpy().astype(float), (0, 2, 2))
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, 6, smooth.shape), 0, 255).round()

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 1.5, 1.5), truncate=3.4)

    x, y = smooth.round() / 255, noisy / 255
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    ssim = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    expected = ssim[:, 5:-5, 5:-5].mean()
    pair = [torch.from_numpy(v[None]).to(torch.uint8) for v in (smooth.round(), noisy)]
    assert similarity(*pair)[0] == pytest.approx(expected, abs=2e-3)


def test_photos_smaller_than_the_window_have_a_reason(tmp_path: Path) -> None:
    found = measure(photos(size=8), photos(size=8) + 1, 8, tmp_path)
    assert found["ssim"].value is None and "11 pixels" in found["ssim"].reason and found["linf"].value == 1


def test_on_the_editing_track_every_task_is_a_photo(tmp_path: Path) -> None:
    before = photos(3)
    tasks = [task(f"s{i}", photo) for i, photo in enumerate(before)]
    after = before.clone()
    after[1] += 4
    shown = evidence(tasks, before.repeat_interleave(2, 0), protected=after, eps=4)
    found = {m.name: m for m in ImageQuality().measure(shown, Context("key", tmp_path))}
    assert found["linf"].value == 4
    assert [(row.sample, row.cluster, row.value) for row in found["linf"].rows] == [
        ("s0/b0", "s0", 0), ("s1/b0", "s1", 4), ("s2/b0", "s2", 0)]
    assert [row.value is None for row in found["psnr"].rows] == [True, False, True]
    after[2] += 5
    invalid = evidence(tasks, before.repeat_interleave(2, 0), protected=after, eps=4)
    assert all(m.reason.startswith("invalid") for m in ImageQuality().measure(invalid, Context("key", tmp_path)))
