"""Small evidence of the editing track. Not collected by pytest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.data.micro_edits import MicroEdits
from bench.records import Budget, Edit, EditingEvidence, EditTask, Generations, ImageSet, Subject


def task(name: str, photo: Tensor, target: str = "red", others: tuple[str, ...] = ("green", "blue"),
         answer: Tensor | None = None) -> EditTask:
    """One photo, uint8 [3, h, w], of somebody of whom there are no others."""
    nobody = ImageSet(torch.zeros(0, *photo.shape, dtype=torch.uint8), ())
    subject = Subject(name, nobody, ImageSet(photo[None], ("b0",)), nobody)
    return EditTask(subject, Edit(f"make it {target}", others[0], target, others, None, answer))


def generations(pixels: Tensor, tasks: Sequence[EditTask], seeds: int) -> Generations:
    names = tuple(f"{one.subject.name}_{place}" for one in tasks for place in range(seeds))
    return Generations(ImageSet(pixels, names), ("",) * len(names), tuple(range(len(names))))


def evidence(
    tasks: Sequence[EditTask], edited: Tensor, benign: Tensor | None = None, seeds: int = 2,
    protected: Tensor | None = None, eps: float | None = None, judge: str = "micro-clip",
) -> EditingEvidence:
    """``edited``, ``benign``: uint8 [tasks x seeds, 3, h, w], benign as edited unless given; ``protected``: the photos
    after the defense, as they were unless given."""
    names = tuple(one.subject.name for one in tasks)
    photos = torch.cat([one.subject.published.pixels for one in tasks]) if protected is None else protected
    return EditingEvidence(tuple(tasks), ImageSet(photos, names), ImageSet(photos, names),
                           generations(edited if benign is None else benign, tasks, seeds),
                           generations(edited, tasks, seeds), seeds, None if eps is None else Budget(eps), judge)


def drawn(count: int = 8) -> list[EditTask]:
    """People of the drawn world, whose right edits are known."""
    return MicroEdits(count=count).edits()


def originals(tasks: Sequence[EditTask], seeds: int = 2) -> Tensor:
    """Every photo once per seed."""
    return torch.cat([one.subject.published.pixels for one in tasks]).repeat_interleave(seeds, 0)


def answers(tasks: Sequence[EditTask], seeds: int = 2) -> Tensor:
    """Every right answer once per seed."""
    return torch.stack([one.edit.answer for one in tasks if one.edit.answer is not None]).repeat_interleave(seeds, 0)


def noisy(pixels: Tensor, levels: int, seed: int = 0) -> Tensor:
    signs = torch.randint(0, 2, pixels.shape, generator=torch.manual_seed(seed)) * 2 - 1
    return (pixels.int() + levels * signs).clamp(0, 255).to(torch.uint8)
