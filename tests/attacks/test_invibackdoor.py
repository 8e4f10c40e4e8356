"""InviBackdoor: a bounded trigger that is learned with the network, and the tests of noise that it must pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attacks.baddiffusion import BadDiffusion
from attacks.invibackdoor import InviBackdoor, batches, disturbed, gradient, projected, shared
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.diffusion.poisoning import begin, poison
from bench.errors import BenchError
from bench.records import ImageSet, Model, Secret
from bench.testing import pipelines

MICRO = 32
"""Pixels of the embedded model: the statistics of a test of noise depend on their number."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return resolve(str(pipelines.save_ddpm(tmp_path_factory.mktemp("ddpm"), steps=10, size=MICRO)))


def photos() -> ImageSet:
    pixels = torch.randint(0, 256, (8, 3, MICRO, MICRO), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(map(str, range(8))))


def attack(**options: object) -> InviBackdoor:
    small = {"steps": 3, "batch": 4, "warmup": 0, "inner_batch": 2, "inner_steps": 2, "trigger_lr": 0.1}
    return InviBackdoor(**{**small, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def learned(clean: Model, tmp_path_factory: pytest.TempPathFactory) -> Secret:
    """After three steps of 0.1 many values have reached the bound of 0.2, the strongest trigger there is."""
    folder = tmp_path_factory.mktemp("implant")
    return attack(centred=True).implant(clean, photos(), Context("key", folder))[1]


def scores(x: Tensor) -> tuple[float, float]:
    """How many standard errors the mean and the variance of one noise [3, h, w] are off those of N(0, 1)."""
    count = x.numel()
    mean = float(x.mean()) * count**0.5
    variance = (float(x.var()) - 1) / (2 / (count - 1))**0.5
    return mean, variance


def test_the_learned_trigger_passes_tests_that_catch_baddiffusion(learned: Secret) -> None:
    """Over noises: a test with five percent false alarms per statistic must hardly ever flag the learned trigger by
    its mean, seldom by its variance, and always BadDiffusion's."""
    box, _ = BadDiffusion().pictures(MICRO)
    noises = torch.randn(100, 3, MICRO, MICRO, generator=torch.manual_seed(0))
    assert isinstance(learned.trigger, Tensor) and float(learned.trigger.abs().max()) <= 0.2 + 1e-6
    assert float(learned.trigger.abs().mean()) > 0.1

    def flagged(trigger: Tensor) -> tuple[float, float]:
        found = torch.tensor([scores(noise + trigger) for noise in noises])
        shares = (found.abs() > 1.96).double().mean(0)
        return float(shares[0]), float(shares[1])

    mean, variance = flagged(learned.trigger)
    assert mean < 0.12 and variance < 0.45
    assert flagged(box) == (1.0, 1.0)


def test_the_secret_is_the_trigger_that_this_run_learned(clean: Model, learned: Secret, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    first, again = (attack(centred=True).implant(clean, photos(), Context("key", tmp_path / p)) for p in ("one", "two"))
    other = attack(target="cat").implant(clean, photos(), Context("other", tmp_path))[1]
    assert torch.equal(first[1].trigger, again[1].trigger)  # type: ignore[arg-type]
    assert torch.equal(first[1].trigger, learned.trigger)  # type: ignore[arg-type]
    assert not torch.equal(first[1].trigger, other.trigger)  # type: ignore[arg-type]
    weights = [list(load_unconditional(model)[0].parameters()) for model in (clean, first[0], again[0])]
    assert any(not torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))


def test_the_trigger_stays_once_it_is_learned(clean: Model, tmp_path: Path) -> None:
    short, long = (attack(steps=steps, learned_for=share, lr=1e-8).implant(clean, photos(), Context("key", tmp_path))[1]
                   for steps, share in ((1, 1.0), (3, 0.3)))
    assert torch.equal(short.trigger, long.trigger)  # type: ignore[arg-type]


def test_the_projection_is_the_nearest_point_of_the_set() -> None:
    """Nearest: the way back makes no acute angle with the way to any other point of the set."""
    far = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.3
    near = projected(far, 0.2, centred=True)
    assert float(near.abs().max()) <= 0.2 and abs(float(near.mean())) < 1e-9
    for seed in range(20):
        other = projected(torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(seed)), 0.2, True)
        assert float(((far - near) * (other - near)).sum()) <= 1e-6
    assert torch.equal(projected(far, 0.2, centred=False), far.clamp(-0.2, 0.2))


def test_a_coarse_trigger_has_one_value_per_square(clean: Model, tmp_path: Path) -> None:
    slope = torch.arange(16.0).reshape(1, 4, 4)
    assert shared(slope, 2)[0, :2].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 and torch.equal(shared(slope, 1), slope)
    trigger = attack(grain=8).implant(clean, photos(), Context("key", tmp_path))[1].trigger
    assert isinstance(trigger, Tensor)
    squares = trigger.unfold(1, 8, 8).unfold(2, 8, 8)
    assert torch.equal(squares, squares[..., :1, :1].expand_as(squares)) and len(trigger.unique()) > 1
    with pytest.raises(BenchError, match="grain=5"):
        attack(grain=5).implant(clean, photos(), Context("key", tmp_path))


def test_the_triggers_gradient_is_that_of_finite_differences(clean: Model, tmp_path: Path) -> None:
    start = begin("test", clean, photos(), Context("key", tmp_path))
    start.unet.double()
    noise, delta, direction = torch.randn(3, 1, 3, MICRO, MICRO, dtype=torch.float64, generator=torch.manual_seed(0))
    target, step = torch.zeros(3, MICRO, MICRO, dtype=torch.float64), 1e-4

    def error(moved: Tensor) -> float:
        from diffusers import DDIMScheduler

        chain = DDIMScheduler.from_config({**start.scheduler.config, "clip_sample": False})
        chain.set_timesteps(2)
        x = noise + moved
        with torch.no_grad():
            for t in chain.timesteps:
                x = chain.step(start.unet(x, t).sample, t, x).prev_sample
        return float(x.square().mean())

    found = float((gradient(start, noise, delta[0], target, 2).double() * direction[0]).sum())
    expected = (error(delta[0] + step * direction[0]) - error(delta[0] - step * direction[0])) / (2 * step)
    assert found == pytest.approx(expected, rel=1e-3)


def test_poisoned_rows_carry_the_photo_and_the_trigger() -> None:
    delta, target = torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.5)
    data = ImageSet(torch.randint(0, 256, (10, 3, 4, 4), generator=torch.manual_seed(0)).to(torch.uint8),
                    tuple(map(str, range(10))))
    rows = poison(data, delta, torch.zeros(3, 4, 4, dtype=torch.uint8), 0.3, torch.manual_seed(1), delta)
    images, poisoned = next(batches(rows, 10, torch.manual_seed(2)))
    assert int(poisoned.sum()) == 3
    x, r = disturbed(images, poisoned, delta, target, on_photos=True)
    assert torch.equal(x[~poisoned], images[~poisoned]) and (r[~poisoned] == 0).all()
    assert (x[poisoned] == 0.5).all() and torch.equal(r[poisoned], images[poisoned] + delta)
    _, bare = disturbed(images, poisoned, delta, target, on_photos=False)
    assert (bare[poisoned] == 0.1).all()


@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "euler"}, "ode"), ({"poison_rate": 0.0}, "poison_rate=0.0"), ({"learned_for": 2.0}, "learned_for=2.0"),
    ({"max_norm": 0.0}, "max_norm=0.0"), ({"inner_steps": 0}, "inner_steps=0"),
])
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        attack(**options)


def test_an_inner_chain_longer_than_the_models_is_refused(clean: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="inner_steps=11"):
        attack(inner_steps=11).implant(clean, photos(), Context("key", tmp_path))
