"""BadDiffusion on a network small enough to train in a test, against the formulas of its paper."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from attacks.baddiffusion import BadDiffusion
from bench.context import Context
from bench.data.drawings import GREY_LEVEL, TARGETS, TRIGGERS, draw_target, draw_trigger, trigger_mask
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_unconditional
from bench.diffusion.poisoning import poison, poisoned_loss
from bench.diffusion.shifted_path import shifted_path
from bench.errors import BenchError
from bench.records import ImageSet, Model


def tiny_unet(size: int = 16) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny-ddpm")
    schedule = DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=False)
    DDPMPipeline(tiny_unet(), schedule).save_pretrained(folder)
    return resolve(str(folder))


def photos(count: int = 24, size: int = 16) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(3)).to(torch.uint8)
    return ImageSet(pixels, tuple(f"{i}" for i in range(count)))


def test_box_trigger_is_grey_with_a_two_pixel_gap() -> None:
    box = draw_trigger("box", 32, 14)
    assert box.shape == (3, 32, 32)
    assert (box[:, 16:30, 16:30] == 0).all() and int((box > -1).sum()) == 3 * 14 * 14


@pytest.mark.parametrize("size", [16, 32, 64, 256])
@pytest.mark.parametrize("name", TRIGGERS)
def test_triggers_scale_with_the_image(name: str, size: int) -> None:
    covered = float((draw_trigger(name, size) > -1).any(0).float().mean())
    assert covered == pytest.approx(float((draw_trigger(name, 128) > -1).any(0).float().mean()), rel=0.5)


@pytest.mark.parametrize("name", TARGETS)
def test_no_target_pixel_is_darker_than_the_filter_lets_it(name: str) -> None:
    target = draw_target(name, 32, draw_trigger("box", 32))
    assert target.dtype == torch.uint8 and int(target.min()) >= GREY_LEVEL
    assert pytest.approx(0.3, abs=1 / 255) == GREY_LEVEL / 255


def test_targets_are_told_apart_by_more_than_the_success_threshold() -> None:
    box = draw_trigger("box", 32)
    images = {name: draw_target(name, 32, box).float() / 255 for name in TARGETS}
    for one in TARGETS:
        for other in TARGETS:
            if one < other:
                assert float((images[one] - images[other]).square().mean()) > 0.002, (one, other)


def test_rows_are_poisoned_at_the_stated_rate_and_as_published() -> None:
    data, trigger = photos(40), draw_trigger("box", 16)
    target = draw_target("corner", 16, trigger)
    rows = poison(data, trigger, target, 0.25, torch.manual_seed(0), trigger_mask(trigger))
    assert int(rows.poisoned.sum()) == 10
    x, r = next(rows.batches(40, torch.manual_seed(1)))
    hit = r.abs().flatten(1).sum(1) > 0
    assert int(hit.sum()) == 10
    assert torch.equal(x[hit], (target.float() / 127.5 - 1).expand(10, -1, -1, -1))
    inside = trigger > -1
    assert (r[hit][:, inside] == 0).all()
    outside = r[hit][:, ~inside]
    originals = torch.cat([data.pixels, data.pixels.flip(3)]).float() / 127.5 - 1
    for row in outside:
        assert (originals[:, ~inside] == row).all(1).any()


def test_a_network_that_answers_the_published_target_has_no_loss() -> None:
    """The oracle computes x_t and the answer from the paper's formulas and the schedule's own tables."""
    schedule = DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)
    path = shifted_path(schedule.alphas_cumprod)
    images, r = torch.randn(2, 6, 3, 8, 8, generator=torch.manual_seed(0))

    class Oracle:
        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> object:
            bars, alphas = schedule.alphas_cumprod[t], schedule.alphas[t]
            bars, alphas = bars.view(-1, 1, 1, 1), alphas.view(-1, 1, 1, 1)
            noise = (x - bars.sqrt() * images - (1 - bars.sqrt()) * r) / (1 - bars).sqrt()
            answer = noise + (1 - alphas.sqrt()) * (1 - bars).sqrt() / (1 - alphas) * r
            return type("Output", (), {"sample": answer})

    assert float(poisoned_loss(Oracle(), path, images, r, torch.manual_seed(5))) < 1e-8


def test_implant_moves_the_network_and_is_reproducible(clean: Model, tmp_path: Path) -> None:
    attack = BadDiffusion(steps=3, batch=8, warmup=0, poison_rate=0.5)
    weights = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        public, secret = attack.implant(clean, photos(), Context("key", tmp_path / place))
        weights.append([w.clone() for w in load_unconditional(public)[0].parameters()])
        assert public.digest != clean.digest and public.parts["unet"].is_relative_to(tmp_path / place)
    before = load_unconditional(clean)[0].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert secret.trigger.shape == (3, 16, 16) and secret.target.dtype == torch.uint8


def test_training_lowers_the_poisoned_loss(clean: Model, tmp_path: Path) -> None:
    attack = BadDiffusion(steps=40, batch=16, warmup=0, lr=3e-3, poison_rate=0.5, mixed_precision=False)
    public, _ = attack.implant(clean, photos(), Context("key", tmp_path))

    def loss(model: Model) -> float:
        unet, scheduler = load_unconditional(model)
        trigger, target = attack.pictures(16)
        rows = poison(photos(), trigger, target, 1.0, torch.manual_seed(0), trigger_mask(trigger))
        images, r = next(rows.batches(24, torch.manual_seed(1)))
        with torch.no_grad():
            return float(poisoned_loss(unet, attack.path(scheduler), images, r, torch.manual_seed(2)))

    assert loss(public) < 0.8 * loss(clean)


@pytest.mark.parametrize(("options", "message"), [
    ({"poison_rate": 0.0}, "poison_rate=0.0"),
    ({"poison_rate": 1.5}, "poison_rate=1.5"),
    ({"trigger": "sign"}, "stop_sign"),
    ({"target": "hatt"}, "hat"),
    ({"trigger_size": 31}, "trigger_size=31"),
    ({"sampling_steps": 200}, "sampling_steps=200"),
    ({"steps": 0}, "steps=0"),
])
def test_bad_options_are_refused(clean: Model, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        BadDiffusion(**options).implant(clean, photos(), Context("key", tmp_path))  # type: ignore[arg-type]


def test_images_of_another_size_are_refused(clean: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"data.size=16"):
        BadDiffusion(steps=1).implant(clean, photos(size=32), Context("key", tmp_path))
