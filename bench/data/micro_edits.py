"""People of the drawn world, and what is asked of their photos: edits whose right answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from bench.data.portraits import check_counts, portraits, posed, world_digest
from bench.errors import BenchError
from bench.plugin import parameters, plugin
from bench.records import Edit, EditTask, ImageSet, Subject

if TYPE_CHECKING:
    from torch import Tensor

    from bench.micro.world import Identity, View

FIELDS = ("glasses", "background", "hair_colour", "beard", "shirt", "hair_style")
"""What is edited, in turn."""
UNREAD = ("add a moustache", "remove the beard", "make the hair short")
"""Edits left out, for micro-clip, the judge, mostly does not find the right caption of the world's own answer: in 0.43,
0.51 and 0.58 of the cases (240 other people), in 0.30 for expressions. For every other edit it finds 0.74 or more."""
PUBLISHED = (1, 0)
"""The view that is published: the first of set B, as in `bench.data.micro_subjects`."""


@plugin("data", "micro_edits", track=("editing",))
class MicroEdits:
    """Drawn 64-pixel people with one published photo each, and one edit of it; no embedded model has seen them.

    ``count``: how many people. ``start``: the first one's place in the split; the default shares no one with the people
    of other tracks, who are counted from 0. ``photos``: in each of the sets A (clean) and C (held out).

    The attribute follows the person's place, so that six in a row have six different ones: glasses, background, hair
    colour, beard, shirt, hair style, or the next of these where none of its edits would change the photo; the value is
    drawn by the person's number. Only what the judge can read off a right answer is asked, so no expressions. The mask
    is where the world's answer differs from the photo, grown by a sixteenth of its side, so that it shows a place and
    no exact shape. A person's task depends on nothing but the person.
    """

    count: int = 16
    start: int = 1000
    photos: int = 4
    size: int = 64

    def edits(self) -> list[EditTask]:
        """The people and their edits, in the split's order."""
        self._check()
        return list(_tasks(self.count, self.start, self.photos, self.size))

    def digest(self) -> str:
        self._check()
        return world_digest("micro_edits", parameters(self))

    def _check(self) -> None:
        from bench.micro.world import SPLITS

        check_counts("micro_edits", count=self.count, photos=self.photos, size=self.size)
        known = len(SPLITS["subjects"])
        if self.start < 0 or self.start + self.count > known:
            raise BenchError(f"micro_edits: people {self.start} to {self.start + self.count - 1} asked for, but the "
                             f"split has {known} (0 to {known - 1}).")


@lru_cache(maxsize=4)
def _tasks(count: int, start: int, photos: int, size: int) -> tuple[EditTask, ...]:
    from bench.micro.world import SPLITS

    return tuple(_task(SPLITS["subjects"][place], place, photos, size) for place in range(start, start + count))


def _task(person: int, place: int, photos: int, size: int) -> EditTask:
    def drawn(letter: str, views: list[tuple[int, ...]]) -> ImageSet:
        return portraits([person] * len(views), views, [f"{letter}{view[1]}" for view in views], size)

    published = drawn("b", [PUBLISHED])
    clean, held_out = (drawn(letter, [(one, photo) for photo in range(photos)]) for letter, one in (("a", 0), ("c", 2)))
    subject = Subject(f"p{person}", clean, published, held_out)
    return EditTask(subject, edit_of(person, place, published.pixels[0]))


def edit_of(person: int, place: int, photo: Tensor) -> Edit:
    """What is asked of a person's published photo, uint8 [3, h, w], with the world's own answer."""
    import torch

    from bench.masks import grown
    from bench.micro import world

    who, view = posed(person, PUBLISHED)
    instruction = chosen(who, view, person, place)
    after = world.apply_edit(who, view, instruction)
    side = photo.shape[-1]
    answer = torch.from_numpy(world.draw(*after, side)).permute(2, 0, 1).contiguous()
    mask = grown((answer != photo).any(0), max(1, side // 16))
    target, others = world.caption(*after), captions(*after, world.EDITS[instruction].field)
    return Edit(instruction, world.caption(who, view), target, tuple(c for c in others if c != target), mask, answer)


def chosen(who: Identity, view: View, person: int, place: int) -> str:
    """An instruction for the attribute whose turn it is, or for the next one if there is none for this photo."""
    import numpy as np

    turns = (useful(who, view, FIELDS[(place + turn) % len(FIELDS)]) for turn in range(len(FIELDS)))
    return str(np.random.default_rng((3, person)).choice(next(filter(None, turns))))


def useful(who: Identity, view: View, field: str) -> list[str]:
    """Instructions for one attribute that change the photo, and whose success the judge can read."""
    from bench.micro.world import EDITS, is_change

    return [name for name, edit in EDITS.items()
            if edit.field == field and name not in UNREAD and is_change(who, view, name)]


def captions(who: Identity, view: View, field: str) -> list[str]:
    """The caption of a picture with each value that ``field`` can have."""
    from bench.micro import world

    values: dict[str, tuple[str, ...]] = {
        "glasses": world.GLASSES, "background": world.BACKGROUNDS, "hair_colour": tuple(world.HAIR_COLOURS),
        "beard": world.BEARDS, "shirt": tuple(world.SHIRTS), "hair_style": world.HAIR_STYLES,
    }
    of_view = field in ("glasses", "background", "shirt")
    return [
        world.caption(who, replace(view, **{field: value}))  # type: ignore[arg-type]
        if of_view else world.caption(replace(who, **{field: value}), view)  # type: ignore[arg-type]
        for value in values[field]
    ]
