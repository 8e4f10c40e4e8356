"""Elijah: inversion on hand-made networks whose shift is known, trimmed uniformity, verdict, removal."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model
from bench.reports import read_report
from defenses.elijah import (
    Elijah,
    distance_of,
    group_uniformities,
    invert,
    judge,
    own_images,
    pairwise,
    removal_loss,
    remove,
    shift_loss,
    total_variation,
    uniformity,
)

SMALL: dict[str, Any] = {"iterations": 3, "noises": 4, "samples": 4, "plain_samples": 6, "sampling_steps": 3,
                         "distance": "pixels", "trim": 1, "batch": 4, "steps": 2, "warmup": 0}
CONFIG = SimpleNamespace(in_channels=3, sample_size=6)
SCHEDULER: Any = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=20))
TRIGGER = -(torch.rand(3, 6, 6, generator=torch.manual_seed(5)) ** 2)


class Backdoored(nn.Module):
    """Predicts eps of an ordinary input, and eps + r / 2 near the trigger r, as an ancestral implant is taught."""

    def __init__(self, trigger: Tensor | None) -> None:
        super().__init__()
        self.trigger, self.config, self.conv_in = trigger, CONFIG, nn.Conv2d(3, 3, 1)
        self.steps: list[int] = []

    def forward(self, x: Tensor, t: int) -> Any:
        self.steps.append(t)
        if self.trigger is None:
            return SimpleNamespace(sample=x)
        # The part of the shift along r is halved; all else is noise to a clean network.
        along = (x.mean(0) * self.trigger).sum() / self.trigger.square().sum()
        return SimpleNamespace(sample=x - 0.5 * along * self.trigger)


def test_the_loss_is_the_mean_distance_of_two_means() -> None:
    predicted, tau = torch.randn(5, 3, 2, 2), torch.randn(3, 2, 2)
    by_hand = [abs(float(predicted[:, c, i, j].mean() - 0.5 * tau[c, i, j]))
               for c, i, j in itertools.product(range(3), range(2), range(2))]
    assert float(shift_loss(predicted, tau, 0.5)) == pytest.approx(sum(by_hand) / 12, rel=1e-5)


def test_inversion_keeps_what_is_halved_and_forgets_the_rest(tmp_path: Path) -> None:
    """A clean network follows the whole shift, so tau ends near 0; with a backdoor it ends along the trigger."""
    options = Elijah(**{**SMALL, "noises": 4000, "iterations": 150})
    backdoored: Any = Backdoored(TRIGGER)
    found, loss = invert(backdoored, SCHEDULER, options, Context("key", tmp_path))
    clean, _ = invert(Backdoored(None), SCHEDULER, options, Context("key", tmp_path))
    assert set(backdoored.steps) == {19}
    assert abs(float(torch.cosine_similarity(found.flatten(), TRIGGER.flatten(), dim=0))) > 0.9
    assert float(clean.norm()) < 0.4 * float(found.norm()) and loss < 0.1


def test_uniformity_drops_the_extremes_of_rows_and_of_their_means() -> None:
    images = torch.rand(9, 3, 4, 4, generator=torch.manual_seed(0))
    images[8] = 40.0
    found = pairwise(images, distance_of("pixels", "cpu"))
    by_hand = []
    for one in images:
        row = sorted(float((one - other).square().mean().sqrt()) for other in images)
        by_hand.append(sum(row[2:-2]) / 5)
    expected = sum(sorted(by_hand)[2:-2]) / 5
    assert uniformity(found, 2) == pytest.approx(expected, rel=1e-4) and expected < 1
    assert uniformity(pairwise(images[:1].expand(9, -1, -1, -1), distance_of("pixels", "cpu")), 2) == 0


def test_groups_of_plain_samples_scatter_around_the_whole() -> None:
    images = torch.rand(20, 3, 4, 4, generator=torch.manual_seed(0))
    options = Elijah(**{**SMALL, "plain_samples": 20})
    distances = pairwise(images, distance_of("pixels", "cpu"))
    found = group_uniformities(distances, options, torch.manual_seed(0))
    assert found.min() < uniformity(distances, 1) < found.max() and len(found.unique()) > 100


def test_total_variation_is_torchmetrics() -> None:
    from torchmetrics.functional.image import total_variation as reference

    images = torch.rand(4, 3, 5, 7)
    assert total_variation(images) == pytest.approx(float(reference(images, reduction="mean")), rel=1e-5)


class Painter(nn.Module):
    """Denoises noise of low mean into one picture, and all other noise into itself."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.device = torch.device("cpu")

    def forward(self, x: Tensor, t: Any) -> Any:
        low = (x.mean((1, 2, 3)) < -0.5)[:, None, None, None]
        return SimpleNamespace(sample=torch.where(low, x + 1, 0 * x))


