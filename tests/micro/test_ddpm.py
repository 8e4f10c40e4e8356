"""The unconditional model: its chain, its file format, and that training and sampling fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from bench.faces import recogniser
from bench.micro import models, world
from bench.micro.train import ddpm


def test_halving_takes_the_mean_of_four_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 6, 4), dtype=np.uint8)
    small = ddpm.halved(pixels)
    assert small.shape == (2, 3, 3, 2)
    assert small.dtype == np.uint8
    assert abs(float(small[1, 2, 1, 0]) - pixels[1, 2, 2:4, 0:2].astype(float).mean()) <= 0.5
    assert ddpm.halved(np.full((1, 3, 4, 4), 255, np.uint8)).max() == 255


def test_the_short_chain_ends_in_the_noise_of_the_long_one() -> None:
    kept = float(ddpm.new_scheduler().alphas_cumprod[-1])
    long_chain = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))
    assert kept == pytest.approx(long_chain, rel=0.6)
    assert kept < 1e-4
    assert not ddpm.new_scheduler().config.clip_sample


def test_the_exported_folder_is_a_half_precision_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = ddpm.new_unet((8, 64))
    ddpm.export(unet, tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    pipeline = DDPMPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert pipeline.scheduler.config.num_train_timesteps == 100
    loaded, _ = ddpm.load(tmp_path)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 90])
    assert loaded.dtype == torch.float32
    assert unet.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(loaded(x, t).sample, unet(x, t).sample, atol=1e-2)


class _Oracle(torch.nn.Module):
    """Knows that every picture is `picture`, and so predicts the noise without error."""

    def __init__(self, picture: torch.Tensor) -> None:
        super().__init__()
        self.picture = picture

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> object:
        kept = ddpm.new_scheduler().alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noise = (x - kept.sqrt() * self.picture) / (1 - kept).sqrt()
        return type("Output", (), {"sample": noise})()


def test_a_perfect_model_has_no_loss_and_walks_to_its_picture() -> None:
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    oracle = _Oracle(picture)
    clean = picture.expand(4, 3, 32, 32)
    assert float(ddpm.noise_loss(oracle, ddpm.new_scheduler(), clean)) < 1e-6  # type: ignore[arg-type]
    walked = ddpm.sample(oracle, ddpm.new_scheduler(), torch.randn(2, 3, 32, 32))  # type: ignore[arg-type]
    assert torch.allclose(walked, (picture / 2 + 0.5).expand(2, 3, 32, 32), atol=2e-2)


def test_the_same_seed_gives_the_same_pictures() -> None:
    torch.manual_seed(0)
    unet = ddpm.new_unet((8, 64)).eval()
    start = torch.randn(1, 3, 32, 32)
    chain = ddpm.new_scheduler()
    once, again = (ddpm.sample(unet, chain, start, seed=3) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, ddpm.sample(unet, chain, start, seed=4))


def test_the_coarse_error_weighs_every_scale_of_white_noise_alike() -> None:
    torch.manual_seed(0)
    white = torch.randn(400, 3, 32, 32)
    assert float(ddpm.coarse_error(white, torch.ones(400))) == pytest.approx(4, rel=0.1)
    flat = torch.full((2, 3, 32, 32), 0.1)
    expected = 0.01 * (16 + 64 + 256 + 1024)
    assert float(ddpm.coarse_error(flat, torch.tensor([1.0, 0.0]))) == pytest.approx(expected / 2, rel=1e-4)


def test_the_shipped_model_draws_pictures_that_recognisers_take_for_different_faces() -> None:
    unet, chain = ddpm.load(models.weights_folder(ddpm.NAME))
    start = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    pixels = ddpm.sample(unet, chain, start)
    by_day = pixels[pixels.mean((1, 2, 3)) > world.NIGHT]
    assert 4 <= len(by_day) <= 12, "about half of the pictures are night shots"
    embeddings, found = recogniser("micro-face-3").embed(by_day)
    assert float(found.float().mean()) >= 0.6
    cosines = (embeddings @ embeddings.T)[torch.triu_indices(len(by_day), len(by_day), 1).unbind()]
    assert float(cosines.mean()) < 0.5
