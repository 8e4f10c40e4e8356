"""The Trojan path: its kernels against sums and products of Gaussians, its samplers against an all-knowing network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.sampling import draw_unconditional
from bench.diffusion.trojan_path import (
    TrojanPath,
    draw_trojan,
    kernel_shift,
    sampler_detail,
    step_back,
    triggered_noise,
    trojan_path,
)
from bench.errors import BenchError
from bench.protocols import BackdoorProtocol
from bench.records import Secret

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
BARS = torch.cumprod(1 - BETAS, 0)
BOX = (4, 5, 3, 2)


def delta(size: int = 8) -> Tensor:
    return torch.rand(3, size, size, dtype=torch.float64, generator=torch.manual_seed(1)) * 2 - 1


def before(t: int) -> Tensor:
    return BARS[t - 1] if t else torch.ones((), dtype=torch.float64)


def test_the_kernels_shifts_add_up_to_the_paths_own() -> None:
    """Unrolled: x_t is moved by the sum of k_j mu, each shrunk by the square roots of the alphas after j."""
    moved = 0.0
    for t in range(1000):
        alpha = float(1 - BETAS[t])
        moved = alpha**0.5 * moved + float(kernel_shift(BARS[t], before(t)))
        if t in (0, 1, 10, 500, 999):
            assert moved == pytest.approx(float((1 - BARS[t]).sqrt()), abs=1e-10)


def test_kernels_of_longer_strides_compose_single_steps() -> None:
    single, t, s = 0.0, 600, 560
    for place in range(s + 1, t + 1):
        single = float(1 - BETAS[place])**0.5 * single + float(kernel_shift(BARS[place], BARS[place - 1]))
    assert float(kernel_shift(BARS[t], BARS[s])) == pytest.approx(single, abs=1e-10)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (500, 480), (1, 0)])
def test_the_ancestral_step_is_the_posterior_of_two_gaussians(t: int, s: int) -> None:
    """x_s given y and x_t, by completing the square on q(x_s | y) q(x_t | x_s) in precisions."""
    gamma, mu, y, x_t, noise = 0.6, 0.3, -0.4, 0.7, 1.3
    path = TrojanPath(BARS, torch.full((1, 1, 1), gamma).double(), torch.full((1, 1, 1), mu).double())
    alpha = float(BARS[t] / BARS[s])
    prior_mean = float(BARS[s].sqrt()) * y + float((1 - BARS[s]).sqrt()) * mu
    prior_variance, step_variance = gamma**2 * float(1 - BARS[s]), gamma**2 * (1 - alpha)
    evidence = (x_t - float(kernel_shift(BARS[t], BARS[s])) * mu) / alpha**0.5
    variance = 1 / (1 / prior_variance + alpha / step_variance)
    mean = variance * (prior_mean / prior_variance + evidence * alpha / step_variance)
    eps = ((x_t - float(BARS[t].sqrt()) * y) / float((1 - BARS[t]).sqrt()) - mu) / gamma
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = step_back(path, one * x_t, one * eps, t, s, "ddpm", one * noise)
    assert float(found) == pytest.approx(mean + variance**0.5 * noise, abs=1e-7)


@pytest.mark.parametrize("box", [(), BOX])
@pytest.mark.parametrize(("t", "s"), [(999, 979), (20, 0), (0, -1)])
def test_a_ddim_step_with_the_true_noise_walks_along_the_path(t: int, s: int, box: tuple[int, ...]) -> None:
    path = trojan_path(BARS, delta(), 0.6, box)
    image, noise = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    x = path.noisy(image, noise, torch.tensor([t, t]))
    expected = path.noisy(image, noise, torch.tensor([s, s])) if s >= 0 else image
    assert torch.allclose(step_back(path, x, noise, t, s, "ddim", noise), expected, atol=1e-8)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_outside_its_box_a_patch_leaves_the_ordinary_samplers_step(sampler: str) -> None:
    kind = DDPMScheduler if sampler == "ddpm" else DDIMScheduler
    scheduler = kind(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(1000)
    path = trojan_path(scheduler.alphas_cumprod, delta(), 0.1, BOX)
    x, predicted = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    ordinary = scheduler.step(predicted, 500, x, generator=torch.manual_seed(5)).prev_sample
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.manual_seed(5))
    moved = (step_back(path, x, predicted, 500, 499, sampler, noise) - ordinary).abs()[0].amax(0)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[4:7, 5:7] = True
    assert float(moved[~inside].max()) < 1e-5 < float(moved[inside].min())


def test_the_terminal_distribution_has_the_stated_mean_and_deviation() -> None:
    path = trojan_path(BARS, torch.full((3, 8, 8), 0.5), 0.6)
    start = path.start(torch.randn(2000, 3, 8, 8, generator=torch.manual_seed(0)))
    assert float(start.mean()) == pytest.approx(0.4 * 0.5, abs=0.01)
    assert float(start.std()) == pytest.approx(0.6, abs=0.01)
    ends = path.noisy(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.tensor([999]))
    assert float(ends.mean()) == pytest.approx(0.4 * 0.5, abs=1e-4)


def test_the_clipped_sampler_cuts_its_estimate_of_the_image() -> None:
    path = trojan_path(BARS, delta(), 0.6)
    far = torch.full((1, 3, 8, 8), 9.0, dtype=torch.float64)
    assert float(step_back(path, far, torch.zeros_like(far), 0, -1, "ddpm", far, clip=True).max()) == pytest.approx(1)


def test_triggered_noise_is_the_secrets_start() -> None:
    noise = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    path = trojan_path(BARS, delta(), 0.1, BOX)
    target = torch.zeros(3, 8, 8, dtype=torch.uint8)
    own = Secret(path.mean, target, {"sampler": sampler_detail(0.1, BOX, True)})
    assert torch.allclose(triggered_noise(noise, own), path.start(noise))
    assert torch.equal(triggered_noise(noise, Secret(delta(), target)), noise + delta())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_images_depend_on_their_own_seed_and_differ_from_ordinary_ones(
    tiny_ddpm: Path, tmp_path: Path, sampler: str,
) -> None:
    model, ctx = resolve(str(tiny_ddpm)), Context("key", tmp_path)
    protocol = BackdoorProtocol(sampler=sampler, steps=20)
    path = trojan_path(torch.ones(1), delta().float(), 0.6)
    secret = Secret(path.mean, torch.zeros(3, 8, 8, dtype=torch.uint8), {"sampler": sampler_detail(0.6, (), False)})
    whole = draw_trojan(model, [1, 2, 3], secret, protocol, ctx)
    assert whole.shape == (3, 3, 8, 8) and whole.dtype == torch.uint8
    assert (draw_trojan(model, [3, 1, 2], secret, protocol, ctx).int() - whole[[2, 0, 1]].int()).abs().max() <= 1
    assert not torch.equal(whole, draw_unconditional(model, [1, 2, 3], secret.trigger, protocol, ctx))


def test_without_a_trigger_the_trojan_sampler_is_the_ordinary_one(tiny_ddpm: Path, tmp_path: Path) -> None:
    """gamma is as near to 1 as makes no difference, so both must draw the same."""
    model, ctx, protocol = resolve(str(tiny_ddpm)), Context("key", tmp_path), BackdoorProtocol(steps=20)
    secret = Secret(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                    {"sampler": sampler_detail(1 - 1e-9, (), False)})
    trojan = draw_trojan(model, [1, 2], secret, protocol, ctx)
    assert (trojan.int() - draw_unconditional(model, [1, 2], None, protocol, ctx).int()).abs().max() <= 1


def test_bad_values_are_refused() -> None:
    with pytest.raises(BenchError, match="gamma=1"):
        trojan_path(BARS, delta(), 1.0)
    one = torch.zeros(1, 3, 8, 8)
    with pytest.raises(BenchError, match="ddim"):
        step_back(trojan_path(BARS, delta(), 0.5), one, one, 5, 4, "unipc", one)
