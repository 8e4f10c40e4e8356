"""What a defender against edits may be told, for tests on made-up photos."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.records import Edit, Subject


def told(person: Subject, instruction: str = "add glasses", masked: bool = False) -> Subject:
    """The person with one edit for each published photo. The mask, if any, is the upper left quarter."""
    side = person.published.pixels.shape[-1]
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:side // 2, :side // 2] = True
    target = f"a photo of a man, {instruction}"
    edit = Edit(instruction, "a photo of a man", target, ("a photo of a man", target), mask if masked else None)
    return replace(person, edits=(edit,) * len(person.published))
