"""Checks of defenses that protect photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.codecs import read_png, write_png
from bench.records import ImageSet, Model, Subject
from bench.testing.case import Case, expect
from bench.testing.scenes import (
    SIDE,
    Watched,
    copied,
    differing,
    joined,
    part,
    people,
    tiny_model,
    watched,
    world_seed,
)

ROUNDING = 0.02
"""Share of values that may differ when others are in the batch: rounding can turn a gradient's sign."""
BUDGETS: tuple[tuple[float | None, int], ...] = ((1.0, SIDE), (6.375, SIDE + 8), (16.0, SIDE))
UNSET: tuple[tuple[float | None, int], ...] = ((None, SIDE), (None, SIDE + 8))
"""eps and side of the photos; without an option eps, sides alone."""


def model_of(case: Case, seed: int = 0) -> Model:
    return tiny_model(case.facts.needs, case.facts.track[0], seed)


def subjects_of(case: Case, side: int = SIDE) -> list[Subject]:
    return people(case.facts.track[0], side)


def protect(
    case: Case, subjects: Sequence[Subject], ctx: Watched, seed: int = 0, world: int = 0, eps: float | None = None,
) -> list[ImageSet]:
    """What the plugin makes of copies of the subjects. ``seed``: which model; ``world``: of process-wide generators."""
    method = case.make() if eps is None else case.make(eps=eps)
    with world_seed(world):
        found = method.protect([copied(subject) for subject in subjects], model_of(case, seed), ctx)
    expect(isinstance(found, list) and len(found) == len(subjects),
           f"{case.name}: protect must return a list with one ImageSet per subject.")
    return list(found)


def check_output(case: Case, folder: Path) -> None:
    """One set per subject, names and sizes as published, 8-bit; the originals are left as they were."""
    subjects, kept = subjects_of(case), subjects_of(case)
    with world_seed(0):
        found = case.make().protect(subjects, model_of(case), watched(folder))
    name = case.name
    for subject, before, after in zip(subjects, kept, found, strict=True):
        old, new = before.published, after
        expect(new.pixels.dtype == torch.uint8 and new.pixels.shape == old.pixels.shape,
               f"{name}: returns {new.pixels.dtype} {list(new.pixels.shape)} for uint8 {list(old.pixels.shape)}; "
               "bench.diffusion.images.quantise_within rounds floats within the budget.")
        expect(new.names == old.names and new.captions == old.captions,
               f"{name}: names or captions changed; return dataclasses.replace(subject.published, pixels=...).")
        same = [torch.equal(getattr(subject, of).pixels, getattr(before, of).pixels) for of in ("published", "clean")]
        expect(all(same), f"{name}: writes into the photos that it was given; work on a clone.")


def check_determinism(case: Case, folder: Path) -> None:
    """The same key gives the same bits, whatever stands in the process-wide generators."""
    subjects = subjects_of(case)
    one, other = (protect(case, subjects, watched(folder), world=seed) for seed in (0, 1))
    expect(differing(joined(one), joined(other)) == 0,
           f"{case.name}: two runs with one key differ; draw from ctx.generator(subject.name), never from the "
           "generators of torch, numpy or random.")


def check_seed(case: Case, folder: Path) -> None:
    """Another key gives other photos, if any randomness was asked for."""
    subjects, first = subjects_of(case), watched(folder)
    one, other = protect(case, subjects, first), protect(case, subjects, watched(folder, "two"))
    expect(not first.asked or differing(joined(one), joined(other)) > 0,
           f"{case.name}: asks ctx for randomness (for {first.asked[:1]}), but another key gives the "
           "same photos; use what is drawn, or do not draw.")


def check_budget(case: Case, folder: Path) -> None:
    """The saved 8-bit files lie within the budget, for several eps and sizes where eps is an option."""
    for eps, side in BUDGETS if case.has_eps else UNSET:
        subjects = subjects_of(case, side)
        budget = (case.make() if eps is None else case.make(eps=eps)).budget().eps
        expect(eps is None or budget == eps, f"{case.name}: eps={eps}, but budget() says {budget}; return "
                                             "Budget(self.eps).")
        for subject, photos in zip(subjects, protect(case, subjects, watched(folder), eps=eps), strict=True):
            change = saved_change(subject.published, photos, folder / "photo.png")
            expect(change <= budget,
                   f"{case.name}: a saved photo of {side} pixels changes by {change} levels, over its budget of "
                   f"{budget:g}; round with bench.diffusion.images.quantise_within(original, protected, budget).")


def saved_change(before: ImageSet, after: ImageSet, path: Path) -> int:
    """The largest change of any channel of any pixel of the decoded PNG, in levels."""
    worst = 0
    for old, new in zip(before.pixels, after.pixels, strict=True):
        write_png(new, path)
        worst = max(worst, int((read_png(path).int() - old.int()).abs().max()))
    return worst


def check_order(case: Case, folder: Path) -> None:
    """A subject's photos do not depend on who else is protected, nor in which order."""
    subjects = subjects_of(case)
    usual = protect(case, subjects, watched(folder))
    reverse = protect(case, subjects[::-1], watched(folder))[::-1]
    alone = protect(case, subjects[1:2], watched(folder))
    advice = "give each subject a generator of its own, ctx.generator(subject.name), and keep nothing between subjects."
    expect(differing(joined(usual), joined(reverse)) <= ROUNDING,
           f"{case.name}: the order of subjects changes their photos; {advice}")
    expect(differing(joined(usual[1:2]), joined(alone)) <= ROUNDING,
           f"{case.name}: a subject protected alone gets other photos than among others; {advice}")


def check_photos_apart(case: Case, folder: Path) -> None:
    """A photo by itself is protected as it is among the subject's others."""
    subject = subjects_of(case)[0]
    together = protect(case, [subject], watched(folder))[0]
    for place in range(len(together)):
        single = Subject(subject.name, subject.clean, part(subject.published, place), subject.held_out,
                         subject.class_noun, subject.edits)
        alone = protect(case, [single], watched(folder))[0]
        expect(differing(joined([part(together, place)]), joined([alone])) <= ROUNDING,
               f"{case.name}: photo {together.names[place]} alone is not what it is among others; give each a "
               "generator of its own, ctx.generator(subject.name, photo_name), or, if the method learns from all "
               "photos of a person together, test it with apart=False.")


def check_moves_pixels(case: Case, folder: Path) -> None:
    """Every photo is changed: an objective whose gradient is lost leaves them as they were."""
    subjects = subjects_of(case)
    for subject, photos in zip(subjects, protect(case, subjects, watched(folder)), strict=True):
        for place, name in enumerate(photos.names):
            expect(differing(subject.published.pixels[place], photos.pixels[place]) > 0,
                   f"{case.name}: photo {name} of {subject.name} comes back unchanged; check that the gradient "
                   "of the objective reaches the pixels, or declare control=True.")


def check_follows_model(case: Case, folder: Path) -> None:
    """A defense that needs a model's parts protects differently against another model."""
    subjects = subjects_of(case)
    one, other = (protect(case, subjects, watched(folder), seed) for seed in (0, 1))
    expect(differing(joined(one), joined(other)) > 0,
           f"{case.name}: needs={case.facts.needs}, but another model gives the same photos; let the objective "
           "depend on the model that protect is given, or need nothing of it.")

