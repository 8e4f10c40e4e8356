"""T2IShield: its scores against written-out formulas, the search for the word, and what its guard leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.codecs import ModelCodec
from bench.context import Context
from bench.diffusion.checkpoints import resolve
from bench.diffusion.loading import load_pipeline
from bench.errors import BenchError
from bench.plugin import facts_of
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet, Model
from bench.reports import read_report
from bench.tracks.backdoor import draw_prompted
from defenses.t2ishield import T2IShield, Watched, assimilation, attention_of, calibrate, locate, scores, spectrum

PROTOCOL = BackdoorProtocol(samples=2, sampler="ddim", steps=1, guidance=2.0)
FEW = T2IShield(prompts=3, map_factor=1, steps=1, guidance=2.0, components=5, search_steps=1)
CAPTIONS = ("a cat", "a dog", "one bird")


@pytest.fixture
def model(tiny_sd: Path) -> Model:
    return resolve(str(tiny_sd))


def photos(captions: tuple[str, ...] = CAPTIONS) -> ImageSet:
    return ImageSet(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), ("0", "1", "2"), captions)


def watched(seed: int = 0, length: int = 4, spread: float = 1.0) -> Watched:
    maps = torch.rand(6, 3, 3, generator=torch.Generator().manual_seed(seed))
    return Watched(0.5 + spread * (maps - 0.5), length)


def test_assimilation_is_the_mean_frobenius_distance() -> None:
    one = watched()
    mean = sum(one.maps[i] for i in range(4)) / 4
    distances = [float(((one.maps[i] - mean)**2).sum())**0.5 for i in range(3)]
    assert assimilation(one) == pytest.approx(sum(distances) / 3, rel=1e-5)
    assert assimilation(watched(spread=0.0)) == 0 < assimilation(watched(spread=0.1)) < assimilation(one)


def test_maps_that_are_alike_are_more_suspicious() -> None:
    found = scores(FEW, [watched(spread=0.1), watched(spread=1.0)], {})
    assert found[0] > found[1]


def test_the_spectrum_is_that_of_the_maps_covariance() -> None:
    one = watched()
    values = torch.linalg.eigvalsh(torch.cov(one.maps.flatten(1).double().T)).flip(0)
    assert torch.allclose(spectrum(one, 4), values[:4].log(), atol=1e-6)


@pytest.mark.parametrize("detector", ["ftt", "cda"])
def test_the_wanted_share_of_clean_captions_passes_the_limit(detector: str) -> None:
    method = replace(FEW, detector=detector, false_alarms=0.1)
    clean = [watched(seed) for seed in range(40)]
    normal = calibrate(method, clean)
    assert int((scores(method, clean, normal) > normal["limit"]).sum()) == 4
    if detector == "cda":                                                      # an outlier in spread stands out
        assert float(scores(method, [watched(99, spread=0.01)], normal)) > normal["limit"]


def test_a_fixed_threshold_is_f_itself() -> None:
    assert calibrate(replace(FEW, threshold=2.5), [watched(s) for s in range(3)])["limit"] == -2.5


@pytest.mark.parametrize("place", range(5))
def test_halving_finds_the_word_wherever_it_is(place: int) -> None:
    words = ["a", "photo", "of", "a", "cat"]
    words[place] = "sks"

    def fires(one: str, other: str) -> float:
        return float(("sks" in one.split()) == ("sks" in other.split()))

    assert locate(words, fires, 0.85) == "sks"
    assert locate(words, lambda one, other: 0.5, 0.85) == ""


def test_attention_has_one_map_per_token_and_no_company(model: Model) -> None:
    pipeline = load_pipeline(model)
    together = attention_of(FEW, pipeline, ["a cat", "sks a dog"])
    alone = attention_of(FEW, pipeline, ["sks a dog"])
    assert together.shape == (2, 32, 8, 8)
    assert torch.allclose(together.amax((2, 3)), torch.ones(2, 32))
    assert torch.allclose(together[1], alone[0], atol=1e-5) and not torch.allclose(together[0], alone[0], atol=1e-3)
    with pytest.raises(BenchError, match="map_factor"):
        attention_of(replace(FEW, map_factor=2), pipeline, ["a cat"])           # there the middle block alone attends


def test_the_guard_leaves_unsuspicious_prompts_alone_and_redraws_suspicious_ones(model: Model, tmp_path: Path) -> None:
    prompts, seeds = ("sks a cat", "a dog"), [3, 4]
    plain, ctx = draw_prompted(model, prompts, seeds, PROTOCOL, Context("key", tmp_path)), Context("key", tmp_path)
    blind = replace(FEW, threshold=0.0).repair(model, photos(), None, ctx)
    assert torch.equal(draw_prompted(blind, prompts, seeds, PROTOCOL, ctx), plain)
    (tmp_path / "all").mkdir()
    ctx = Context("key", tmp_path / "all")
    wary = replace(FEW, threshold=1e9, similarity=-2.0).repair(model, photos(), None, ctx)
    ModelCodec(model).save(wary, ctx.folder)
    drawn = draw_prompted(ModelCodec(model).load(ctx.folder), prompts, seeds, PROTOCOL, ctx)
    assert drawn.shape == plain.shape and not torch.equal(drawn, plain)


def test_scores_come_from_the_report_and_each_from_its_own_prompt(model: Model, tmp_path: Path) -> None:
    method, ctx = replace(FEW, detector="cda"), Context("key", tmp_path)
    method.repair(model, photos(), None, ctx)
    report = read_report(tmp_path)
    both = method.score_inputs(model, ("a cat", "sks a dog"), report, ctx)
    assert both.shape == (2,) and both.isfinite().all()
    assert torch.allclose(method.score_inputs(model, ("sks a dog",), report, ctx)[0], both[1], rtol=1e-3)
    for wrong in ((torch.zeros(2, 3, 8, 8), report), (("a cat",), None)):
        with pytest.raises(BenchError, match="scores prompts"):
            method.score_inputs(model, *wrong, ctx)


def test_it_knows_no_trigger_and_refuses_what_it_cannot_do(model: Model, tmp_path: Path) -> None:
    assert facts_of(T2IShield).knows == ()
    with pytest.raises(BenchError, match="captions"):
        FEW.repair(model, photos(()), None, Context("key", tmp_path))
    for field, value in (("detector", "magic"), ("false_alarms", 1.0), ("prompts", 2), ("steps", 0)):
        with pytest.raises(BenchError, match=field):
            T2IShield(**{field: value})  # type: ignore[arg-type]


def test_published_settings() -> None:
    method = T2IShield()
    assert (method.components, method.similarity, method.map_factor, method.search_steps) == (20, 0.85, 4, 25)
