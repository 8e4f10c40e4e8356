"""NIQE's parts against samples of known distributions, plain loops and hand-computed distances."""

import numpy as np
import pytest
import torch
from scipy.stats import gengamma, gennorm

from bench.data.micro_subjects import MicroSubjects
from bench.errors import BenchError
from bench.naturalness import (
    Array,
    Gaussian,
    asymmetric,
    describe,
    distance,
    features,
    fit,
    gaussian,
    normalised,
    patch_size,
    patches,
    scores,
    symmetric,
)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 5.0])
def test_shape_and_variance_of_generalised_gaussian_samples_are_found(shape: float) -> None:
    x = gennorm.rvs(shape, scale=3.0, size=200_000, random_state=0)
    found = symmetric(x)
    assert found[0] == pytest.approx(shape, rel=0.05)
    assert found[1] == pytest.approx(gennorm.var(shape, scale=3.0), rel=0.03)


@pytest.mark.parametrize("shape", [0.8, 2.0])
def test_shape_scales_and_mean_of_asymmetric_samples_are_found(shape: float) -> None:
    """A side is drawn in proportion to its scale, its magnitude from the generalised gamma distribution."""
    left, right, rng = 1.0, 3.0, np.random.default_rng(0)
    size = gengamma.rvs(1 / shape, shape, size=400_000, random_state=1)
    x = np.where(rng.random(len(size)) < left / (left + right), -left * size, right * size)
    found = asymmetric(x)
    assert found[:3] == pytest.approx([shape, left, right], rel=0.05)
    assert found[3] == pytest.approx(x.mean(), rel=0.03)


def test_a_symmetric_sample_has_equal_sides_and_the_same_shape_in_both() -> None:
    x = gennorm.rvs(1.5, size=300_000, random_state=2)
    shape, left, right, mean = asymmetric(x)
    assert shape == pytest.approx(symmetric(x)[0], rel=0.01) and left == pytest.approx(right, rel=0.02)
    assert abs(mean) < 0.02


def test_normalisation_agrees_with_plain_loops() -> None:
    luma = np.random.default_rng(0).uniform(0, 255, (12, 13))
    offsets = np.arange(-3, 4)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    padded = np.pad(luma, 3, mode="edge")
    expected = np.zeros_like(luma)
    for i, j in np.ndindex(*luma.shape):
        around = padded[i:i + 7, j:j + 7]
        mean = (window * around).sum()
        expected[i, j] = (luma[i, j] - mean) / (np.sqrt((window * (around - mean) ** 2).sum()) + 1)
    assert np.allclose(normalised(luma[None])[0][0], expected, atol=1e-6)


def test_neighbours_are_multiplied_along_four_ways() -> None:
    """Rows repeat and columns alternate in sign: products along columns are positive, the other three negative."""
    alternating = np.tile([1.0, -1.0], (16, 8))
    _, row, column, down, up = np.split(describe(alternating[None])[0], [2, 6, 10, 14])
    assert column[2] > 0.5 and column[1] == 0
    assert all(part[1] > 0.5 and part[2] == 0 for part in (row, down, up))


def test_patches_overlap_by_half_and_go_row_by_row() -> None:
    x = np.arange(32 * 40, dtype=np.float64).reshape(1, 32, 40)
    found = patches(x, 16)
    assert found.shape == (1, 12, 16, 16)
    assert found[0, 1, 0, 0] == 8 and found[0, 4, 0, 0] == 8 * 40


@pytest.mark.parametrize("side", [64, 65, 79, 95])
def test_both_scales_have_the_same_patches(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, side, side), dtype=np.uint8)
    numbers, sharp = features(pixels, 16)
    assert numbers.shape == (*sharp.shape, 36) and np.isfinite(numbers).all()


def test_the_distance_computed_by_hand() -> None:
    one = Gaussian(np.array([0.0, 0.0]), np.diag([1.0, 4.0]), 9)
    other = Gaussian(np.array([3.0, 4.0]), np.diag([3.0, 12.0]), 9)
    assert distance(one, other) == pytest.approx(np.sqrt(9 / 2 + 16 / 8))
    assert distance(one, one) == 0


def test_only_sharp_patches_of_each_picture_make_the_model() -> None:
    numbers = np.arange(2 * 3 * 36, dtype=np.float64).reshape(2, 3, 36)
    sharp = np.array([[1.0, 0.8, 0.7], [10.0, 7.4, 7.6]])
    expected = gaussian(numbers.reshape(6, 36)[[0, 1, 3, 5]])
    found = fit(numbers, sharp)
    assert found.count == 4 and np.allclose(found.mean, expected.mean)


def test_patch_sizes() -> None:
    assert [patch_size(s, s) for s in (32, 64, 128, 256, 384, 512)] == [16, 16, 32, 64, 96, 96]
    assert patch_size(512, 128) == 32


@pytest.mark.parametrize("size", [8, 18, 68])
def test_a_patch_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(BenchError, match=f"patch={size}"):
        features(np.zeros((1, 3, 64, 64), np.uint8), size)


def test_flat_pictures_have_a_score_and_it_is_bad() -> None:
    photos, clean = _photos()
    assert min(scores(np.full((1, 3, 64, 64), 90, np.uint8), clean, 16)) > max(scores(photos, clean, 16))


def _photos() -> tuple[np.ndarray, Gaussian]:
    people = MicroSubjects(count=4).subjects()
    known = torch.cat([torch.cat([s.clean.pixels, s.held_out.pixels]) for s in people]).numpy()
    return torch.cat([s.published.pixels for s in people]).numpy(), fit(*features(known, 16))


def test_noise_and_blur_raise_the_score_of_unseen_photos_steadily() -> None:
    from scipy.ndimage import gaussian_filter

    photos, clean = _photos()
    signs = np.random.default_rng(0).integers(0, 2, photos.shape) * 2 - 1
    noisy = [np.clip(photos + levels * signs, 0, 255).astype(np.uint8) for levels in (0, 4, 8, 16, 32)]
    means = [float(np.mean(scores(pixels, clean, 16))) for pixels in noisy]
    assert means == sorted(means) and means[1] > 1.4 * means[0]
    blurred = [gaussian_filter(photos, (0, 0, s, s)) for s in (0, 0.7, 1.5)]
    means = [float(np.mean(scores(pixels, clean, 16))) for pixels in blurred]
    assert means == sorted(means) and means[2] > 1.5 * means[0]


def test_the_score_of_a_picture_does_not_depend_on_its_company() -> None:
    photos, clean = _photos()
    together: Array = np.array(scores(photos, clean, 16))
    alone = [scores(photos[i:i + 1], clean, 16)[0] for i in range(3)]
    assert together[:3] == pytest.approx(alone)
