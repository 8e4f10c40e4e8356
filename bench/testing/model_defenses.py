"""Checks of defenses that clean models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bench.codecs import ModelCodec
from bench.identity import folder_digest
from bench.protocols import BackdoorProtocol
from bench.records import ImageSet, Model
from bench.reports import read_report
from bench.testing.case import Case, expect
from bench.testing.scenes import SIDE, Watched, pictures, secret_of, tiny_model, watched, weights, world_seed
from bench.tracks.backdoor import draw

IMAGES, SAMPLES = 8, 2
ROUNDING = 1e-3
"""How far a score may move, relative to the spread of all, when the inputs come in another order."""


def model_of(case: Case) -> Model:
    return tiny_model(case.facts.needs, "backdoor")


def data() -> ImageSet:
    return pictures(IMAGES, SIDE)


def repair(case: Case, ctx: Watched, world: int = 0) -> Model:
    """The plugin's answer; it gets the secret only if it declares that it knows the trigger."""
    model = model_of(case)
    secret = secret_of(model) if "trigger" in case.facts.knows else None
    with world_seed(world):
        found = case.make().repair(model, data(), secret, ctx)
    expect(isinstance(found, Model), f"{case.name}: repair must return a bench.records.Model, not {type(found)}.")
    assert isinstance(found, Model)
    return found


def check_output(case: Case, folder: Path) -> None:
    """The answer can be stored, found again and sampled; the suspicious model is left as it was."""
    model, ctx = model_of(case), watched(folder)
    before = folder_digest(model.base)
    found = repair(case, ctx)
    name = case.name
    expect(folder_digest(model.base) == before, f"{name}: writes into the suspicious model's folder; new weights go "
                                                "under ctx.folder.")
    ModelCodec(model).save(found, ctx.folder)
    again = ModelCodec(model).load(ctx.folder)
    expect(samples(again).shape[0] == SAMPLES, f"{name}: the repaired model draws no pictures.")


def samples(model: Model) -> Tensor:
    """A few pictures by the model, or by the guard that was left in its sampler's place."""
    prompts = ("a photo of a man",) * SAMPLES if "text_to_image" in model.capabilities else ()
    protocol = BackdoorProtocol(samples=SAMPLES, steps=2, sampler="ddim")
    return draw(model, None, prompts, list(range(SAMPLES)), protocol, watched(model.base.parent)).images.pixels


def check_determinism(case: Case, folder: Path) -> None:
    """The same key gives the same weights to the bit, whatever stands in the process-wide generators."""
    one, other = (weights(repair(case, watched(folder), world)) for world in (0, 1))
    expect(one == other, f"{case.name}: two runs with one key give other weights; draw from ctx.generator(...), "
                         "never from the generators of torch, numpy or random.")


def check_seed(case: Case, folder: Path) -> None:
    """Another key gives other weights or another report, if any randomness was asked for."""
    first, second = watched(folder), watched(folder, "two")
    one, other = weights(repair(case, first)), weights(repair(case, second))
    same = one == other and repr(read_report(first.folder)) == repr(read_report(second.folder))
    expect(not first.asked or not same,
           f"{case.name}: asks ctx for randomness (for {first.asked[:1]}), but another key gives the "
           "same model and the same report; use what is drawn, or do not draw.")


def check_does_something(case: Case, folder: Path) -> None:
    """Other weights, a guard, a report, or scores of inputs."""
    ctx, model = watched(folder), model_of(case)
    found = repair(case, ctx)
    before = {f"parts/{part}": folder_digest(model.base / part) for part in found.parts}
    changed = any(folder_digest(path) != before[f"parts/{part}"] for part, path in found.parts.items())
    said = read_report(ctx.folder) is not None or hasattr(case.cls, "score_inputs")
    expect(changed or found.guard is not None or bool(found.adapters) or said,
           f"{case.name}: the model comes back as it was, without a report; save new weights with "
           "bench.diffusion.loading.save_part, write a bench.reports.write_report, or declare control=True.")


def check_scores(case: Case, folder: Path) -> None:
    """One finite score per input that depends on that input alone: inputs come in a mixed order."""
    ctx, model = watched(folder), model_of(case)
    repair(case, ctx)
    prompts = pictures(6, SIDE).captions
    noise = torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    inputs, backward = (noise, noise.flip(0)) if "unconditional" in model.capabilities else (prompts, prompts[::-1])
    report = read_report(ctx.folder)
    usual, mixed = (case.make().score_inputs(model, given, report, watched(folder)) for given in (inputs, backward))
    expect(usual.shape == (6,) and bool(usual.isfinite().all()),
           f"{case.name}: score_inputs returns {list(usual.shape)} for 6 inputs, or not all finite; return one "
           "score per input.")
    gap = float((usual - mixed.flip(0)).abs().max())
    expect(gap <= ROUNDING * max(float(usual.abs().max()), 1e-6),
           f"{case.name}: scores change by {gap:.3g} when the inputs come in another order; score each input by "
           "itself, and take thresholds from nowhere but the report.")
