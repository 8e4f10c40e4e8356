"""Zero-shot: nothing is trained, and what is drawn follows the photos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.zero_shot import ZeroShot
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.sampling import draw_customised
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.protocols import CustomizationProtocol
from bench.records import ImageSet, Model

PROTOCOL = CustomizationProtocol(steps=3)


def photos(seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.int32).to(torch.uint8)
    return ImageSet(pixels, ("a", "b"))


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def draw(attack: ZeroShot, given: ImageSet, model: Model, folder: Path) -> torch.Tensor:
    ctx = Context("key", folder)
    customised = attack.customise(given, "person", model, ctx)
    return draw_customised(customised, ["a photo of person"] * 2, [1, 2], PROTOCOL, ctx)


def test_the_photos_change_what_is_drawn(model: Model, tmp_path: Path) -> None:
    one, two, again = (draw(ZeroShot(), photos(seed), model, tmp_path) for seed in (1, 2, 1))
    assert one.shape == (2, 3, 16, 16)
    assert not torch.equal(one, two)
    assert torch.equal(one, again)


def test_scale_zero_ignores_the_photos(model: Model, tmp_path: Path) -> None:
    one, two = (draw(ZeroShot(scale=0), photos(seed), model, tmp_path) for seed in (1, 2))
    assert torch.equal(one, two)


def test_no_weights_are_written(model: Model, tmp_path: Path) -> None:
    customised = ZeroShot().customise(photos(1), "person", model, Context("key", tmp_path))
    assert customised.token == ""
    assert not customised.model.parts
    assert not list(tmp_path.iterdir())


def test_the_planner_is_told_which_adapter_is_needed() -> None:
    assert facts_of(ZeroShot()).needs == ("text_to_image", "ip_image")
    assert facts_of(ZeroShot(adapter="face")).needs == ("text_to_image", "ip_face")
    assert facts_of(ZeroShot).needs == ("text_to_image", "ip_image")


def test_bad_options_and_missing_adapters_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="unknown adapter 'faces'"):
        ZeroShot(adapter="faces")
    with pytest.raises(BenchError, match="attack.scale=3"):
        ZeroShot(scale=3)
    with pytest.raises(BenchError, match="no 'ip_face' adapter"):
        ZeroShot(adapter="face").customise(photos(1), "person", model, Context("key", tmp_path))
    with pytest.raises(BenchError, match="no photos"):
        ZeroShot().customise(ImageSet(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), ()), "person", model,
                             Context("key", tmp_path))


def test_the_face_adapter_follows_the_faces(tiny_sd: Path, tmp_path: Path) -> None:
    """With a recogniser of our own that finds a face everywhere, and one that finds none."""
    one, two = (draw(ZeroShot(adapter="face"), photos(seed), with_face_adapter(tiny_sd, tmp_path / f"y{seed}", -100.0),
                     tmp_path) for seed in (1, 2))
    assert not torch.equal(one, two)
    blind = with_face_adapter(tiny_sd, tmp_path / "n", 100.0)
    one, two = (draw(ZeroShot(adapter="face"), photos(seed), blind, tmp_path) for seed in (1, 2))
    assert torch.equal(one, two)


def with_face_adapter(tiny_sd: Path, home: Path, threshold: float) -> Model:
    import shutil

    from bench.faces import FaceEncoder, FaceEncoderConfig, save_face_encoder
    from bench.testing.pipelines import add_face_adapter

    torch.manual_seed(0)
    config = FaceEncoderConfig(widths=(4, 4), blocks=(1, 1), dimension=6, size=16, detection_threshold=threshold)
    save_face_encoder(FaceEncoder(config), home / "face")
    folder = Path(shutil.copytree(tiny_sd, home / "sd"))
    return resolve(str(add_face_adapter(folder, str(home / "face"), 6)))
