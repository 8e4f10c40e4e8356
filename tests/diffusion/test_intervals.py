"""The search for time intervals: what it drops, what it keeps, and that it follows the gradient."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench.diffusion.checkpoints import resolve
from bench.diffusion.intervals import Search, Setting, compare, pick, select_intervals, without
from bench.diffusion.loading import load_components
from bench.diffusion.losses import encode_prompts
from bench.diffusion.surrogates import Draws


class Favourite(Setting):
    """Gradients as large as the timestep, so that the late half of the chain is worth most."""

    def gradient(self, x: Tensor, draws: Draws) -> Tensor:
        return (draws.timesteps.float() + 1)[:, None, None, None].expand_as(x)


def favourite(steps: int = 1000) -> Setting:
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4, block_out_channels=(8, 8)))
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=steps))
    return Favourite(cast(Any, vae), None, cast(Any, scheduler), torch.zeros(1), alpha_255=2, eps=8, batch=4)


def test_the_neighbourhood_of_the_worst_is_dropped() -> None:
    kept = torch.ones(3, 1000, dtype=torch.bool)
    left = without(kept, torch.tensor([500, 3, 999]), 20)
    for row, first in zip(left, (480, 0, 960)):  # [c - 20, c + 20), c within [20, 980]
        assert (~row).nonzero().flatten().tolist() == list(range(first, first + 40))


def test_a_photo_is_never_left_with_nothing() -> None:
    kept = torch.zeros(1, 10, dtype=torch.bool)
    kept[0, 4:6] = True
    assert torch.equal(without(kept, torch.tensor([5]), 5), kept)


def test_comparison_finds_the_largest_and_the_smallest_gradient() -> None:
    kept = torch.zeros(2, 1000, dtype=torch.bool)
    kept[0, [10, 400]] = True
    kept[1, [7, 990]] = True
    best, worst = compare(40, favourite(), torch.zeros(2, 3, 16, 16), kept, torch.Generator().manual_seed(0))
    assert best.tolist() == [400, 990]
    assert worst.tolist() == [10, 7]


def test_the_search_keeps_few_timesteps_and_those_of_large_gradients() -> None:
    x = torch.zeros(4, 3, 16, 16)
    kept = select_intervals(Search(), favourite(), x, torch.Generator().manual_seed(0))
    counts = kept.sum(1)
    assert torch.all((counts >= 60) & (counts <= 100))  # the last of the rounds drops at most 40 of at least 101
    mean = (kept * torch.arange(1000)).sum(1) / counts
    assert torch.all(mean > 650)
    assert torch.equal(x, torch.zeros_like(x))


def test_no_rounds_keep_every_timestep_and_few_rounds_leave_more() -> None:
    x = torch.zeros(1, 3, 16, 16)
    everything, some = (select_intervals(Search(rounds=n), favourite(), x, torch.Generator()) for n in (0, 3))
    assert everything.all()
    assert 880 <= some.sum() < 1000


def test_drawn_timesteps_are_kept_ones() -> None:
    kept = torch.zeros(2, 50, dtype=torch.bool)
    kept[0, [3, 30]] = True
    kept[1, 49] = True
    drawn = torch.stack([pick(kept, torch.Generator().manual_seed(seed)) for seed in range(30)])
    assert set(drawn[:, 0].tolist()) == {3, 30}
    assert set(drawn[:, 1].tolist()) == {49}


@pytest.mark.parametrize("alpha", [0.5, 40])
def test_on_a_network_each_photo_has_its_own_interval(tiny_sd: Path, alpha: float) -> None:
    """Not a matter of the company: photo 0 alone meets other noise, but the step size acts on what is kept."""
    parts = load_components(resolve(str(tiny_sd)))
    states = encode_prompts(parts.tokenizer, parts.text_encoder, ["a photo of sks person"]).detach()
    setting = Setting(parts.vae, parts.unet, parts.scheduler, states, alpha, 64, 4)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    kept = select_intervals(Search(tries=2, radius=100, keep=300), setting, x, torch.Generator().manual_seed(1))
    assert torch.all(kept.sum(1) <= 300) and torch.all(kept.sum(1) > 0)
    assert not torch.equal(kept[0], kept[1])
