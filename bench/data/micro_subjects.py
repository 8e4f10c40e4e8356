"""People of the drawn world that no embedded model was trained on."""

from __future__ import annotations

from functools import lru_cache

from bench.data.portraits import check_counts, portraits, world_digest
from bench.errors import BenchError
from bench.plugin import parameters, plugin
from bench.records import ImageSet, Subject

SETS = ("a", "b", "c")


@plugin("data", "micro_subjects", track=("customization", "editing"))
class MicroSubjects:
    """Drawn 64-pixel people, each with photo sets A, B and C; no embedded model has seen them.

    ``count``: how many people. ``start``: the first one's place in the split, so that runs can share no one.
    A person's photos depend on nothing but the person, so more subjects or photos never change the others.
    """

    count: int = 8
    start: int = 0
    photos_per_set: int = 4
    size: int = 64

    def subjects(self) -> list[Subject]:
        """The people, in the split's order."""
        self._check()
        return list(_people(self.count, self.start, self.photos_per_set, self.size))

    def digest(self) -> str:
        self._check()
        return world_digest("micro_subjects", parameters(self))

    def _check(self) -> None:
        from bench.micro.world import SPLITS

        check_counts("micro_subjects", count=self.count, photos_per_set=self.photos_per_set,
                     size=self.size)
        known = len(SPLITS["subjects"])
        if self.start < 0 or self.start + self.count > known:
            raise BenchError(f"micro_subjects: people {self.start} to {self.start + self.count - 1} asked for, "
                             f"but the split has {known} (0 to {known - 1}).")


@lru_cache(maxsize=4)
def _people(count: int, start: int, photos: int, size: int) -> tuple[Subject, ...]:
    from bench.micro.world import SPLITS

    return tuple(_subject(person, photos, size) for person in SPLITS["subjects"][start:start + count])


def _subject(person: int, photos: int, size: int) -> Subject:
    def drawn(place: int) -> ImageSet:
        views = [(place, photo) for photo in range(photos)]
        return portraits([person] * photos, views, [f"{SETS[place]}{photo}" for photo in range(photos)], size)

    return Subject(f"p{person}", drawn(0), drawn(1), drawn(2))
