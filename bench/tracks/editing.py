"""Editing: photo - protect - purify - edit(instruction, seed) - score against the edit of the original photo.

The defender protects on the surrogate, the attacked model where the cell names none; the editor is always the latter.
The original, unpurified photos are edited from the same seeds: that is what the attacker wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from bench.codecs import GenerationsCodec, ImageSetCodec
from bench.errors import BenchError
from bench.identity import digest
from bench.plugin import facts_of, identity
from bench.records import Edit, EditingEvidence, EditTask, Generations, ImageSet, Model
from bench.tracks.customization import budget_of, check_budget, digest_images, fitted, surrogate_of
from bench.workbench import Outcome, Workbench

if TYPE_CHECKING:
    from torch import Tensor

    from bench.config import Cell
    from bench.context import Context
    from bench.protocols import EditingProtocol
    from bench.store import Stored

VERSION = 1
PICTURED = 4
"""Photos on the sheet that a result keeps."""


def run(cell: Cell, model: Model, bench: Workbench) -> Outcome:
    """One cell, from photos to edits. Every stage is stored."""
    tasks: Sequence[EditTask] = cell.data.edits()
    original = photos_of(tasks)
    if hasattr(cell.attack, "check"):
        cell.attack.check([task.edit for task in tasks], protocol_of(cell))
    origin = {"data": cell.data.digest(), "seed": cell.seed}
    defense, surrogate = identity(cell.defense), surrogate_of(cell, model)
    protected = bench.stage(
        "protect", VERSION,
        {**origin, "model": surrogate.digest, "defense": defense, "told": protocol_of(cell).told},
        lambda ctx: protect(cell, tasks, surrogate, ctx), ImageSetCodec(),
        seeded_by={"defense": defense["name"], "seed": cell.seed},
    )
    purifier = identity(cell.purifier)
    purified = bench.stage(
        "purify", VERSION, {"photos": protected.key, "model": model.digest, "purifier": purifier, "seed": cell.seed},
        lambda ctx: cell.purifier.purify(protected.value, model, ctx), ImageSetCodec(),
        seeded_by={"purifier": purifier, "seed": cell.seed},
    )
    benign, edited = (edit(cell, tasks, photos, model, bench) for photos in (original, purified.value))
    protocol = protocol_of(cell)
    evidence = EditingEvidence(tuple(tasks), protected.value, purified.value, benign.value, edited.value,
                               protocol.seeds, budget_of(cell.defense), protocol.judge)
    inputs = {**origin, "protected": protected.key, "purified": purified.key, "benign": benign.key,
              "edited": edited.key, "judge": protocol.judge}
    return Outcome(evidence, inputs, pictures(evidence) if cell.seed == 0 else {})


def protocol_of(cell: Cell) -> EditingProtocol:
    return cast("EditingProtocol", cell.protocol)


def photos_of(tasks: Sequence[EditTask]) -> ImageSet:
    """The one published photo of every task, under its subject's name."""
    import torch

    for task in tasks:
        if len(task.subject.published) != 1:
            raise BenchError(f"data: {task.subject.name} publishes {len(task.subject.published)} photos; "
                             "on the editing track every subject publishes one.")
    return ImageSet(torch.cat([task.subject.published.pixels for task in tasks]),
                    tuple(task.subject.name for task in tasks))


def protect(cell: Cell, tasks: Sequence[EditTask], model: Model, ctx: Context) -> ImageSet:
    """Every task's photo after the defense, which is told the edits only if the protocol says so; refuses photos that
    left the budget."""
    import torch

    told = protocol_of(cell).told
    subjects = [replace(task.subject, edits=(task.edit,) if told else ()) for task in tasks]
    found = cell.defense.protect(subjects, model, ctx)
    for subject, photos in zip(subjects, found, strict=True):
        check_budget(cell, subject, photos)
    return ImageSet(torch.cat([photos.pixels for photos in found]), tuple(subject.name for subject in subjects))


def edit(
    cell: Cell, tasks: Sequence[EditTask], photos: ImageSet, model: Model, bench: Workbench,
) -> Stored[Generations]:
    """Every photo edited as asked, once per seed.

    The key holds the pixels' own digest, so a defense that changes nothing is the same attack as no defense at all.
    """
    attack = identity(cell.attack)
    protocol = replace(protocol_of(cell), told=True, judge="")  # neither is known to the attacker
    asked = {"photos": digest_images(photos), "model": model.digest, "attack": attack, "protocol": protocol,
             "data": cell.data.digest(), "seed": cell.seed}
    return bench.stage(
        "edit", VERSION, asked, lambda ctx: draw(cell, tasks, photos, model, protocol, ctx), GenerationsCodec(),
        seeded_by={"attack": attack, "seed": cell.seed},
    )


def draw(
    cell: Cell, tasks: Sequence[EditTask], photos: ImageSet, model: Model, protocol: EditingProtocol, ctx: Context,
) -> Generations:
    places = [place for place in range(len(tasks)) for _ in range(protocol.seeds)]
    names = tuple(f"{task.subject.name}_{place}" for task in tasks for place in range(protocol.seeds))
    repeated = ImageSet(photos.pixels[places], names)
    edits: list[Edit] = [tasks[place].edit for place in places]
    seeds = tuple(int(digest([name, cell.seed], length=15), 16) for name in names)
    pixels: Tensor = cell.attack.edit(repeated, edits, seeds, model, protocol, ctx)
    if pixels.shape[0] != len(names):
        raise BenchError(f"{facts_of(cell.attack).name}: edit returned {len(pixels)} pictures for {len(names)} photos.")
    return Generations(ImageSet(pixels, names), tuple(one.instruction for one in edits), seeds)


def pictures(evidence: EditingEvidence) -> dict[str, Any]:
    """One sheet, a column per photo: original, protected, perturbation x10 around grey, the benign edit, the edit."""
    import torch

    original, protected = photos_of(evidence.tasks).pixels[:PICTURED], evidence.protected.pixels[:PICTURED]
    change = ((protected.int() - original.int()) * 10 + 128).clamp(0, 255).to(torch.uint8)
    drawn = [one.images.pixels[::evidence.seeds][:PICTURED] for one in (evidence.benign, evidence.edited)]
    rows = [original, protected, change, *(fitted(pixels, original.shape[-1]) for pixels in drawn)]
    return {"original_protected_change_benign_edited": torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)}
