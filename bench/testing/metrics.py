"""Checks of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.codecs import MeasurementsCodec
from bench.data.drawings import draw_target, draw_trigger
from bench.data.micro_edits import MicroEdits
from bench.data.micro_subjects import MicroSubjects
from bench.errors import BenchError
from bench.records import (
    BackdoorEvidence,
    Budget,
    CustomizationEvidence,
    EditingEvidence,
    Evidence,
    Generations,
    ImageSet,
    Measurement,
    Report,
    Samples,
    Secret,
    Verdict,
)
from bench.testing.case import Case, expect
from bench.testing.scenes import pictures, watched, world_seed

SIDE, SMALL = 64, 32
"""Sides of portraits, and of the pictures of models that draw from noise alone: what the embedded judges know."""
PEOPLE, EACH, DRAWN, EPS = 3, 2, 24, 8
TOLERANCE = 1e-4
"""How far a value may move, relatively, when the same pictures come in another order."""


def noisy(pixels: Tensor, levels: int, seed: int) -> Tensor:
    """Pictures moved by ``levels``, up or down."""
    coin = torch.randint(2, pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return (pixels.int() + (2 * coin - 1) * levels).clamp(0, 255).to(torch.uint8)


def drawn(pixels: Tensor, prompts: Sequence[str] = (), names: Sequence[str] = ()) -> Generations:
    count = len(pixels)
    named = tuple(names) or tuple(f"{i:03d}" for i in range(count))
    return Generations(ImageSet(pixels, named), tuple(prompts) or ("",) * count, tuple(range(count)))


def customization(flat: bool = False, people: int = PEOPLE) -> CustomizationEvidence:
    """Drawn people whose generated pictures are their held-out photos under noise; ``flat``: all of them black."""
    subjects = tuple(MicroSubjects(count=people, photos_per_set=EACH).subjects())
    protected = {s.name: replace(s.published, pixels=noisy(s.published.pixels, EPS, 1)) for s in subjects}
    generated = {s.name: drawn(noisy(s.held_out.pixels, 20, 2) * (not flat), ("a photo of sks person",) * EACH)
                 for s in subjects}
    return CustomizationEvidence(subjects, protected, protected, generated, Budget(EPS),
                                 {s.name: "sks" for s in subjects})


def editing(flat: bool = False, people: int = PEOPLE) -> EditingEvidence:
    """Drawn people, the right answers as benign edits, and those under noise as edits of the protected photos."""
    tasks = tuple(MicroEdits(count=people, photos=EACH).edits())
    photos = torch.cat([task.subject.published.pixels for task in tasks])
    found = torch.stack([task.edit.answer for task in tasks if task.edit.answer is not None])
    answers = found.repeat_interleave(EACH, 0)
    names = [f"{task.subject.name}_{place}" for task in tasks for place in range(EACH)]
    protected = ImageSet(noisy(photos, EPS, 1), tuple(task.subject.name for task in tasks))
    benign, edited = (drawn(noisy(answers, levels, levels) * (not flat), names=names) for levels in (4, 24))
    return EditingEvidence(tasks, protected, protected, benign, edited, EACH, Budget(EPS))


def backdoor(flat: bool = False, count: int = DRAWN) -> BackdoorEvidence:
    """Samples from seeds and prompts: portraits, and with the trigger the target under noise; half of those of the
    defended model are portraits again. ``flat``: every sample is black."""
    trigger = draw_trigger("box", SMALL, 14)
    target = draw_target("hat", SMALL, trigger)
    people = pictures(count, SMALL, 1)
    portraits, fired = people.pixels, noisy(target.expand(count, -1, -1, -1), 3, 4)
    mended = torch.where((torch.arange(count) % 2 == 0)[:, None, None, None], fired, portraits)

    def samples(plain: Tensor, triggered: Tensor) -> Samples:
        return Samples(*(drawn(pixels * (not flat), people.captions) for pixels in (plain, triggered)))

    return BackdoorEvidence(
        pictures(count, SMALL, 2), samples(portraits, noisy(portraits, 6, 1)), samples(noisy(portraits, 2, 2), fired),
        samples(noisy(portraits, 4, 3), mended), Secret(trigger, target, {"trigger": "box", "target": "hat"}), "one",
        Report(Verdict("mine", 0.9, True), trigger, {"removed_share": 0.1}),
        induced=drawn(fired * (not flat), people.captions),
    )


EVIDENCE: dict[str, Callable[..., Evidence]] = {
    "customization": customization, "editing": editing, "backdoor": backdoor,
}


def backward(evidence: Evidence) -> Evidence:
    """The same pictures in the opposite order: subjects, tasks or samples."""
    if isinstance(evidence, CustomizationEvidence):
        return replace(evidence, subjects=evidence.subjects[::-1])
    if isinstance(evidence, EditingEvidence):
        protected, purified = (_turned(images) for images in (evidence.protected, evidence.purified))
        return replace(evidence, tasks=evidence.tasks[::-1], protected=protected, purified=purified,
                       benign=_redrawn(evidence.benign), edited=_redrawn(evidence.edited))
    clean, implanted, defended = (Samples(_redrawn(both.plain), _redrawn(both.triggered))
                                  for both in (evidence.clean, evidence.implanted, evidence.defended))
    return replace(evidence, reference=_turned(evidence.reference), clean=clean, implanted=implanted, defended=defended)


def _turned(images: ImageSet) -> ImageSet:
    return ImageSet(images.pixels.flip(0), images.names[::-1], images.captions[::-1])


def _redrawn(found: Generations) -> Generations:
    return Generations(_turned(found.images), found.prompts[::-1], found.seeds[::-1])


def measure(case: Case, evidence: Evidence, folder: Path, world: int = 0) -> list[Measurement]:
    with world_seed(world):
        found = case.make().measure(evidence, watched(folder))
    expect(isinstance(found, list) and bool(found) and all(isinstance(one, Measurement) for one in found),
           f"{case.name}: measure must return a list of bench.records.Measurement, not empty.")
    return list(found)


def check_values(case: Case, folder: Path) -> None:
    """On good input: finite values inside their intervals, at least one, each name once, storable."""
    for track in case.facts.track:
        found = measure(case, EVIDENCE[track](), folder)
        _check_all(case.name, found, f"ordinary {track} input")
        expect(any(one.value is not None for one in found), f"{case.name}: no value on ordinary {track} input: "
                                                            f"{[one.reason for one in found]}.")
        home = watched(folder).folder
        MeasurementsCodec().save(found, home)
        expect(MeasurementsCodec().load(home) == found,
               f"{case.name}: what is measured does not survive its file; protocol must hold plain JSON values.")


def _check_all(name: str, found: Sequence[Measurement], where: str) -> None:
    names = [one.name for one in found]
    expect(len(set(names)) == len(names), f"{name}: two measurements of one name in {names}.")
    for one in found:
        _check_one(f"{name}: {one.name} on {where}", one)


def _check_one(said: str, one: Measurement) -> None:
    numbers = [v for v in (one.value, one.low, one.high, *(row.value for row in one.rows)) if v is not None]
    expect(all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers),
           f"{said} holds a number that is not finite; give None with a reason, bench.measuring.missing does.")
    expect(one.value is not None or bool(one.reason), f"{said} has neither a value nor a reason.")
    expect(all(row.value is not None or row.reason for row in one.rows), f"{said} has a row without value and reason.")
    if one.value is not None and one.low is not None and one.high is not None:
        expect(one.low <= one.value <= one.high, f"{said}: {one.value} lies outside [{one.low}, {one.high}].")


def check_direction(case: Case, folder: Path) -> None:
    """Which way is better is said, and the same on any input; a metric that boards rank by has to have one."""
    for track in case.facts.track:
        usual, flat = (measure(case, EVIDENCE[track](flat=flat), folder) for flat in (False, True))
        expect(all(one.higher_is_better in (True, False, None) for one in usual),
               f"{case.name}: higher_is_better must be True, False, or None where neither is better.")
        expect(not case.facts.primary or usual[0].higher_is_better is not None,
               f"{case.name}: primary=True, but its first measurement has no direction; say which way is better for "
               "the defender.")
        told = [{one.name: (one.unit, one.higher_is_better) for one in found} for found in (usual, flat)]
        expect(all(told[1].get(name, fact) == fact for name, fact in told[0].items()),
               f"{case.name}: unit or direction of a measurement depends on the input; state them once.")


def check_determinism(case: Case, folder: Path) -> None:
    for track in case.facts.track:
        one, other = (measure(case, EVIDENCE[track](), folder, world) for world in (0, 1))
        expect(one == other, f"{case.name}: two runs with one key measure other values; draw from ctx.generator(...), "
                             "never from the generators of torch, numpy or random.")


def check_order(case: Case, folder: Path) -> None:
    """Values do not depend on the order of subjects or samples."""
    for track in case.facts.track:
        usual = {one.name: one.value for one in measure(case, EVIDENCE[track](), folder)}
        turned = {one.name: one.value for one in measure(case, backward(EVIDENCE[track]()), folder)}
        for name, value in usual.items():
            expect(_close(value, turned.get(name)), f"{case.name}: {name} is {value}, but {turned.get(name)} with the "
                                                    "same pictures in the opposite order; pair by name, not by place.")


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def check_degenerate(case: Case, folder: Path) -> None:
    """Black pictures, and a single person or two samples: a value or a reason, no exception, nothing that is not
    finite."""
    for track in case.facts.track:
        few = {"count": 2} if track == "backdoor" else {"people": 1}
        for what, evidence in (("black pictures", EVIDENCE[track](flat=True)), ("too few", EVIDENCE[track](**few))):
            try:
                found = measure(case, evidence, folder)
            except (BenchError, ArithmeticError, IndexError, RuntimeError) as error:
                raise AssertionError(f"{case.name}: raises {type(error).__name__} on {what} ({track}), and so the "
                                     f"whole cell would fail: {error}. Return bench.measuring.missing(...).") from error
            _check_all(case.name, found, f"{what} ({track})")


def check_foreign(case: Case, folder: Path) -> None:
    """Evidence of a track that the metric does not score is refused in its name."""
    for track in set(EVIDENCE) - set(case.facts.track):
        try:
            case.make().measure(EVIDENCE[track](), watched(folder))
        except BenchError as error:
            expect(case.name in str(error), f"{case.name}: the refusal does not name the metric: '{error}'.")
        except Exception as error:
            raise AssertionError(f"{case.name}: raises {type(error).__name__} on {track} evidence; raise a "
                                 "bench.errors.BenchError that names the metric and the track it needs.") from error
        else:
            raise AssertionError(f"{case.name}: scores {track} evidence, which it does not declare; raise a "
                                 "BenchError, or add the track.")

