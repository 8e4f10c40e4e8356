"""Face encoders: their file format, their interface, and that the shipped ones tell people apart."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.errors import BenchError
from bench.faces import (
    FaceEncoder,
    FaceEncoderConfig,
    InsightFaceRecogniser,
    insightface_recogniser,
    load_face_encoder,
    save_face_encoder,
)

SMALL = FaceEncoderConfig(widths=(4, 8), blocks=(1, 2), dimension=6, size=16)


def small_encoder(seed: int = 0) -> FaceEncoder:
    torch.manual_seed(seed)
    encoder = FaceEncoder(SMALL)
    encoder(torch.rand(32, 3, 16, 16))  # moves the running statistics away from their defaults
    return encoder.eval()


def test_a_saved_encoder_gives_the_same_embeddings(tmp_path: Path) -> None:
    encoder, pixels = small_encoder(), torch.rand(5, 3, 16, 16)
    save_face_encoder(encoder, tmp_path)
    loaded = load_face_encoder(tmp_path)
    assert loaded.config == encoder.config
    assert torch.allclose(loaded.embed(pixels)[0], encoder.embed(pixels)[0], atol=5e-3)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())


def test_embeddings_have_length_one_and_the_threshold_decides_what_is_found(tmp_path: Path) -> None:
    pixels = torch.rand(40, 3, 16, 16)
    encoder = small_encoder()
    logits = encoder(pixels)[1].detach()
    middle = float(logits.median())
    encoder.config = FaceEncoderConfig(**{**SMALL.__dict__, "detection_threshold": middle})
    embeddings, found = encoder.embed(pixels)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(40), atol=1e-5)
    assert found.dtype == torch.bool and found.tolist() == (logits >= middle).tolist()
    assert 0 < int(found.sum()) < 40


def test_the_gradient_reaches_the_pixels_and_matches_finite_differences() -> None:
    encoder = small_encoder().double()
    pixels = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(6, dtype=torch.float64)

    def likeness(x: torch.Tensor) -> torch.Tensor:
        raw = encoder(x)[0]
        return (raw / raw.norm()) @ goal

    (gradient,) = torch.autograd.grad(likeness(pixels)[0], pixels)
    way = torch.randn_like(pixels)
    step = 1e-6
    numeric = (likeness(pixels + step * way) - likeness(pixels - step * way)) / (2 * step)
    assert float((gradient * way).sum()) == pytest.approx(float(numeric.detach()[0]), rel=1e-3)
    embedded = encoder.float().embed(pixels.float())[0]
    assert embedded.requires_grad


@pytest.mark.parametrize("size", [8, 16, 64])
def test_other_sizes_are_resized_with_antialiasing(size: int) -> None:
    encoder = small_encoder()
    plain = torch.rand(2, 3, 1, 1).expand(2, 3, size, size)
    assert torch.allclose(encoder.embed(plain)[0], encoder.embed(plain[..., :1, :1].expand(2, 3, 16, 16))[0], atol=1e-4)
    stripes = (torch.arange(size) % 2).float().expand(1, 3, size, size)
    if size == 64:  # stripes finer than the encoder can see must come out grey, not as stripes
        assert float(encoder.prepare(stripes).std()) < 0.05


@pytest.mark.parametrize("wrong", [torch.rand(3, 16, 16), torch.rand(1, 1, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])
def test_wrong_pixels_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(BenchError, match=r"float \[n, 3, h, w\]"):
        small_encoder().embed(wrong)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"config\.json is missing"):
        load_face_encoder(tmp_path)
    save_face_encoder(small_encoder(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BenchError, match=r"model\.safetensors is missing"):
        load_face_encoder(tmp_path)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    save_face_encoder(small_encoder(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(small_encoder().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BenchError, match=r"pytorch_model\.bin.*pickle.*refused"):
        load_face_encoder(tmp_path)


def test_broken_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    save_face_encoder(small_encoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(BenchError, match="does not describe a FaceEncoder"):
        load_face_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(BenchError, match="depth"):
        load_face_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dimension": 7}))
    with pytest.raises(BenchError, match="do not fit"):
        load_face_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(BenchError, match="not a readable safetensors"):
        load_face_encoder(tmp_path)


@dataclass
class Face:
    """The part of an InsightFace face that is read."""

    bbox: list[float]
    normed_embedding: np.ndarray


@dataclass
class Analysis:
    """Answers like FaceAnalysis: a small and a large face where the picture is mostly red, else none."""

    seen: list[np.ndarray] = field(default_factory=list)

    def get(self, bgr: np.ndarray) -> list[Face]:
        self.seen.append(bgr)
        if bgr[..., 2].mean() < 200:
            return []
        small, large = np.array([1.0, 0.0]), np.array([0.0, 2.0])
        return [Face([0, 0, 5, 5], small), Face([2, 2, 20, 9], large)]


def test_insightface_gives_the_largest_face_in_bgr_and_zeros_without_one() -> None:
    red, blue = torch.zeros(3, 20, 20), torch.zeros(3, 20, 20)
    red[0], blue[2] = 1.0, 0.6
    analysis = Analysis()
    embeddings, found = InsightFaceRecogniser(analysis, 2).embed(torch.stack([red, blue]))
    assert found.tolist() == [True, False]
    assert embeddings.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert analysis.seen[1].dtype == np.uint8 and analysis.seen[1][3, 3].tolist() == [153, 0, 0]


def test_a_missing_insightface_pack_is_named_and_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"buffalo_l\.zip"):
        insightface_recogniser("buffalo_l", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_insightface_pack_gives_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "det_10g.onnx").write_bytes(b"no model")
    with pytest.raises(BenchError, match="cannot be used"):
        insightface_recogniser(tmp_path)
