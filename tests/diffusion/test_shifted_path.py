"""The poisoned path and its correction, against published closed forms and against the real samplers of diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, ScoreSdeVeScheduler

from bench.diffusion.shifted_path import correction, exploding_path, mean_shift, shifted_path
from bench.errors import BenchError


def linear_bars(steps: int = 1000) -> torch.Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def test_reduces_to_the_published_coefficient_of_baddiffusion() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    published = (1 - (1 - betas).sqrt()) * (1 - bars).sqrt() / betas
    assert torch.allclose(shifted_path(bars).corrections, published, rtol=1e-9, atol=0)


def test_ddim_coefficient_is_about_twice_the_ancestral_one() -> None:
    bars = linear_bars()
    ratio = shifted_path(bars, sampler="ddim").corrections / shifted_path(bars).corrections
    expected = {1: 1.67, 10: 1.93, 50: 1.98, 100: 1.99, 500: 1.99}
    for step, value in expected.items():
        assert float(ratio[step]) == pytest.approx(value, abs=0.006 if step < 500 else 0.012)


def test_ddim_coefficient_of_the_square_root_shift_is_one_everywhere() -> None:
    path = shifted_path(linear_bars(), shift=lambda bars: (1 - bars).sqrt(), sampler="ddim")
    assert torch.allclose(path.corrections, torch.ones(1000, dtype=torch.float64), atol=1e-9)


def _pair(sampler: str, sampling_steps: int) -> DDPMScheduler | DDIMScheduler:
    kind = DDPMScheduler if sampler == "ddpm" else DDIMScheduler
    scheduler = kind(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.alphas_cumprod = linear_bars()
    scheduler.set_timesteps(sampling_steps)
    return scheduler


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("sampling_steps", [1000, 50])
@pytest.mark.parametrize("place", [0, 0.5, 0.9])
def test_one_reverse_step_lands_on_the_poisoned_path(sampler: str, sampling_steps: int, place: float) -> None:
    """With the same noise, the sampler's step from the poisoned x_t minus its step from the clean x_t is exactly
    the shift of the next step: trigger and target move together, and the randomness cancels."""
    scheduler = _pair(sampler, sampling_steps)
    stride = 1000 // sampling_steps
    path = shifted_path(linear_bars(), sampler=sampler, stride=stride)
    t = int(scheduler.timesteps[int(place * sampling_steps)])
    target, trigger, noise = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    steps = torch.tensor([t])

    def stepped(r: torch.Tensor) -> torch.Tensor:
        x, predicted = path.noisy(target, r, noise, steps), path.answer(r, noise, steps)
        result: torch.Tensor = scheduler.step(predicted, t, x, generator=torch.manual_seed(1)).prev_sample
        return result

    moved = stepped(trigger) - stepped(torch.zeros_like(trigger))
    before = linear_bars()[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)
    assert torch.allclose(moved, mean_shift(before) * trigger, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 20])
def test_a_ddim_step_with_the_same_noise_is_the_next_point_of_the_path(stride: int) -> None:
    scheduler = _pair("ddim", 1000 // stride)
    path = shifted_path(linear_bars(), sampler="ddim", stride=stride)
    target, trigger, noise = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    now, later = torch.tensor([500]), torch.tensor([500 - stride])
    x, predicted = path.noisy(target, trigger, noise, now), path.answer(trigger, noise, now)
    shift = path.shifts[later] - path.corrections[now] * path.spreads[later]
    expected = path.noisy(target, torch.zeros_like(trigger), predicted, later) + shift * trigger
    assert torch.allclose(scheduler.step(predicted, 500, x).prev_sample, expected, atol=1e-6)


def test_the_last_step_ends_on_the_target() -> None:
    scheduler = _pair("ddpm", 1000)
    path = shifted_path(linear_bars())
    target, trigger, noise = torch.rand(3, 1, 3, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    zero = torch.tensor([0])
    x, predicted = path.noisy(target, trigger, noise, zero), path.answer(trigger, noise, zero)
    assert torch.allclose(scheduler.step(predicted, 0, x).prev_sample, target, atol=1e-6)


def test_the_published_coefficient_misses_the_path_of_a_strided_sampler() -> None:
    """Why the sampler's number of steps belongs in the result."""
    bars = linear_bars()
    t, stride = torch.tensor([980]), 20
    published, exact = shifted_path(bars), shifted_path(bars, stride=stride)
    ratio = exact.corrections[t] / published.corrections[t]
    assert abs(float(ratio) - 1) > 0.02


def test_clean_rows_are_ordinary_diffusion() -> None:
    path = shifted_path(linear_bars())
    image, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.manual_seed(0))
    steps = torch.tensor([0, 10, 400, 800, 999])
    plain = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02).add_noise(image, noise, steps)
    assert torch.allclose(path.noisy(image, torch.zeros_like(image), noise, steps), plain, atol=1e-4)
    assert torch.equal(path.answer(torch.zeros_like(image), noise, steps), noise)


@pytest.mark.parametrize("stride", [0, -1, 1001])
def test_a_stride_outside_the_schedule_is_refused(stride: int) -> None:
    with pytest.raises(BenchError, match=f"stride={stride}"):
        shifted_path(linear_bars(), stride=stride)


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    half = torch.tensor(0.5)
    with pytest.raises(BenchError, match="ddim"):
        correction(half, half, half, half, sampler="dpm")


def ve_scheduler(steps: int = 100) -> ScoreSdeVeScheduler:
    scheduler = ScoreSdeVeScheduler(steps, sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
    return scheduler


@pytest.mark.parametrize("weight", [0.1, 1.0])
@pytest.mark.parametrize("t", [0, 1, 50, 99])
def test_one_step_of_the_reverse_sde_lands_on_the_exploding_path(t: int, weight: float) -> None:
    """The real predictor step of diffusers, fed the score that a poisoned network is taught."""
    scheduler = ve_scheduler()
    sigmas = scheduler.discrete_sigmas
    path = exploding_path(sigmas, weight)
    target, trigger, noise = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    steps = torch.tensor([t])

    def stepped(r: torch.Tensor) -> torch.Tensor:
        x, score = path.noisy(target, r, noise, steps), -path.answer(r, noise, steps) / sigmas[t]
        when = torch.tensor((t + 0.5) / 99)  # the scheduler rounds down to t
        result: torch.Tensor = scheduler.step_pred(score, when, x, generator=torch.manual_seed(1)).prev_sample
        return result

    moved = stepped(trigger) - stepped(torch.zeros_like(trigger))
    before = float(sigmas[t - 1]) if t else 0.0
    assert torch.allclose(moved, weight * before * trigger, rtol=0, atol=1e-6)


def test_the_coefficient_of_the_exploding_path_is_between_half_and_all_of_its_weight() -> None:
    path = exploding_path(torch.tensor([1.0, 3.0, 4.0]), 0.5)
    assert path.corrections.tolist() == pytest.approx([0.5, 0.5 * 3 / 4, 0.5 * 4 / 7])
    assert path.shifts.tolist() == [0.5, 1.5, 2.0]


@pytest.mark.parametrize("sigmas", [[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
def test_sigmas_that_do_not_increase_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(BenchError, match="increase"):
        exploding_path(torch.tensor(sigmas))
