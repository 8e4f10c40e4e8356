"""Differentiable encoders: CLIP preprocessing equals the image processor's, and the judge stays out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from bench.diffusion.checkpoints import resolve
from bench.diffusion.encoders import (
    JUDGE,
    clip_encoder,
    face_encoder,
    gaussian_blur,
    open_encoders,
    read_preparation,
)
from bench.errors import BenchError
from bench.faces import MICRO_ENCODERS, recogniser
from bench.micro.models import weights_folder


def smooth(high: int, wide: int) -> Tensor:
    """A uint8 picture [1, 3, high, wide] with edges and gradients."""
    y, x = torch.meshgrid(torch.linspace(0, 1, high), torch.linspace(0, 1, wide), indexing="ij")
    waves = [(0.5 + 0.5 * torch.sin(20 * (a * x + b * y))) for a, b in ((1, 0), (0, 2), (2, 1))]
    return (torch.stack(waves)[None] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (300, 512), (512, 300), (100, 90)])
def test_preparation_equals_clips_image_processor(size: tuple[int, int], tmp_path: Path) -> None:
    """An independent oracle: transformers' own, on PIL. It rounds to 8 bits after resizing, hence the tolerance."""
    from transformers import CLIPImageProcessorPil

    pixels = smooth(*size)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    wanted = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "without"):
        found = read_preparation(folder, 224)(pixels / 255)
        assert found.shape == wanted.shape == (1, 3, 224, 224)
        assert (found - wanted).abs().max() < 2 / 255 / 0.26
        assert (found - wanted).abs().mean() < 0.5 / 255 / 0.26


def test_a_filter_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"resample": 1}')
    with pytest.raises(BenchError, match="resample=1"):
        read_preparation(tmp_path, 224)


def test_embeddings_are_those_of_the_pipelines_encoder(tiny_sd: Path) -> None:
    from bench.diffusion.loading import load_module

    folder = tiny_sd / "ip_adapter" / "image_encoder"
    encoder = load_module(folder, "transformers", "CLIPVisionModelWithProjection")
    pixels = (smooth(16, 16) / 255).requires_grad_(True)
    prepared = read_preparation(folder, 16)(pixels)
    plain, hidden = (clip_encoder(folder, "cpu", kind)(pixels) for kind in (False, True))
    assert torch.equal(plain, encoder(prepared).image_embeds)
    assert torch.equal(hidden, encoder(prepared, output_hidden_states=True).hidden_states[-2])
    for found in (plain, hidden):
        gradient, = torch.autograd.grad(found.square().sum(), pixels, retain_graph=True)
        assert gradient.abs().max() > 0


def test_face_encoders_by_name_folder_and_adapter(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(weights_folder("micro-face-2"), tmp_path / "mine")
    pixels = smooth(64, 64) / 255
    assert torch.equal(face_encoder(str(tmp_path / "mine"), "cpu")(pixels), recogniser("micro-face-2").embed(pixels)[0])
    own = open_encoders(["ip_face"], resolve("micro-sd-a"), "cpu")[0]
    assert torch.equal(own(pixels), recogniser("micro-face-1").embed(pixels)[0])
    with pytest.raises(BenchError, match="ip_face"):
        open_encoders(["ip_face"], resolve(str(tiny_sd)), "cpu")


def test_the_judge_is_refused_under_any_name(tmp_path: Path) -> None:
    assert MICRO_ENCODERS[-1] == JUDGE == "micro-face-3"
    shutil.copytree(weights_folder(JUDGE), tmp_path / "other")
    for name in (JUDGE, str(weights_folder(JUDGE)), str(tmp_path / "other")):
        with pytest.raises(BenchError, match="is the judge"):
            face_encoder(name, "cpu")


@pytest.mark.parametrize(("name", "message"), [
    ("insightface:buffalo_l", "onnx2torch|no pack"), ("insightface", "onnx2torch|no pack"), ("dlib", "no gradients"),
    ("micro-face-9", "micro-face-1, micro-face-2"),
])
def test_what_cannot_be_optimised_against_is_refused(name: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        face_encoder(name, "cpu")


def test_blur_is_per_picture_keeps_plain_areas_and_agrees_with_pil() -> None:
    pixels = smooth(48, 48).expand(2, -1, -1, -1) / 255
    blurred = gaussian_blur(pixels, torch.tensor([0.1, 1.5]), 13)
    assert torch.allclose(blurred[0], pixels[0], atol=1e-4)
    picture = Image.fromarray((pixels[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    wanted = torch.tensor(list(picture.filter(ImageFilter.GaussianBlur(1.5)).tobytes())).reshape(48, 48, 3)
    inner = slice(8, -8)
    gap = blurred[1].permute(1, 2, 0)[inner, inner] * 255 - wanted[inner, inner]
    assert gap.abs().max() < 6
    assert torch.allclose(gaussian_blur(torch.full((1, 3, 9, 9), 0.3), torch.ones(1), 7), torch.tensor(0.3), atol=1e-6)