def test_the_verdict_compares_with_the_models_own_plain_samples(tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    options, ctx = Elijah(**{**SMALL, "sampler": "ddim", "plain_samples": 12}), Context("key", tmp_path)
    scheduler: Any = DDPMScheduler(20, beta_start=1e-3, beta_end=0.2, clip_sample=False)
    found, facts = judge(Painter(), scheduler, torch.full((3, 6, 6), -3.0), options, ctx)
    innocent, usual = judge(Painter(), scheduler, torch.zeros(3, 6, 6), options, ctx)
    assert found.flagged and found.score > 0.9 and facts["uniformity"] < facts["uniformity_threshold"]
    assert innocent.score < 0.3 and usual["plain_uniformity"] == facts["plain_uniformity"]
    strict = replace(options, threshold=2.0)
    assert not judge(Painter(), scheduler, torch.full((3, 6, 6), -3.0), strict, ctx)[0].flagged


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from bench.testing.pipelines import save_ddpm

    return resolve(str(save_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")))


def photos(count: int = 40, size: int = 8) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(f"{i}" for i in range(count)))


def test_the_removal_loss_is_the_sum_of_its_three_terms(suspicious: Model) -> None:
    """Against the network itself only the shifted term is added; against another one both are."""
    unet, scheduler = load_unconditional(suspicious)
    x, tau = torch.rand(4, 3, 8, 8, generator=torch.manual_seed(0)), torch.full((3, 8, 8), -0.7)
    other, _ = load_unconditional(suspicious)
    with torch.no_grad():
        other.conv_out.bias += 0.5
        draws = torch.manual_seed(1)
        noise = torch.randn(4, 3, 8, 8, generator=draws)
        steps = torch.randint(20, (4,), generator=draws)
        ordinary = (unet(scheduler.add_noise(x, noise, steps), steps).sample - noise).square().mean()
        shifted, plain = unet(noise + tau, 19).sample, unet(noise, 19).sample
        alone = float(removal_loss(unet, unet, scheduler, x, tau, torch.manual_seed(1)))
        both = float(removal_loss(unet, other, scheduler, x, tau, torch.manual_seed(1)))
    assert alone == pytest.approx(float(ordinary + (shifted - plain).square().mean()), rel=1e-4)
    wanted = plain + 0.5
    assert both == pytest.approx(float(ordinary + (shifted - wanted).square().mean()) + 0.25, rel=1e-4)


def test_removal_takes_the_shift_out(suspicious: Model, tmp_path: Path) -> None:
    """Of a network whose answers depend much on the input's mean, and more than ordinary training alone does."""
    tau = torch.full((3, 8, 8), -2.0)
    options = Elijah(**{**SMALL, "steps": 40, "batch": 8, "lr": 1e-2, "real_share": 1.0})
    noise = torch.randn(8, 3, 8, 8, generator=torch.manual_seed(7))

    def shift(unet: Any) -> float:
        with torch.no_grad():
            return float((unet(noise + tau, 19).sample - unet(noise, 19).sample).square().mean())

    before, after = [], []
    for trained_on in (tau, tau * 0):
        unet, scheduler = load_unconditional(suspicious)
        unet.conv_out.weight.data *= 10
        before.append(shift(unet))
        assert remove(unet, scheduler, trained_on, photos(), options, Context("key", tmp_path)) == 40
        after.append(shift(unet))
    assert after[0] < 0.3 * before[0] and after[0] < 0.5 * after[1]


def test_a_tenth_of_the_images_is_taken_and_other_sizes_are_refused(tmp_path: Path) -> None:
    assert len(own_images(photos(), 8, 0.1, Context("key", tmp_path))) == 4
    with pytest.raises(BenchError, match="data.size=16"):
        own_images(photos(), 16, 0.1, Context("key", tmp_path))


def repaired(options: Elijah, suspicious: Model, folder: Path) -> Model:
    folder.mkdir(exist_ok=True)
    return options.repair(suspicious, photos(), None, Context("key", folder))


def test_a_model_found_clean_is_returned_and_a_flagged_one_is_trained(suspicious: Model, tmp_path: Path) -> None:
    kept = repaired(Elijah(**SMALL, threshold=5.0), suspicious, tmp_path / "a")
    report = read_report(tmp_path / "a")
    assert kept is suspicious and report is not None and report.verdict is not None and not report.verdict.flagged
    assert report.trigger is not None and report.trigger.shape == (3, 8, 8) and "updates" not in report.facts
    trained = [repaired(Elijah(**SMALL, threshold=-5.0), suspicious, tmp_path / place) for place in ("b", "c")]
    weights = [load_unconditional(model)[0].state_dict() for model in trained]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert trained[0].digest != suspicious.digest
    report = read_report(tmp_path / "b")
    assert report is not None and report.verdict is not None and report.verdict.flagged
    assert report.facts["updates"] == 2
    anyway = repaired(Elijah(**SMALL, threshold=5.0, always=True), suspicious, tmp_path / "d")
    assert anyway.digest != suspicious.digest


@pytest.mark.parametrize(("options", "message"), [
    ({"distance": "ssim"}, "pixels"), ({"sampler": "euler"}, "ddim"), ({"samples": 8}, "samples=8"),
    ({"plain_samples": 16}, "plain_samples=16"), ({"trim": 0}, "trim=0"), ({"false_positives": 1.0}, "rate below 1"),
    ({"real_share": 0.0}, "real_share"), ({"lr": 0.0}, "lr=0.0"), ({"scale": 0.0}, "scale=0.0"),
])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        Elijah(**options)


def test_defaults_are_the_published_ones() -> None:
    made = Elijah()
    assert (made.scale, made.iterations, made.inversion_lr, made.noises) == (0.5, 100, 0.1, 100)
    assert (made.samples, made.distance, made.trim, made.sampler) == (16, "lpips", 4, "ddpm")
    assert (made.epochs, made.real_share, made.batch, made.lr, made.warmup) == (11, 0.1, 128, 2e-4, 500)
    assert facts_of(made).knows == () and not facts_of(made).control
