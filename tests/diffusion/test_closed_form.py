"""Closed-form edits against a dense least-squares solve, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.diffusion.checkpoints import resolve
from bench.diffusion.closed_form import cross_attention_projections, edit_cross_attention, edit_matrix
from bench.diffusion.loading import load_components
from bench.errors import BenchError

WIDTH = 6


def states(seed: int, *shape: int, width: int = WIDTH) -> Tensor:
    return torch.randn(*shape, width, generator=torch.manual_seed(seed))


def dense_solve(weight: Tensor, source: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """argmin ||S X^T - G W^T||^2 + ridge ||X - W||^2 as one stacked least-squares problem."""
    root = ridge**0.5
    left = torch.cat([source, root * torch.eye(source.shape[1], dtype=torch.float64)])
    right = torch.cat([wanted @ weight.T, root * weight.T])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_equals_a_dense_least_squares_solve(ridge: float) -> None:
    weight, source, wanted, kept = states(0, 9).double(), states(1, 2, 4), states(2, 2, 4), states(3, 5)
    found = weight @ edit_matrix([(source, wanted)], [kept], ridge)
    stacked = torch.cat([source.reshape(-1, WIDTH), kept]).double()
    goals = torch.cat([wanted.reshape(-1, WIDTH), kept]).double()
    assert torch.allclose(found, dense_solve(weight, stacked, goals, ridge), atol=1e-9)


def test_a_preserved_state_that_counts_thrice_is_one_given_three_times() -> None:
    pair, kept = (states(1, 3), states(2, 3)), states(3, 2)
    assert torch.allclose(edit_matrix([pair], [kept], preserve_weight=3), edit_matrix([pair], [kept] * 3))


def test_a_pair_of_equal_states_changes_nothing() -> None:
    same = states(1, 7)
    assert torch.allclose(edit_matrix([(same, same)]), torch.eye(WIDTH, dtype=torch.float64), atol=1e-12)


def test_a_small_ridge_gives_sources_the_wanted_answers_and_keeps_the_preserved(tiny_sd: Path) -> None:
    unet = load_components(resolve(str(tiny_sd))).unet
    layers = cross_attention_projections(unet)
    width = next(iter(layers.values())).in_features
    source, wanted, kept = states(1, 2, width=width), states(2, 2, width=width), states(3, 3, width=width)
    before = {name: (layer(wanted), layer(kept)) for name, layer in layers.items()}
    assert set(edit_cross_attention(unet, [(source, wanted)], [kept], ridge=1e-8)) == set(layers)
    for name, layer in layers.items():
        assert torch.allclose(layer(source), before[name][0], atol=1e-4)
        assert torch.allclose(layer(kept), before[name][1], atol=1e-4)


def test_only_keys_and_values_of_cross_attention_are_touched(tiny_sd: Path) -> None:
    unet = load_components(resolve(str(tiny_sd))).unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    width = unet.config.cross_attention_dim
    edited = edit_cross_attention(unet, [(states(1, 2, width=width), states(2, 2, width=width))])
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in edited}
    assert edited and all(".attn2." in name and name.endswith(("to_k", "to_v")) for name in edited)


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(BenchError, match="ridge"):
        edit_matrix([(states(1, 2), states(2, 2))], ridge=0)
    with pytest.raises(BenchError, match="pair"):
        edit_matrix([])
    with pytest.raises(BenchError, match="cross-attention"):
        cross_attention_projections(nn.Linear(2, 2))
