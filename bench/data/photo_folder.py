"""People from a folder of folders of photos."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from bench.data.photos import existing_folder, photo_files, pixel_digest, read_photos
from bench.data.portraits import check_counts
from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import Subject

SET_FOLDERS = ("set_A", "set_B", "set_C")


@plugin("data", "photo_folder", track=("customization", "editing"))
class PhotoFolder:
    """Real people: ``root`` holds one folder per person, each with photos for the sets A, B and C.

    A person's folder holds either ``set_A``, ``set_B`` and ``set_C`` with at least ``photos_per_set`` photos each, or
    at least three times as many photos, which are dealt to A, B and C in the order of their names. Photos are scaled
    and centre cropped to ``size``. ``count``: how many people, in the order of their names; 0 for all. ``source``:
    what the photos are and where they come from, said when ``root`` is not set.
    """

    root: str = ""
    size: int = 512
    photos_per_set: int = 4
    count: int = 0
    class_noun: str = "person"
    source: str = ""

    def subjects(self) -> list[Subject]:
        """The people; raises BenchError for a folder or photo that is missing, unreadable, too small or too few."""
        check_counts("photo_folder", size=self.size, photos_per_set=self.photos_per_set)
        folders = self._folders()
        files = tuple(tuple(map(tuple, _dealt(folder, self.photos_per_set))) for folder in folders)
        stamp = tuple((f.stat().st_mtime_ns, f.stat().st_size) for sets in files for one in sets for f in one)
        return list(_read(tuple(folders), files, self.size, self.class_noun, stamp))

    def digest(self) -> str:
        """A hash of the pictures, not of where they lie."""
        sets = [one for s in self.subjects() for one in (s.clean, s.published, s.held_out)]
        return f"{pixel_digest(sets)}-{self.class_noun}"

    def _folders(self) -> list[Path]:
        if self.source and not self.root:
            raise BenchError(self._wanted())
        root = existing_folder(self.root, "data.root")
        found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not found:
            loose = " Photos that lie directly in it belong in one folder per person." if photo_files(root) else ""
            raise BenchError(f"data.root={self.root}: no folder of a person in it.{loose}")
        if self.count < 0 or self.count > len(found):
            raise BenchError(f"photo_folder: count={self.count}, but {self.root} has {len(found)} people; give 1 to "
                             f"{len(found)}, or 0 for all.")
        return found[:self.count] if self.count else found

    def _wanted(self) -> str:
        """What to give where nothing was given."""
        people, each = self.count or "any number of", self.photos_per_set
        return (f"data.root is not set, and no photo of a person is shipped or downloaded. Give data.root=<folder> "
                f"with {people} folders in it, one per person, each with {', '.join(SET_FOLDERS)} of {each} photos, or "
                f"with {3 * each} photos that are dealt to the sets in the order of their names; no photo's side may "
                f"be shorter than {self.size} pixels. Wanted: {self.source}.")


def _dealt(folder: Path, each: int) -> list[list[Path]]:
    """The files of sets A, B and C."""
    if all((folder / name).is_dir() for name in SET_FOLDERS):
        sets = [photo_files(folder / name) for name in SET_FOLDERS]
        for name, files in zip(SET_FOLDERS, sets, strict=True):
            _enough(folder / name, len(files), each, f"{each}")
        return [files[:each] for files in sets]
    files = photo_files(folder)
    _enough(folder, len(files), 3 * each, f"{3 * each} ({each} for each of the sets A, B and C)")
    return [files[i * each:(i + 1) * each] for i in range(3)]


def _enough(folder: Path, found: int, needed: int, said: str) -> None:
    if found < needed:
        raise BenchError(f"{folder}: {found} photos, but {said} are needed; add photos or lower data.photos_per_set.")


@lru_cache(maxsize=4)
def _read(
    folders: tuple[Path, ...], files: tuple[tuple[tuple[Path, ...], ...], ...], size: int, noun: str,
    stamp: tuple[tuple[int, int], ...],
) -> tuple[Subject, ...]:
    """``stamp``: times and sizes of the files, so that a changed photo is read again."""
    def subject(folder: Path, sets: tuple[tuple[Path, ...], ...]) -> Subject:
        a, b, c = (read_photos(one, size) for one in sets)
        return Subject(folder.name, a, b, c, noun)

    return tuple(subject(folder, sets) for folder, sets in zip(folders, files, strict=True))

