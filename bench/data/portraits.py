"""Portraits of the drawn world as image sets: the same person and view give the same picture, in any set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.identity import digest
from bench.records import ImageSet

if TYPE_CHECKING:
    from numpy import ndarray

    from bench.micro.world import Identity, View


def portrait(person: int, view: tuple[int, ...], size: int) -> tuple[ndarray[Any, Any], str]:
    """The picture, uint8 [size, size, 3], and full caption of a person in a numbered view."""
    from bench.micro import world

    who, seen = posed(person, view)
    return world.draw(who, seen, size), world.caption(who, seen)


def posed(person: int, view: tuple[int, ...]) -> tuple[Identity, View]:
    """The face of a person, and everything else about their picture in a numbered view."""
    import numpy as np

    from bench.micro import world

    return world.identity(person), world.sample_view(np.random.default_rng((*view, person)))


def portraits(people: Sequence[int], views: Sequence[tuple[int, ...]], names: Sequence[str], size: int) -> ImageSet:
    """One portrait per row of ``people`` and ``views``: uint8 [n, 3, size, size], with captions."""
    import numpy as np
    import torch

    drawn = [portrait(person, view, size) for person, view in zip(people, views, strict=True)]
    pixels = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, tuple(names), tuple(caption for _, caption in drawn))


def world_digest(name: str, options: Mapping[str, Any]) -> str:
    """What names a drawn set: the world's version and the options, since they decide every pixel."""
    from bench.micro import world

    return digest({"set": name, "world": world.VERSION, "options": options})


def check_counts(plugin: str, **counts: int) -> None:
    """Refuse counts below 1, naming the option."""
    for option, value in counts.items():
        if value < 1:
            raise BenchError(f"{plugin}: {option}={value} is too few; give 1 or more.")
