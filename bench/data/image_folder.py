"""Plain images from a folder, for unconditional and captioned training."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from bench.data.photos import existing_folder, photo_files, pixel_digest, read_photos
from bench.data.portraits import check_counts
from bench.errors import BenchError
from bench.plugin import plugin
from bench.records import ImageSet


@plugin("data", "image_folder", track=("backdoor",))
class ImageFolder:
    """Real images: training images from ``root``, images to score against from ``held_out_root``.

    Without ``held_out_root`` the last ``held_out`` images of ``root`` are kept for scoring and never trained on.
    Images are scaled and centre cropped to ``size``. ``train``: how many to train on, in the order of their names; 0
    for all. Captions are read from ``<image>.txt`` where every training image has one.
    """

    root: str = ""
    held_out_root: str = ""
    size: int = 32
    train: int = 0
    held_out: int = 512

    def images(self) -> ImageSet:
        """Training images, uint8 [n, 3, size, size]."""
        return _read(tuple(self._files()[0]), self.size, _stamp(self._files()[0]))

    def reference(self) -> ImageSet:
        """Real images for scoring, uint8 [held_out, 3, size, size]."""
        return _read(tuple(self._files()[1]), self.size, _stamp(self._files()[1]))

    def digest(self) -> str:
        """A hash of the pictures and captions, not of where they lie."""
        return pixel_digest([self.images(), self.reference()])

    def _files(self) -> tuple[list[Path], list[Path]]:
        check_counts("image_folder", size=self.size, held_out=self.held_out)
        own = photo_files(existing_folder(self.root, "data.root"))
        if self.held_out_root:
            kept = photo_files(existing_folder(self.held_out_root, "data.held_out_root"))[:self.held_out]
            where = f"data.held_out_root={self.held_out_root}"
        else:
            own, kept, where = own[:-self.held_out], own[-self.held_out:], f"data.root={self.root}"
        if len(kept) < self.held_out:
            raise BenchError(f"{where}: {len(kept)} images, but {self.held_out} are kept for scoring; add images or "
                             f"lower data.held_out.")
        if len(own) < max(1, self.train):
            raise BenchError(f"data.root={self.root}: {len(own)} images left to train on, but {max(1, self.train)} are "
                             f"needed; add images, or lower data.train or data.held_out.")
        return (own[:self.train] if self.train else own), kept


def _stamp(files: list[Path]) -> tuple[tuple[int, int], ...]:
    """Times and sizes of the files and their captions, so that a changed one is read again."""
    both = [*files, *(note for file in files if (note := file.with_suffix(".txt")).is_file())]
    return tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in both)


@lru_cache(maxsize=4)
def _read(files: tuple[Path, ...], size: int, stamp: tuple[tuple[int, int], ...]) -> ImageSet:
    notes = [file.with_suffix(".txt") for file in files]
    captions = [note.read_text().strip() for note in notes] if all(note.is_file() for note in notes) else []
    return read_photos(files, size, captions)
