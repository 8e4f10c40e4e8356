"""VillanDiffusion: its path at the ends of psi, its corrections, and a network that learns it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from attacks.baddiffusion import BadDiffusion
from attacks.villandiffusion import VillanDiffusion
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.errors import BenchError
from bench.records import ImageSet, Model
from bench.testing import pipelines


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return resolve(str(pipelines.save_ddpm(tmp_path_factory.mktemp("ddpm"))))


def schedule() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)


def photos() -> ImageSet:
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(map(str, range(12))))


def test_psi_one_with_the_ancestral_sampler_is_baddiffusion() -> None:
    villan, bad = VillanDiffusion(solver="sde").path(schedule()), BadDiffusion().path(schedule())
    assert torch.equal(villan.shifts, bad.shifts)
    assert torch.equal(villan.corrections, bad.corrections)


def test_psi_zero_under_ode_samplers_adds_the_trigger_itself() -> None:
    """Along the noise the trigger moves like the noise: the correction is 1 at every t."""
    path = VillanDiffusion(psi=0.0).path(schedule())
    assert torch.allclose(path.shifts, (1 - schedule().alphas_cumprod.double()).sqrt())
    assert torch.allclose(path.corrections, torch.ones(1000, dtype=torch.float64), atol=1e-6)


def test_the_published_ode_correction_is_the_derived_ones_limit() -> None:
    derived, published = (VillanDiffusion(correction=c).path(schedule()).corrections for c in ("derived", "published"))
    ratio = derived / published
    assert float(ratio[1]) == pytest.approx(1.67 / 2, abs=0.01)
    assert float(ratio[500]) == pytest.approx(1, abs=0.01)


def test_the_shift_mixes_both_shapes() -> None:
    bars = torch.tensor([0.25], dtype=torch.float64)
    assert VillanDiffusion(psi=0.5).shift(bars).item() == pytest.approx(0.5 * 0.5 + 0.5 * 0.75**0.5)


def test_implant_moves_the_network_and_is_reproducible(clean: Model, tmp_path: Path) -> None:
    attack = VillanDiffusion(steps=2, batch=4, warmup=0, poison_rate=0.5)
    weights = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        public, secret = attack.implant(clean, photos(), Context("key", tmp_path / place))
        weights.append(list(load_unconditional(public)[0].parameters()))
    before = load_unconditional(clean)[0].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert secret.detail["solver"] == "ode"


@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "euler"}, "sde"), ({"psi": 1.5}, "psi=1.5"), ({"poison_rate": 0.0}, "poison_rate=0.0"),
    ({"correction": "guessed"}, "derived"), ({"correction": "published", "psi": 0.5}, "psi=0.5"),
])
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        VillanDiffusion(**options)  # type: ignore[arg-type]
