"""Ranks over resamplings: shares, ties, and whether their intervals hold the true rank."""

import numpy as np

from bench.placings import placings
from bench.stats import Point
from tests.test_stats import Draw, points, sampled


def lines_of(means: dict[str, float], units: int, draw: Draw, sd: float = 0.1) -> dict[str, list[Point]]:
    base = draw.normal(0, 1, units)
    return {name: points({str(i): [float(base[i] + draw.normal(mean, sd))] for i in range(units)})
            for name, mean in means.items()}


def test_ranks_over_resamplings() -> None:
    rows = lines_of({"low": 0.0, "high": 1.0}, 10, np.random.default_rng(4))
    found = placings(rows, lower_is_better=True)
    assert {name: (p.first, p.mean, p.low, p.high) for name, p in found.items()} == {
        "low": (1.0, 1.0, 1, 1), "high": (0.0, 2.0, 2, 2)}
    assert placings(rows, lower_is_better=False)["high"].first == 1.0
    twins = placings({"a": rows["low"], "b": rows["low"]}, lower_is_better=True)
    assert {(p.first, p.low, p.high) for p in twins.values()} == {(0.5, 1, 1)}
    assert placings({"a": rows["low"][:2], "b": rows["low"]}, lower_is_better=True) == {}


def test_rank_intervals_hold_the_true_rank() -> None:
    draw, means, held = np.random.default_rng(10), {"a": 0.0, "b": 0.05, "c": 0.1, "d": 0.3}, np.zeros(4)
    for _ in range(150):
        found = placings(lines_of(means, 10, draw), lower_is_better=True, resamples=1000)
        held += [found[name].low <= rank <= found[name].high for rank, name in enumerate("abcd", 1)]
    assert (held / 150 >= 0.93).all()


def test_ranks_vary_with_the_seeds_too() -> None:
    """b beats a with one seed and loses with the other, in all units alike: neither is first for sure."""
    a = np.random.default_rng(11).normal(0, 1, (8, 1, 1)) + np.zeros((8, 2, 2))
    b = a + np.array([0.5, -0.6])[None, :, None]
    found = placings({"a": sampled(a), "b": sampled(b)}, lower_is_better=True)
    assert (found["a"].low, found["a"].high) == (1, 2)
    assert 0.2 < found["a"].first < 0.8
