"""Checks of attacks: those that learn a person, those that edit a photo, and those that implant a backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.codecs import CustomisedCodec, ImplantCodec
from bench.identity import folder_digest
from bench.protocols import CustomizationProtocol, EditingProtocol
from bench.records import Customised, Edit, ImageSet, Model, Secret
from bench.testing.case import Case, expect
from bench.testing.scenes import SIDE, Watched, differing, people, pictures, tiny_model, watched, weights, world_seed

GENERATORS = "draw from ctx.generator(...), never from the generators of torch, numpy or random."
APART = "draw picture i from photo, edit and seeds[i] alone."
IMAGES = 8
ONE_LEVEL = 1
"""How far a picture may move, in levels, when others are drawn beside it: rounding."""


def model_of(case: Case) -> Model:
    return tiny_model(case.facts.needs, case.facts.track[0])


def customise(case: Case, ctx: Watched, person: int = 0, world: int = 0) -> Customised:
    subject = people()[person]
    with world_seed(world):
        found: Customised = case.make().customise(subject.published, subject.class_noun, model_of(case), ctx)
    return found


def learned(found: Customised) -> tuple[dict[str, str], list[Any]]:
    """Everything that an attacker generates from: digests of weights, and conditioning pixels."""
    return weights(found.model), [] if found.conditioning is None else found.conditioning.pixels.tolist()


def check_customises(case: Case, folder: Path) -> None:
    """What was learned differs from the clean model, can be stored and found again, and draws pictures."""
    from bench.diffusion.sampling import draw_customised

    model, ctx = model_of(case), watched(folder)
    before = folder_digest(model.base)
    found = customise(case, ctx)
    name = case.name
    expect(isinstance(found, Customised), f"{name}: customise must return a bench.records.Customised.")
    expect(folder_digest(model.base) == before, f"{name}: writes into the model's folder; weights go under ctx.folder.")
    expect(found.model != model or found.conditioning is not None,
           f"{name}: the attacker is left with the clean model; return it with parts, adapters or conditioning photos.")
    CustomisedCodec(model).save(found, ctx.folder)
    again = CustomisedCodec(model).load(ctx.folder)
    protocol = CustomizationProtocol(per_prompt=1, steps=2)
    drawn = draw_customised(again, [f"a photo of {found.token} person"] * 2, [1, 2], protocol, ctx)
    expect(drawn.dtype == torch.uint8 and drawn.shape[:2] == (2, 3), f"{name}: what it learned draws no pictures.")


def check_customise_determinism(case: Case, folder: Path) -> None:
    one, other = (learned(customise(case, watched(folder), world=world)) for world in (0, 1))
    expect(one == other, f"{case.name}: two runs with one key learn other weights; {GENERATORS}")


def check_customise_seed(case: Case, folder: Path) -> None:
    first = watched(folder)
    one, other = learned(customise(case, first)), learned(customise(case, watched(folder, "two")))
    expect(not first.asked or one != other, f"{case.name}: asks ctx for randomness, but another key learns the "
                                            "same; use what is drawn, or do not draw.")


def check_customise_photos(case: Case, folder: Path) -> None:
    """Another person's photos teach something else."""
    one, other = (learned(customise(case, watched(folder), person)) for person in (0, 1))
    expect(one != other, f"{case.name}: learns the same from another person's photos; train on `photos`.")


def implant(case: Case, ctx: Watched, world: int = 0) -> tuple[Model, Secret]:
    with world_seed(world):
        found: tuple[Model, Secret] = case.make().implant(model_of(case), pictures(IMAGES, SIDE), ctx)
    return found


def check_implants(case: Case, folder: Path) -> None:
    """Weights differ from the clean model's; the secret holds a trigger and a target, and both can be stored."""
    clean, ctx = model_of(case), watched(folder)
    before = folder_digest(clean.base)
    model, secret = implant(case, ctx)
    name = case.name
    expect(folder_digest(clean.base) == before, f"{name}: writes into the clean model; weights go under ctx.folder.")
    changed = [part for part, path in model.parts.items() if folder_digest(path) != folder_digest(clean.base / part)]
    expect(bool(changed) or bool(model.adapters), f"{name}: no weight differs from the clean model's; train them.")
    _check_secret(name, secret)
    ImplantCodec(clean).save((model, secret), ctx.folder)
    ImplantCodec(clean).load(ctx.folder)


