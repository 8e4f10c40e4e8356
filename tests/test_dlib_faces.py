"""dlib's recogniser on real photographs that other dependencies ship."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from bench import dlib_faces
from bench.dlib_faces import PUBLISHED_DISTANCE, TYPICAL_LENGTH, DlibRecogniser, dlib_recogniser, weight_file
from bench.errors import BenchError
from bench.faces import recogniser, threshold_of

PACKAGES = ("dlib", "face_recognition_models", "skimage", "insightface")
MISSING = [name for name in PACKAGES if find_spec(name) is None]
installed = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra `faces`)")


def shipped(package: str, file: str) -> Image.Image:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Image.open(Path(spec.origin).parent / file).convert("RGB")


def unit(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def portrait() -> Image.Image:
    """Eileen Collins, from the public-domain photograph that scikit-image ships."""
    return shipped("skimage", "data/astronaut.png").crop((120, 0, 330, 260))


@pytest.fixture(scope="module")
def judge() -> DlibRecogniser:
    found = recogniser("dlib")
    assert isinstance(found, DlibRecogniser)
    return found


@pytest.fixture(scope="module")
def people(judge: DlibRecogniser) -> list[Tensor]:
    """Embeddings, not normalised, of eight people: one portrait each of two, a photograph of six."""
    group = unit(shipped("insightface", "data/images/t1.jpg"))
    boxes = judge.detector((group.permute(1, 2, 0) * 255).byte().contiguous().numpy(), 1)
    parts = [group[:, max(0, b.top() - 40):b.bottom() + 40, max(0, b.left() - 40):b.right() + 40] for b in boxes]
    alone = [unit(portrait()), unit(shipped("insightface", "data/images/Tom_Hanks_54745.png"))]
    return [row for row in map(judge.describe, alone + parts) if row is not None]


@installed
def test_one_person_in_altered_pictures_stays_the_same_person(judge: DlibRecogniser) -> None:
    face = portrait()
    altered = [face.transpose(Image.Transpose.FLIP_LEFT_RIGHT), ImageEnhance.Brightness(face).enhance(0.6),
               face.rotate(12), face.resize((105, 130)).resize((210, 260))]
    embeddings, found = judge.embed(torch.stack([unit(image) for image in (face, *altered)]))
    assert found.all() and torch.allclose(embeddings.norm(dim=1), torch.ones(5), atol=1e-5)
    assert (embeddings[1:] @ embeddings[0] > 0.95).all()


@installed
def test_different_people_lie_below_the_threshold(judge: DlibRecogniser, people: list[Tensor]) -> None:
    assert len(people) == 8
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(people, 2)]
    assert max(cosines) < judge.config.similarity_threshold < 0.95
    assert min(float(torch.dist(a, b)) for a, b in combinations(people, 2)) > PUBLISHED_DISTANCE


@installed
def test_the_threshold_is_the_published_distance_at_the_length_of_real_embeddings(
    judge: DlibRecogniser, people: list[Tensor],
) -> None:
    lengths = torch.stack([row.norm() for row in people])
    assert float(lengths.mean()) == pytest.approx(TYPICAL_LENGTH, abs=0.02)
    a, b = torch.tensor([TYPICAL_LENGTH, 0.0]), torch.tensor([0.0, TYPICAL_LENGTH])
    angle = torch.tensor(judge.config.similarity_threshold).acos()
    assert float(torch.dist(a, angle.cos() * a + angle.sin() * b)) == pytest.approx(PUBLISHED_DISTANCE, abs=2e-3)
    assert threshold_of(judge) == judge.config.similarity_threshold


@installed
def test_the_largest_face_of_several_is_taken(judge: DlibRecogniser) -> None:
    large, small = portrait(), shipped("insightface", "data/images/Tom_Hanks_54745.png").resize((90, 90))
    both = Image.new("RGB", (320, 260))
    both.paste(small, (0, 0))
    both.paste(large, (110, 0))
    embeddings, _ = judge.embed(torch.stack([unit(both), unit(both.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]))
    alone, _ = judge.embed(unit(large)[None])
    assert (embeddings @ alone[0] > 0.95).all()


@installed
@pytest.mark.parametrize("file", ["coffee.png", "chelsea.png", "rocket.jpg", "grass.png"])
def test_no_face_is_found_where_there_is_none(judge: DlibRecogniser, file: str) -> None:
    embeddings, found = judge.embed(unit(shipped("skimage", f"data/{file}"))[None])
    assert not found.any() and not embeddings.any()


@installed
def test_grey_and_no_pictures(judge: DlibRecogniser) -> None:
    embeddings, found = judge.embed(torch.full((2, 3, 64, 64), 0.5))
    assert found.tolist() == [False, False] and embeddings.shape == (2, 128)
    assert judge.embed(torch.zeros(0, 3, 64, 64))[0].shape == (0, 128)


@installed
def test_weights_other_than_the_published_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / dlib_faces.NETWORK).write_bytes(b"other")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(dlib_faces, "find_spec", lambda name: spec)
    with pytest.raises(BenchError, match="sha256 differs"):
        weight_file(dlib_faces.NETWORK)
    with pytest.raises(BenchError, match="is missing"):
        weight_file(dlib_faces.LANDMARKS)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlib_faces, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match="pip install dlib-bin face-recognition-models"):
        weight_file(dlib_faces.NETWORK)
    monkeypatch.setitem(__import__("sys").modules, "dlib", None)
    dlib_recogniser.cache_clear()
    with pytest.raises(BenchError, match="pip install dlib-bin"):
        dlib_recogniser()
