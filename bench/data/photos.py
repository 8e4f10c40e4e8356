"""Reading photos from disk: one size, RGB, uint8; whatever is wrong is said in one error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.records import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def existing_folder(root: str, option: str) -> Path:
    """The folder named by a config option; an unset, missing or non-folder path is refused."""
    if not root:
        raise BenchError(f"{option} is not set; give the folder that holds the photos, say {option}=photos/.")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise BenchError(f"{option}={root}: {'not a folder' if folder.exists() else 'no such folder'}.")
    return folder


def photo_files(folder: Path) -> list[Path]:
    """The photos in ``folder`` in the order of their names; other files are passed over."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    stems = [p.stem for p in found]
    if twice := sorted({s for s in stems if stems.count(s) > 1}):
        raise BenchError(f"{folder}: photos must differ in more than their ending, found twice: {', '.join(twice)}.")
    return found


def read_photos(files: Sequence[Path], size: int, captions: Sequence[str] = ()) -> ImageSet:
    """Photos as uint8 [n, 3, size, size]: turned upright, the shorter side scaled down to ``size``, centre cropped."""
    import numpy as np
    import torch

    pixels = np.stack([np.asarray(square(open_photo(file), size, file)) for file in files])
    names = tuple(file.stem for file in files)
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), names, tuple(captions))


def open_photo(file: Path) -> Image:
    """One photo, decoded, upright, RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise BenchError(f"{file}: no such photo.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BenchError(f"{file}: not a readable image ({error}); remove it or replace it.") from error


def square(image: Image, size: int, file: Path) -> Image:
    """The centre square of ``image`` at ``size``; a photo with a shorter side than that is refused."""
    from PIL import Image as images

    if min(image.size) < size:
        raise BenchError(f"{file}: {image.width}x{image.height} pixels is smaller than size={size}; give a larger "
                         f"photo or a smaller size (photos are never enlarged).")
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    resized = image if (wide, high) == image.size else image.resize((wide, high), images.Resampling.LANCZOS)
    left, top = (wide - size) // 2, (high - size) // 2
    return resized.crop((left, top, left + size, top + size))


def pixel_digest(sets: Iterable[ImageSet]) -> str:
    """A hash of what is in the pictures: shapes, pixels, names and captions."""
    hashed = hashlib.sha256()
    for images in sets:
        hashed.update(repr((tuple(images.pixels.shape), images.names, images.captions)).encode())
        hashed.update(images.pixels.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
