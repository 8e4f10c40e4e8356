"""FID and KID against closed forms and second implementations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from bench.context import Context
from bench.errors import BenchError
from bench.set_distance import Sets, measure_sets, resample, spread
from metrics.fid import Fid, frechet, moments, principal_axes
from metrics.kid import Kid, kernel, pairs, prepare, prepare_matched
from tests.metrics import edits

Array = NDArray[np.float64]
RNG = np.random.default_rng


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> Array:
    return RNG(seed).normal(shift, 1.0, (n, d))


def sets(generated: Array, real: Array, before: Array | None = None, owners: int = 0) -> Sets:
    def names(n: int) -> tuple[str, ...]:
        return tuple(f"p{i % owners}" if owners else f"{i}" for i in range(n))

    return Sets(generated, real, names(len(generated)), names(len(real)), bool(owners), before)


def test_frechet_of_one_dimensional_gaussians_is_the_closed_form() -> None:
    """N(m, s^2) and N(n, u^2): (m - n)^2 + (s - u)^2."""
    value = frechet(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert value == pytest.approx(9 + 1)


def test_frechet_of_commuting_covariances_is_the_closed_form() -> None:
    """Diagonal covariances: |m - n|^2 + sum (sqrt(a_i) - sqrt(b_i))^2, in any rotated frame."""
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 4.0, 1.0])
    turn, _ = np.linalg.qr(RNG(0).normal(size=(3, 3)))
    offset = np.array([0.5, -1.0, 2.0])
    value = frechet(offset, turn @ np.diag(a) @ turn.T, np.zeros(3), turn @ np.diag(b) @ turn.T)
    assert value == pytest.approx(offset @ offset + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def test_frechet_agrees_with_the_matrix_square_root_of_the_product() -> None:
    """Second implementation: the formula as published, with scipy's square root of C_a C_b."""
    x, y = normal(400, 12, 0) @ RNG(1).normal(size=(12, 12)), normal(300, 12, 2, 0.3)
    ones = np.ones
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    offset = x.mean(0) - y.mean(0)
    published = offset @ offset + np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)
    assert frechet(*moments(x, ones(400)), *moments(y, ones(300))) == pytest.approx(published, rel=1e-8)


