"""Intervals against closed forms and simulations."""

import random

import numpy as np
import pytest
from scipy import stats as reference

from bench.stats import Point, auroc, holm, mean_interval, paired_difference, share_of_wins, sign_flip, wilson


def points(values: dict[str, list[float]]) -> list[Point]:
    return [Point(unit, str(i), v) for unit, of in values.items() for i, v in enumerate(of)]


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 128)])
def test_wilson_is_the_standard_one(hits: int, n: int) -> None:
    expected = reference.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense() -> None:
    for hits, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="wilson"):
            wilson(hits, n)


def test_one_sample_per_unit_is_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, 200)
    found = mean_interval([Point(str(i), "", float(v)) for i, v in enumerate(values)])
    half = 1.96 * values.std() / np.sqrt(200)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)


def test_copies_within_a_unit_add_no_certainty() -> None:
    once = mean_interval(points({str(i): [float(i)] for i in range(8)}))
    often = mean_interval(points({str(i): [float(i)] * 50 for i in range(8)}))
    assert (once.low, once.high) == pytest.approx((often.low, often.high), abs=0.15)
    assert (often.n, often.units) == (400, 8)


def test_intervals_cover_what_they_should_when_units_vary() -> None:
    """20 units of 10 samples: the interval over units covers about 95 %; one over samples would cover far less."""
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        units = {str(i): list(draw.normal(draw.normal(0, 1), 0.5, 10)) for i in range(20)}
        found = mean_interval(points(units), resamples=500)
        covered += found.low <= 0 <= found.high
    assert 0.86 <= covered / 150 <= 0.99


@pytest.mark.parametrize("units", [1, 2])
def test_no_interval_below_three_units(units: int) -> None:
    data = points({str(i): [0.1, 0.2] for i in range(units)})
    found = mean_interval(data)
    assert found.value == pytest.approx(0.15)
    assert (found.low, found.high) == (None, None)
    assert "no interval" in found.reason
    assert paired_difference(data, data).low is None
    assert mean_interval([]).value is None


def test_all_hits_are_no_certainty() -> None:
    ones = points({str(i): [1.0] * 10 for i in range(4)})
    assert mean_interval(ones).low == 1.0, "an SSIM of untouched photos is no share"
    found = mean_interval(ones, share=True)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(wilson(40, 40)[0])


def test_order_and_repetition_change_no_bit() -> None:
    data = points({str(i): [random.Random(i).random() for _ in range(7)] for i in range(9)})
    shuffled = random.Random(3).sample(data, len(data))
    assert mean_interval(data) == mean_interval(shuffled) == mean_interval(data)
    other = [Point(p.unit, p.sample, p.value**2) for p in data]
    assert paired_difference(data, other) == paired_difference(shuffled, other)


def test_pairing_removes_what_units_share() -> None:
    draw = np.random.default_rng(2)
    base = {str(i): float(draw.normal(0, 10)) for i in range(12)}
    a = points({u: [v + 1 + draw.normal(0, 0.1)] for u, v in base.items()})
    b = points({u: [v] for u, v in base.items()})
    found = paired_difference(a, b)
    assert found.value == pytest.approx(1, abs=0.1)
    assert found.excludes_zero
    assert found.wins == 0
    assert found.high - found.low < 0.3
    alone = mean_interval(a)
    assert alone.high - alone.low > 5
    swapped = paired_difference(b, a)
    assert swapped.value == pytest.approx(-found.value)
    assert swapped.wins == 1


def test_only_what_both_have_is_compared() -> None:
    a = points({"x": [1, 2, 3], "y": [1], "z": [5], "v": [1]})
    b = points({"x": [0, 0], "y": [0], "z": [0], "w": [100]})
    found = paired_difference(a, b)
    assert (found.n, found.units) == (4, 3)
    assert found.value == pytest.approx((1 + 2 + 1 + 5) / 4)
    assert paired_difference(a, []).value is None


def test_sign_flips_are_exact() -> None:
    data = np.array([0.5, 1.0, 2.0, -0.3, 0.7, 1.1])
    expected = reference.permutation_test(
        (data,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=10**6).pvalue
    assert sign_flip(data) == pytest.approx(expected)
    assert sign_flip(np.ones(3)) == pytest.approx(2 / 8)
    assert sign_flip(np.zeros(5)) == 1.0
    assert sign_flip(np.ones(40)) == pytest.approx(1 / 20000)


def test_holm_against_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_share_of_wins() -> None:
    draw = np.random.default_rng(4)
    rows = {name: points({str(i): [float(draw.normal(mean, 0.1))] for i in range(10)})
            for name, mean in {"low": 0.0, "high": 1.0}.items()}
    assert share_of_wins(rows, lower_is_better=True) == {"low": 1.0, "high": 0.0}
    assert share_of_wins(rows, lower_is_better=False) == {"low": 0.0, "high": 1.0}
    twins = share_of_wins({"a": rows["low"], "b": rows["low"]}, lower_is_better=True)
    assert twins == {"a": 0.5, "b": 0.5}
    assert share_of_wins({"a": rows["low"][:2], "b": rows["low"]}, lower_is_better=True) == {}


def test_auroc_is_the_mann_whitney_statistic_and_its_interval_covers() -> None:
    draws = np.random.default_rng(0)
    low, high = draws.normal(0, 1, 60).round(1).tolist(), draws.normal(1, 1, 60).round(1).tolist()
    found = auroc(low, high)
    expected = reference.mannwhitneyu(high, low).statistic / 3600
    assert found.value == pytest.approx(expected) and found.n == 60
    assert found.low is not None and found.high is not None and found.low < expected < found.high
    assert found.high - found.low < 0.3
    assert auroc(high, low).value == pytest.approx(1 - expected)


def test_perfect_separation_of_few_pairs_is_no_certainty() -> None:
    found = auroc([0.0] * 10, [1.0] * 10)
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(wilson(10, 10)[0])
    assert auroc([0.0], [1.0]).low is None and auroc([], []).value is None
    with pytest.raises(ValueError, match="pairs"):
        auroc([0.0], [1.0, 2.0])
