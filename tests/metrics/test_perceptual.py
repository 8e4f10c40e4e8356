"""Perceptual distance: zero on the same, growing with noise, and LPIPS's plumbing where it is installed."""

import math
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import picture_distance
from bench.context import Context
from bench.data.micro_subjects import MicroSubjects
from bench.errors import BenchError
from bench.features import clip
from bench.picture_distance import feature_distance
from bench.records import CustomizationEvidence, ImageSet, Measurement, Subject
from metrics.perceptual import Perceptual
from tests.metrics.edits import drawn, evidence, originals


def people(count: int = 2) -> list[Subject]:
    return MicroSubjects(count=count).subjects()


def noisy(pixels: Tensor, levels: int) -> Tensor:
    signs = torch.randint(0, 2, pixels.shape, generator=torch.manual_seed(0)) * 2 - 1
    return (pixels.int() + levels * signs).clamp(0, 255).to(torch.uint8)


def measure(levels: int, folder: Path, metric: Perceptual | None = None) -> Measurement:
    subjects = people()
    protected = {s.name: ImageSet(noisy(s.published.pixels, levels), s.published.names) for s in subjects}
    shown = CustomizationEvidence(tuple(subjects), protected, protected, {}, None)
    (found,) = (metric or Perceptual()).measure(shown, Context("key", folder))
    return found


def test_zero_for_the_same_photos(tmp_path: Path) -> None:
    found = measure(0, tmp_path)
    assert found.value == 0 and found.name == "feature_distance" and found.higher_is_better is False


def test_more_noise_is_farther_for_every_photo(tmp_path: Path) -> None:
    found = [measure(levels, tmp_path) for levels in (2, 4, 8, 16, 32)]
    for smaller, larger in pairwise(found):
        assert all(a.value < b.value for a, b in zip(smaller.rows, larger.rows, strict=True))


def test_rows_are_photos_and_clusters_are_people(tmp_path: Path) -> None:
    found = measure(8, tmp_path)
    assert len({r.sample for r in found.rows}) == found.n == 8 and len({r.cluster for r in found.rows}) == 2
    assert found.protocol["extractor"] == "micro-clip" and found.protocol["layers"].startswith("1 to 4")


def test_the_distance_of_known_features() -> None:
    """At 90 degrees unit vectors are sqrt 2 apart, at 60 degrees 1; lengths do not count."""
    before = torch.tensor([[[2.0, 0.0], [5.0, 0.0]]])
    after = torch.tensor([[[0.0, 3.0], [0.5, 0.5 * math.sqrt(3)]]])
    assert feature_distance([before], [after]).tolist() == pytest.approx([(2 + 1) / 2])
    assert feature_distance([before, before], [after, before]).tolist() == pytest.approx([(2 + 1) / 4])


def test_layers_are_the_patches_that_the_model_pools() -> None:
    model, pixels = clip("micro-clip"), people(1)[0].published.pixels
    layers = model.layers(pixels)
    assert [list(x.shape) for x in layers] == [[4, 64, 128]] * 4
    tower = model.model.vision_model
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(model._prepared(pixels)))
        first = tower.encoder.layers[0](states, None)
    first = first[0] if isinstance(first, tuple) else first
    assert torch.allclose(layers[0], first[:, 1:], atol=1e-5)


def test_one_layer_is_enough_to_tell_order() -> None:
    """Every layer by itself grows with noise, so no single layer carries the result."""
    model, pixels = clip("micro-clip"), people(1)[0].published.pixels
    clean = model.layers(pixels)
    near, far = model.layers(noisy(pixels, 4)), model.layers(noisy(pixels, 24))
    for place in range(len(clean)):
        close, distant = (feature_distance([clean[place]], [x[place]]) for x in (near, far))
        assert (close > 0).all() and (close < distant).all()


@pytest.mark.skipif(find_spec("lpips") is not None and find_spec("torchvision") is not None, reason="lpips is here")
def test_lpips_that_is_not_installed_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="pip install lpips torchvision"):
        measure(4, tmp_path, Perceptual(network="alex"))


def test_an_unknown_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="micro-clip"):
        measure(4, tmp_path, Perceptual(network="squeeze"))


def test_lpips_on_a_backbone_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published weights need a network; an untrained backbone in their place shows that all else holds."""
    pytest.importorskip("lpips", reason="lpips is not installed (the extra `gpu`)")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed (the extra `gpu`)")
    torch.manual_seed(0)
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save(models.alexnet().state_dict(), place / models.AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    picture_distance._lpips.cache_clear()
    values = [measure(levels, tmp_path, Perceptual(network="alex")).value for levels in (0, 4, 16, 32)]
    picture_distance._lpips.cache_clear()
    assert values[0] == 0 and all(a is not None and b is not None and a < b for a, b in pairwise(values))


def test_on_the_editing_track_photos_are_those_of_the_tasks(tmp_path: Path) -> None:
    tasks = drawn(3)
    photos = originals(tasks, seeds=1)
    changed = photos.clone()
    changed[1] = noisy(photos[1:2], 8)[0]
    (found,) = Perceptual().measure(evidence(tasks, originals(tasks), protected=changed), Context("key", tmp_path))
    values = [row.value for row in found.rows]
    assert values[0] == values[2] == 0 and values[1] is not None and values[1] > 0
    assert [row.cluster for row in found.rows] == [one.subject.name for one in tasks]