def test_frechet_agrees_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = normal(200, 8, 0), normal(150, 8, 1, 0.5)
    parts = [torch.from_numpy(v) for v in (*moments(x, np.ones(200)), *moments(y, np.ones(150)))]
    other = fid._compute_fid(parts[0], parts[1], parts[2], parts[3])
    assert frechet(*(p.numpy() for p in parts)) == pytest.approx(float(other), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero() -> None:
    x = moments(normal(50, 5, 0), np.ones(50))
    assert frechet(*x, *x) == pytest.approx(0, abs=1e-9)


def test_moments_with_weights_are_those_of_repeated_rows() -> None:
    x, w = normal(30, 4, 0), RNG(1).integers(0, 4, 30).astype(float)
    repeated = np.repeat(x, w.astype(int), axis=0)
    mean, covariance = moments(x, w)
    assert np.allclose(mean, repeated.mean(0)) and np.allclose(covariance, np.cov(repeated, rowvar=False))


def test_principal_axes_hold_the_largest_variance() -> None:
    x = normal(500, 6, 0) * np.array([10, 1, 1, 5, 1, 1])
    axes = principal_axes(x, 2)
    assert np.allclose(axes.T @ axes, np.eye(2)) and abs(axes[0, 0]) > 0.99 and abs(axes[3, 1]) > 0.99


def naive_mmd(x: Array, y: Array) -> float:
    """The unbiased estimate as three double sums."""
    def k(a: Array, b: Array) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_agrees_with_the_double_sums() -> None:
    x, y = normal(13, 5, 0), normal(17, 5, 1, 0.4)
    assert prepare(x, y)(np.ones(13), np.ones(17)) == pytest.approx(naive_mmd(x, y), rel=1e-10)


def test_kid_agrees_with_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(40, 6, 0), normal(40, 6, 1, 0.4)
    other = kid.poly_mmd(torch.from_numpy(x), torch.from_numpy(y), degree=3, gamma=None, coef=1.0)
    assert prepare(x, y)(np.ones(40), np.ones(40)) == pytest.approx(float(other), rel=1e-6)


def test_kid_of_one_distribution_is_zero_on_average() -> None:
    values = [prepare(normal(20, 4, s), normal(20, 4, 1000 + s))(np.ones(20), np.ones(20)) for s in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_a_picture_drawn_twice_is_no_pair() -> None:
    """With weights (2, 1, 0, 0) the only pair of different pictures is (0, 1)."""
    inner = kernel(normal(4, 3, 0), normal(4, 3, 0))
    assert pairs(inner, np.array([2.0, 1.0, 0.0, 0.0])) == pytest.approx(inner[0, 1])
    assert np.isnan(pairs(inner, np.array([4.0, 0.0, 0.0, 0.0])))


@pytest.mark.parametrize("make", [Fid().prepare, prepare])
def test_the_interval_holds_the_value_and_narrows_with_more_pictures(make: Callable[..., object]) -> None:
    widths = []
    for n in (40, 400):
        [found] = measure_sets("d", sets(normal(n, 4, 0), normal(n, 4, 1, 0.5)), make, "", {}, 100, 0)  # type: ignore[arg-type]
        assert found.low is not None and found.high is not None and found.value is not None
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]


def test_the_rise_is_paired_with_the_clean_model() -> None:
    """A defended model that draws what the clean model draws has a rise of exactly 0, however noisy the distance."""
    x = normal(60, 4, 0)
    value, rise = measure_sets("kid", sets(x, normal(60, 4, 1), before=x.copy()), prepare, "", {}, 50, 0)
    assert rise.name == "kid_rise" and (rise.value, rise.low, rise.high) == (0, 0, 0)
    assert value.high is not None and value.low is not None and value.high > value.low


def test_people_are_resampled_together() -> None:
    """Two people are too few for an interval, however many pictures there are of them."""
    [few] = measure_sets("kid", sets(normal(60, 4, 0), normal(60, 4, 1), owners=2), prepare, "", {}, 50, 0)
    assert few.value is not None and few.low is None
    [more] = measure_sets("kid", sets(normal(60, 4, 0), normal(60, 4, 1), owners=6), prepare, "", {}, 50, 0)
    assert more.low is not None and more.higher_is_better is True


def test_no_interval_reaches_below_the_smallest_distance() -> None:
    x = normal(12, 4, 0)
    [found] = measure_sets("fid", sets(x, x + 1e-3), Fid().prepare, "", {}, 50, 0, floor=0)
    assert found.low == 0


def test_resampling_draws_as_many_as_there_are() -> None:
    assert all(resample(9, RNG(s)).sum() == 9 for s in range(20))


def test_draws_that_cannot_be_computed_are_left_out() -> None:
    assert spread(1.0, [float("nan")] * 10) == (None, None)
    low, high = spread(1.0, [4.0, 5.0, 6.0, float("nan")])
    assert low is not None and high is not None and low == pytest.approx(0.05) and high == pytest.approx(1.95)


def test_fid_is_refused_below_the_dimension_and_says_what_is_needed() -> None:
    reason = Fid()._too_few(sets(normal(8, 8, 0), normal(100, 8, 1)))
    assert "more than 8" in reason
    assert Fid()._too_few(sets(normal(9, 8, 0), normal(100, 8, 1))) == ""
    assert Fid(components=4)._too_few(sets(normal(8, 8, 0), normal(100, 8, 1))) == ""


def test_more_components_than_features_are_refused() -> None:
    with pytest.raises(BenchError, match="components=9"):
        Fid(components=9)._too_few(sets(normal(50, 8, 0), normal(50, 8, 1)))


def test_kid_of_matched_pictures_is_the_sum_over_pairs_of_different_photos() -> None:
    x, y, owners = normal(6, 3, 0), normal(6, 3, 1, 0.4), ("a", "a", "b", "b", "c", "c")

    def k(a: Array, b: Array) -> float:
        return float((a @ b / 3 + 1) ** 3)

    apart = [(i, j) for i in range(6) for j in range(6) if owners[i] != owners[j]]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in apart) / len(apart)
    distance = prepare_matched(owners, x, y)
    assert distance(np.ones(6), np.ones(6)) == pytest.approx(expected)
    twice = np.array([2.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    kept = [(i, j) for i, j in apart if max(i, j) < 4]
    fewer = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in kept) / len(kept)
    assert distance(twice, twice) == pytest.approx(fewer)
    assert np.isnan(distance(np.array([3.0, 3, 0, 0, 0, 0]), np.array([3.0, 3, 0, 0, 0, 0])))


def test_kid_of_edits_is_0_where_none_moved_and_grows_with_ruin(tmp_path: Path) -> None:
    tasks = edits.drawn(8)
    benign = edits.answers(tasks)
    found = []
    for levels in (0, 10, 40):
        shown = edits.evidence(tasks, edits.noisy(benign, levels), benign)
        found += Kid(draws=20).measure(shown, Context("key", tmp_path))
    assert found[0].value == pytest.approx(0, abs=1e-12)
    assert found[0].value < found[1].value < found[2].value
    assert {m.higher_is_better for m in found} == {None} and found[2].low is not None
    assert found[0].protocol["pairs"] == "of different photos" and found[0].n == 16


def test_kid_of_edits_of_one_photo_has_a_reason(tmp_path: Path) -> None:
    tasks = edits.drawn(1)
    (found,) = Kid().measure(edits.evidence(tasks, edits.answers(tasks)), Context("key", tmp_path))
    assert found.value is None and "at least 2 photos" in found.reason
