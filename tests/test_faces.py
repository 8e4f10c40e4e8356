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
    recogniser,
    save_face_encoder,
)
from bench.micro import models, world
from bench.micro.train import faces as training

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
    assert found.dtype == torch.bool
    assert found.tolist() == (logits >= middle).tolist()
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
    assert torch.allclose(
        encoder.embed(plain)[0], encoder.embed(plain[..., :1, :1].expand(2, 3, 16, 16))[0], atol=1e-4
    )
    stripes = (torch.arange(size) % 2).float().expand(1, 3, size, size)
    if size == 64:  # stripes finer than the encoder can see must come out grey, not as stripes
        assert float(encoder.prepare(stripes).std()) < 0.05


@pytest.mark.parametrize(
    "wrong", [torch.rand(3, 16, 16), torch.rand(1, 1, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
)
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
    assert analysis.seen[1].dtype == np.uint8
    assert analysis.seen[1][3, 3].tolist() == [153, 0, 0]


def test_a_missing_insightface_pack_is_named_and_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"buffalo_l\.zip"):
        insightface_recogniser("buffalo_l", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_insightface_pack_gives_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "det_10g.onnx").write_bytes(b"no model")
    with pytest.raises(BenchError, match="cannot be used"):
        insightface_recogniser(tmp_path)


def test_recognisers_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    save_face_encoder(small_encoder(), tmp_path)
    assert recogniser(str(tmp_path)).embed(torch.rand(1, 3, 16, 16))[0].shape == (1, 6)
    with pytest.raises(BenchError, match="Did you mean micro-face-"):
        recogniser("micro-face-9")
    with pytest.raises(BenchError, match="missing-pack"):
        recogniser("insightface:missing-pack")


ENCODERS = ("micro-face-1", "micro-face-2", "micro-face-3")


@pytest.fixture(scope="module")
def unseen() -> tuple[np.ndarray, np.ndarray]:
    """Three pictures each of 80 people that no encoder was trained or calibrated on."""
    return training.draw_people(world.SPLITS["card"][:80], views=3, seed=1)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_shipped_encoder_tells_unseen_people_apart(
    name: str, unseen: tuple[np.ndarray, np.ndarray]
) -> None:
    encoder = load_face_encoder(models.weights_folder(name))
    embeddings, found = encoder.embed(torch.from_numpy(unseen[0] / np.float32(255)))
    same, different = training.pair_cosines(embeddings, unseen[1])
    assert training.area_under_curve(same, different) >= 0.995
    assert float(found.float().mean()) >= 0.99
    threshold = encoder.config.similarity_threshold
    assert float((different >= threshold).float().mean()) <= 0.005
    assert float((same >= threshold).float().mean()) >= 0.4  # measured on all of `card`: 0.87, 0.57, 0.65


@pytest.mark.parametrize("name", ENCODERS)
def test_a_shipped_encoder_finds_no_face_where_there_is_none(
    name: str, unseen: tuple[np.ndarray, np.ndarray]
) -> None:
    encoder = load_face_encoder(models.weights_folder(name))
    rng = np.random.default_rng(2)
    faces = torch.from_numpy(unseen[0][:120] / np.float32(255))
    drawn = torch.from_numpy(training.draw_others(world.SPLITS["card"], 120, 3) / np.float32(255))
    assert float(encoder.embed(training.no_faces(rng, faces, drawn))[1].float().mean()) <= 0.06
    grey, noise = torch.full((1, 3, 64, 64), 0.5), torch.rand(8, 3, 64, 64)
    assert not encoder.embed(torch.cat([grey, noise]))[1].any()


def test_the_judge_shares_its_people_and_its_width_with_no_other_encoder() -> None:
    configs = [load_face_encoder(models.weights_folder(name)).config for name in ENCODERS]
    assert len({c.widths for c in configs}) == len({c.dimension for c in configs}) == 3
    for recipe in training.RECIPES.values():
        people = world.SPLITS[recipe.split]
        assert recipe.people + training.CALIBRATION_PEOPLE <= len(people)
        others = [r for name, r in world.SPLITS.items() if name != recipe.split]
        assert all(people.stop <= o.start or o.stop <= people.start for o in others)


def test_the_area_under_the_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    same, different = (
        torch.from_numpy(rng.integers(0, 9, 30) + 2.0),
        torch.from_numpy(rng.integers(0, 9, 40) + 0.0),
    )
    counted = np.mean([(a > b) + 0.5 * (a == b) for a in same.tolist() for b in different.tolist()])
    assert training.area_under_curve(same, different) == pytest.approx(counted)


def test_pairs_are_all_pairs_once() -> None:
    embeddings = torch.eye(4)
    embeddings[1] = embeddings[0]
    same, different = training.pair_cosines(embeddings, np.array([5, 5, 6, 5]))
    assert sorted(same.tolist()) == [0.0, 0.0, 1.0]
    assert len(different) == 3


def test_the_margin_lowers_the_true_class_only() -> None:
    cosine = torch.tensor([[0.5, 0.2], [0.1, -0.3]])
    logits = training.margin_logits(cosine, torch.tensor([0, 1]), scale=10.0, margin=0.3)
    assert torch.allclose(logits, torch.tensor([[2.0, 2.0], [1.0, -6.0]]))


def test_harms_keep_the_shape_and_do_what_they_say() -> None:
    rng = np.random.default_rng(0)
    pixels = torch.rand(4, 3, 64, 64)
    assert torch.allclose(training.jpeg_like(pixels, torch.full((4, 1, 1, 1), 1e-6)), pixels, atol=1e-4)
    sigma = torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None, None]
    spread = training.blur(pixels, sigma).flatten(1).std(1)
    assert bool((spread.diff() < 0).all())
    flat = torch.full((2, 3, 64, 64), 0.3)
    assert torch.allclose(training.blur(flat, sigma[:2]), flat, atol=1e-6)
    mixed = training.scramble(rng, pixels, 16)
    assert not torch.equal(mixed, pixels)
    assert torch.equal(mixed.flatten(2).sort().values, pixels.flatten(2).sort().values)
    harmed = training.imperfect(rng, pixels)
    assert harmed.shape == pixels.shape
    assert float(harmed.min()) >= 0
    assert float(harmed.max()) <= 1
