"""Detectors of inputs on whole cells: what they are shown, and that scores reach the metric in the right place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks.baddiffusion import BadDiffusion
from attacks.purifier_none import NoPurifier
from bench.codecs import InputScoresCodec
from bench.config import Cell, Settings, Tracker
from bench.context import Context
from bench.data.micro_portraits import MicroPortraits
from bench.diffusion.checkpoints import resolve
from bench.errors import BenchError
from bench.plugin import Facts
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet, InputScores, Model, Report, Secret, Verdict
from bench.reports import write_report
from bench.results import Result
from bench.runner import run_cell
from bench.testing.pipelines import save_ddpm
from bench.tracks.backdoor import NOISES, prompts_to_score, scored, seeds_of
from defenses.none import NoDefense
from metrics.input_detection import InputDetection


class Toy(NoDefense):
    """Calls noise suspicious whose mean is low: the drawn box trigger is -1 nearly everywhere."""

    seen: list[Any] = []

    def repair(self, suspicious: Model, data: ImageSet, secret: Secret | None, ctx: Context) -> Model:
        assert secret is None
        write_report(Report(Verdict("toy", 0.25, False)), ctx.folder)
        return suspicious

    def score_inputs(
        self, model: Model, inputs: Tensor | tuple[str, ...], report: Report | None, ctx: Context,
    ) -> Tensor:
        assert isinstance(inputs, Tensor)
        self.seen.append((inputs, report, model))
        return -inputs.flatten(1).mean(1)


def run(model: Path, defense: Any, folder: Path, samples: int = 2) -> Result:
    known = resolve(str(model))
    cell = Cell(
        id="c" * 16, suite="test", track="backdoor", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=MicroPortraits(train=4, held_out=2, size=16),
        defense=defense, purifier=NoPurifier(), attack=BadDiffusion(steps=1, batch=2, trigger_size=6),
        protocol=BackdoorProtocol(samples=samples, steps=2), metrics={"input_detection": InputDetection()},
    )
    result = run_cell(cell, Settings(folder / "results", folder / "store", "cpu", 1, Tracker(wandb="disabled")))
    assert result.status == "ok", result.error
    return result


def value(result: Result, name: str) -> float | None:
    found = result.measurement(name)
    assert found is not None
    return found.value


def test_a_detectors_scores_reach_the_metric_and_are_stored(tmp_path: Path) -> None:
    model = save_ddpm(tmp_path / "ddpm", size=16)
    Toy.seen.clear()
    found = run(model, Toy(), tmp_path)
    assert value(found, "input_auroc") == 1 and value(found, "input_tpr@1%") == 1
    (inputs, report, scored_model), = Toy.seen
    assert inputs.shape == (3 * NOISES, 3, 16, 16) and report.verdict.name == "toy"
    assert "unet" in scored_model.parts, "the implanted model, not the clean one"
    run(model, Toy(), tmp_path)
    assert len(Toy.seen) == 1, "scores come from the store"


def test_defenses_that_score_no_inputs_have_a_reason_and_no_stage(tmp_path: Path) -> None:
    found = run(save_ddpm(tmp_path / "ddpm", size=16), NoDefense(), tmp_path)
    measured = found.measurement("input_auroc")
    assert measured is not None and measured.value is None and "scores no inputs" in measured.reason
    assert "score_inputs" not in found.artefacts


class Recorder:
    """Scores an input by its number; remembers the order in which it was shown."""

    __plugin__ = Facts("defense", "recorder", ("backdoor",))

    def __init__(self, returned: Tensor | None = None) -> None:
        self.shown: Sequence[Any] = ()
        self.returned = returned

    def score_inputs(self, model: Any, inputs: Any, report: Report | None, ctx: Context) -> Tensor:
        self.shown = [float(x) for x in inputs]
        return torch.tensor(self.shown) if self.returned is None else self.returned


@pytest.mark.parametrize("kind", ["noise", "prompts"])
def test_inputs_are_shown_in_a_mixed_order_and_scores_find_their_way_back(tmp_path: Path, kind: str) -> None:
    numbers = torch.arange(60.0).split([20, 20, 20])
    parts: list[Any] = list(numbers) if kind == "noise" else [tuple(str(float(x)) for x in part) for part in numbers]
    recorder: Any = Recorder()
    nothing: Any = None
    found = scored(recorder, nothing, parts, None, Context("key", tmp_path))
    assert list(recorder.shown) != sorted(recorder.shown)
    for scores, expected in zip((found.calibration, found.clean, found.triggered), numbers, strict=True):
        assert scores.tolist() == expected.tolist()


@pytest.mark.parametrize("returned", [torch.zeros(5), torch.zeros(6, 1), torch.full((6,), float("nan"))])
def test_scores_of_another_shape_or_not_finite_are_refused(tmp_path: Path, returned: Tensor) -> None:
    recorder: Any = Recorder(returned)
    nothing: Any = None
    with pytest.raises(BenchError, match="recorder"):
        scored(recorder, nothing, list(torch.arange(6.0).split(2)), None, Context("key", tmp_path))


def test_prompts_are_calibrated_on_the_defenders_captions() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    own, other = ImageSet(pixels, ("a", "b"), ("own one", "own two")), ImageSet(pixels, ("c", "d"), ("one", "two"))
    calibration, clean, triggered = prompts_to_score(own, other, Secret("sks", pixels[0]))
    assert set(calibration) == {"own one", "own two"} and clean[:3] == ("one", "two", "one")
    assert triggered[:2] == ("sks one", "sks two") and len(calibration) == len(clean) == len(triggered) >= 128
    with pytest.raises(BenchError, match="captions"):
        prompts_to_score(ImageSet(pixels, ("a", "b")), other, Secret("sks", pixels[0]))


def test_more_seeds_begin_with_the_same_ones() -> None:
    assert seeds_of(5, 0)[:3] == seeds_of(3, 0) and seeds_of(3, "calibration", 0) != seeds_of(3, 0)


def test_scores_come_back_from_disk(tmp_path: Path) -> None:
    scores = InputScores(*torch.randn(3, 4, dtype=torch.float64).unbind(0))
    InputScoresCodec().save(scores, tmp_path)
    back = InputScoresCodec().load(tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(vars(scores).values(), vars(back).values(), strict=True))
