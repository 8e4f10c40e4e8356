"""Random photos of made-up people, for tests of defenses on tiny pipelines."""

from __future__ import annotations

import torch

from bench.records import ImageSet, Subject


def subject(name: str, size: int = 16, photos: int = 3) -> Subject:
    """A person whose photos are noise that depends on the name's letters only."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def drawn() -> ImageSet:
        pixels = torch.randint(0, 256, (photos, 3, size, size), generator=generator, dtype=torch.int32)
        return ImageSet(pixels.to(torch.uint8), tuple("abcdefgh"[:photos]))

    return Subject(name, drawn(), drawn(), drawn())