def _check_secret(name: str, secret: Secret) -> None:
    trigger, target = secret.trigger, secret.target
    fits = bool(trigger.strip()) if isinstance(trigger, str) else (
        trigger.is_floating_point() and trigger.shape == (3, SIDE, SIDE) and bool(trigger.isfinite().all()))
    expect(fits, f"{name}: the trigger must be a word, or float [3, h, w] of the model's pictures in [-1, 1].")
    expect(target.dtype == torch.uint8 and target.ndim == 3 and target.shape[0] == 3,
           f"{name}: the target must be uint8 [3, h, w], not {target.dtype} {list(target.shape)}.")


def check_implant_determinism(case: Case, folder: Path) -> None:
    (one, first), (other, second) = (implant(case, watched(folder), world) for world in (0, 1))
    same = weights(one) == weights(other) and _equal(first.trigger, second.trigger)
    expect(same and _equal(first.target, second.target),
           f"{case.name}: two runs with one key give another backdoor; {GENERATORS}")


def _equal(one: Tensor | str, other: Tensor | str) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return isinstance(one, str) and isinstance(other, str) and one == other


def check_implant_seed(case: Case, folder: Path) -> None:
    first = watched(folder)
    one, other = weights(implant(case, first)[0]), weights(implant(case, watched(folder, "two"))[0])
    expect(not first.asked or one != other, f"{case.name}: asks ctx for randomness, but another key gives the "
                                            "same weights; use what is drawn, or do not draw.")


def tasks() -> tuple[ImageSet, list[Edit]]:
    """The photos of three people, and what is asked of each."""
    subjects = people("editing")
    pixels = torch.cat([subject.published.pixels for subject in subjects])
    return ImageSet(pixels, tuple(s.name for s in subjects)), [subject.edits[0] for subject in subjects]


def edited(
    case: Case, photos: ImageSet, edits: Sequence[Edit], seeds: Sequence[int], folder: Path, world: int = 0,
) -> Tensor:
    protocol = EditingProtocol(steps=4, seeds=2)
    with world_seed(world):
        found: Tensor = case.make().edit(photos, edits, seeds, model_of(case), protocol, watched(folder))
    return found


def check_edits(case: Case, folder: Path) -> None:
    """One 8-bit picture per photo, the same again, and another from other seeds and of other photos."""
    photos, edits = tasks()
    usual, again, reseeded = (edited(case, photos, edits, seeds, folder, world)
                              for seeds, world in (((1, 2, 3), 0), ((1, 2, 3), 1), ((4, 5, 6), 0)))
    name = case.name
    expect(usual.dtype == torch.uint8 and usual.ndim == 4 and usual.shape[:2] == (len(photos), 3),
           f"{name}: edit returns {usual.dtype} {list(usual.shape)}; give uint8 [n, 3, h, w], a picture per photo.")
    expect(torch.equal(usual, again), f"{name}: the same seeds give other pictures; {APART}")
    expect(differing(usual, reseeded) > 0, f"{name}: other seeds give the same pictures; {APART}")
    turned = ImageSet(photos.pixels.flip(0), photos.names)
    expect(differing(usual, edited(case, turned, edits, (1, 2, 3), folder)) > 0,
           f"{name}: other photos give the same pictures; an editor starts from the photo.")


def check_edits_apart(case: Case, folder: Path) -> None:
    """Picture i depends on photo, edit and seed i alone, to rounding."""
    photos, edits = tasks()
    together = edited(case, photos, edits, (1, 2, 3), folder)
    alone = edited(case, ImageSet(photos.pixels[1:2], photos.names[1:2]), edits[1:2], (2,), folder)
    gap = int((together[1:2].int() - alone.int()).abs().max())
    expect(gap <= ONE_LEVEL, f"{case.name}: a photo edited alone is {gap} levels from the same among others; {APART}")
