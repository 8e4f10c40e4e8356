"""Clean fine-tuning, on networks small enough to train in a test."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.images import to_float
from bench.diffusion.loading import load_unconditional
from bench.diffusion.losses import noise_prediction_loss
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.records import ImageSet, Model
from defenses.finetune import FineTune


@pytest.fixture(scope="module")
def suspicious(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("tiny-ddpm")
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, beta_end=0.2)).save_pretrained(folder)
    return resolve(str(folder))


def stripes(count: int = 16, size: int = 16) -> ImageSet:
    """Pictures with structure, so that there is something to learn."""
    shade = torch.arange(count).view(-1, 1, 1, 1) * 255 // count
    pixels = shade.expand(-1, 3, size, size).to(torch.uint8)
    return ImageSet(pixels, tuple(f"{i}" for i in range(count)))


def clean_loss(model: Model) -> float:
    unet, scheduler = load_unconditional(model)
    with torch.no_grad():
        images = to_float(stripes().pixels)
        return float(noise_prediction_loss(unet, scheduler, images, None, generator=torch.manual_seed(0)))


def test_it_learns_the_clean_images_and_is_reproducible(suspicious: Model, tmp_path: Path) -> None:
    defense = FineTune(steps=40, batch=16, lr=3e-3)
    repaired = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        repaired.append(defense.repair(suspicious, stripes(), None, Context("key", tmp_path / place)))
    one, two = (load_unconditional(model)[0].state_dict() for model in repaired)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert clean_loss(repaired[0]) < 0.8 * clean_loss(suspicious)
    assert repaired[0].digest != suspicious.digest


def test_epochs_count_passes_over_the_data(suspicious: Model, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    ctx = Context("key", tmp_path, progress=lambda what, done, total: seen.append((done, total)))
    FineTune(epochs=2, batch=5).repair(suspicious, stripes(16), None, ctx)
    assert seen[-1] == (8, 8)


def test_it_starts_from_the_suspicious_weights_not_from_the_base(suspicious: Model, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    once = FineTune(steps=10, batch=16, lr=3e-3).repair(suspicious, stripes(), None, Context("a", tmp_path / "a"))
    again = FineTune(steps=1, batch=16, lr=1e-9).repair(once, stripes(), None, Context("b", tmp_path / "b"))
    assert clean_loss(again) == pytest.approx(clean_loss(once), rel=0.01)


def test_images_of_another_size_are_refused(suspicious: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="data.size=16"):
        FineTune(steps=1).repair(suspicious, stripes(size=8), None, Context("key", tmp_path))


def test_a_text_to_image_model_needs_captions(suspicious: Model, tmp_path: Path) -> None:
    model = replace(suspicious, capabilities=frozenset({"text_to_image"}))
    with pytest.raises(BenchError, match="captions"):
        FineTune(steps=1).repair(model, stripes(), None, Context("key", tmp_path))


def test_it_is_a_control_that_acts_on_the_model_and_knows_no_secret() -> None:
    facts = facts_of(FineTune)
    assert facts.control and facts.acts_on == "model" and facts.knows == ()
