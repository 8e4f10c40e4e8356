"""TERD: the paired loss against a hand-made sum, both stages on a network with a known trigger, both verdicts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.errors import BenchError, Incompatible
from bench.plugin import facts_of
from bench.records import Model, Report
from bench.reports import read_report
from defenses.terd import Terd, descended, differentiable_ddim, divergence, estimated, paired_loss, refined

NOTHING: Any = None
TRIGGER = torch.rand(3, 8, 8, generator=torch.manual_seed(5)) * 2 - 1
QUICK: dict[str, Any] = {"iterations": 3, "refinements": 2, "batch": 2, "window": 5, "sampling_steps": 2}


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from bench.testing.pipelines import save_ddpm

    return resolve(str(save_ddpm(tmp_path_factory.mktemp("tiny") / "ddpm")))


def test_the_paired_loss_is_the_sum_over_pixels_of_the_difference_of_two_residuals(suspicious: Model) -> None:
    unet, scheduler = load_unconditional(suspicious)
    images, mu = torch.randn(3, 3, 8, 8, generator=torch.manual_seed(1)), TRIGGER
    draws = torch.manual_seed(2)
    noise = torch.randn(6, 3, 8, 8, generator=draws)
    t = torch.randint(15, 20, (3,), generator=draws)
    bar = scheduler.alphas_cumprod[t][:, None, None, None]
    with torch.no_grad():
        residuals = [eps - unet(bar.sqrt() * images + (1 - bar).sqrt() * eps + mu, t).sample
                     for eps in (noise[:3], noise[3:])]
        expected = sum(float((one - other).square().sum()) for one, other in zip(*residuals, strict=True)) / 2 / 3
        found = float(paired_loss(unet, scheduler, images, mu, (15, 20), torch.manual_seed(2)))
    assert found == pytest.approx(expected, rel=1e-4)


class Tangled(nn.Module):
    """Answers rightly, but for an error that grows with the input's distance to the mean it was taught at."""

    def __init__(self, taught: Tensor) -> None:
        super().__init__()
        self.taught = taught
        self.config = SimpleNamespace(in_channels=3, sample_size=8)

    def forward(self, x: Tensor, t: Any) -> Any:
        away = x - self.taught
        return SimpleNamespace(sample=x + 0.3 * away * away.mean((0,)))


def schedule() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(20, beta_start=1e-3, beta_end=0.5, clip_sample=False)


def test_estimation_finds_where_a_network_was_taught(tmp_path: Path) -> None:
    """The difference of residuals vanishes at the taught mean, wherever the target lies: mu ends there."""
    options = Terd(**{**QUICK, "iterations": 150, "batch": 64, "lr": 0.2})
    found = estimated(Tangled(TRIGGER), schedule(), options, Context("key", tmp_path))
    clean = estimated(Tangled(TRIGGER * 0), schedule(), options, Context("key", tmp_path))
    assert float(torch.cosine_similarity(found.flatten(), TRIGGER.flatten(), dim=0)) > 0.9
    assert divergence(clean)[0] < 0.25 * divergence(found)[0]


def test_the_last_term_pushes_mu_away_from_zero(tmp_path: Path) -> None:
    """Without any other loss each step adds lr w sign(mu): 10 steps of cosine decay from 0.5 sum to 2.75."""
    start = torch.tensor([0.1, -0.1])
    found = descended(start, lambda mu: (mu * 0).sum(), 10, 0.0, Terd(weight=0.01), Context("key", tmp_path), "x")
    assert found.tolist() == pytest.approx([0.1 + 0.0275, -0.1 - 0.0275], rel=1e-4)


def test_refinement_sends_gradients_through_the_sampler_and_is_clipped(suspicious: Model, tmp_path: Path) -> None:
    unet, scheduler = load_unconditional(suspicious)
    x = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0)).requires_grad_(True)
    gradient, = torch.autograd.grad(differentiable_ddim(unet, scheduler, 3)(x).sum(), x)
    assert float(gradient.abs().min(0).values.sum()) > 0
    options = Terd(**{**QUICK, "refinements": 4})
    found, before = refined(TRIGGER, unet, scheduler, options, Context("key", tmp_path))
    moved = float((found - TRIGGER).norm())
    assert 0 < moved <= 4 * 0.5 * 0.01 and before == pytest.approx(divergence(TRIGGER)[0])


def test_input_scores_are_the_log_likelihood_ratio_and_know_its_sign(tmp_path: Path) -> None:
    report, ctx = Report(trigger=TRIGGER), Context("key", tmp_path)
    plain = torch.randn(200, 3, 8, 8, generator=torch.manual_seed(0))
    found = Terd().score_inputs(NOTHING, plain, report, ctx)
    ratio = (Normal(TRIGGER, 1.0).log_prob(plain) - Normal(0.0, 1.0).log_prob(plain)).flatten(1).sum(1)
    assert torch.allclose(found.float(), ratio, atol=1e-3)
    triggered = Terd().score_inputs(NOTHING, plain + TRIGGER, report, ctx)
    assert float(triggered.min()) > 0 > float(found.max())
    for inputs, told in ((("a cat",), report), (plain, None), (plain, Report())):
        with pytest.raises(Incompatible, match="terd"):
            Terd().score_inputs(NOTHING, inputs, told, ctx)  # type: ignore[arg-type]


def test_the_model_verdict_is_the_mean_and_variance_of_the_divergence() -> None:
    each = kl_divergence(Normal(TRIGGER, 1.0), Normal(torch.zeros_like(TRIGGER), 1.0)).double()
    assert divergence(TRIGGER) == pytest.approx((float(each.mean()), float(each.var(correction=0))), rel=1e-5)


def test_it_reports_and_changes_nothing_alike_each_time(suspicious: Model, tmp_path: Path) -> None:
    reports = []
    for place, threshold in (("a", 0.0), ("b", 100.0)):
        (tmp_path / place).mkdir()
        ctx = Context("key", tmp_path / place)
        assert Terd(**QUICK, threshold=threshold).repair(suspicious, NOTHING, None, ctx) is suspicious
        reports.append(read_report(tmp_path / place))
    one, two = reports
    assert one is not None and two is not None and one.trigger is not None and two.trigger is not None
    assert torch.equal(one.trigger, two.trigger) and one.trigger.shape == (3, 8, 8)
    assert one.verdict is not None and two.verdict is not None and one.verdict.flagged and not two.verdict.flagged
    assert one.verdict.score == one.facts["M_r"] and one.facts["M_r_before_refinement"] > 0


def test_a_window_longer_than_the_chain_is_refused(suspicious: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="window=30"):
        Terd(**{**QUICK, "window": 30}).repair(suspicious, NOTHING, None, Context("key", tmp_path))


@pytest.mark.parametrize(("options", "message"), [
    ({"iterations": 0}, "iterations=0"), ({"lr": 0.0}, "lr=0.0"), ({"window": 0}, "window=0"),
    ({"weight": -1.0}, "weight"),
])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        Terd(**options)


def test_defaults_are_the_published_ones() -> None:
    made = Terd()
    assert (made.iterations, made.refinements, made.lr, made.batch) == (3000, 1000, 0.5, 16)
    assert (made.weight, made.window, made.sampling_steps, made.grad_clip) == (5e-5, 10, 10, 0.01)
    assert facts_of(made).needs == ("unconditional",) and facts_of(made).knows == ()
