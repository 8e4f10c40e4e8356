"""A cell's pictures inside the page: made small, and only while the page stays within its size."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.errors import BenchError
from bench.files import inside
from bench.results import IMAGES

SIDE, QUALITY = 768, 80
"""Longest side of an embedded picture in pixels, and how hard WebP squeezes it."""
FRAME = 60
"""Bytes around an embedded picture: its name as a field, width and height, or why it is left out."""
LARGEST_FILE, LARGEST_AREA = 32_000_000, 40_000_000
"""Bytes of a file and pixels of a picture beyond which it is not opened."""
PHOTOS = ("original", "protected", "perturbation ×10", "generated")
EDITS = ("original", "protected", "perturbation ×10", "edit of original", "edit of protected")
MODELS = ("clean model", "with backdoor", "after defense")
STRIPS = {
    "strip": (PHOTOS, ""), "original": (EDITS, ""),
    "clean": (MODELS, "left half: clean inputs; right half: triggered"), "target": ((), "the backdoor's target"),
}
"""By the first word of a picture's name: what its rows show, top to bottom, and what else there is to say."""


@dataclass
class Album:
    """``room``: bytes that are left. ``left_out``: pictures on disk for which there was none; ``lost``: those that
    results name and that are not there, or are no pictures."""

    room: int
    left_out: int = 0
    embedded: int = 0
    lost: int = 0

    def embed(self, path: Path | None) -> dict[str, Any]:
        """The picture as a data URI, or why there is none. After the first without room, no other is tried."""
        if path is None:
            self.lost += 1
            return {"why": "not kept in this folder"}
        found = small(path) if self.room > 0 else ("", 0, 0)
        if found is None:
            self.lost += 1
            return {"why": "no picture that can be shown"}
        source, width, height = found
        self.room -= len(source) + FRAME
        if self.room <= 0:
            self.left_out += 1
            return {"why": "left out of the page"}
        self.embedded += 1
        return {"src": source, "width": width, "height": height}

    def told(self) -> str:
        """What a reader must know of the pictures that are not on the page."""
        said = [f"pictures left out: {self.left_out} (the page would grow too large; each cell links to its files)"
                ] if self.left_out else []
        said += [f"pictures not in this folder: {self.lost}"] if self.lost else []
        return "; ".join(said)


def entry(name: str, folder: Path) -> tuple[dict[str, Any], Path | None]:
    """What the page says of a picture that a result names, and its file."""
    rows, said = STRIPS.get(name.removesuffix(".png").partition("-")[0], ((), ""))
    shown: dict[str, Any] = {"name": name, "rows": rows, "said": said}
    path = stored(name, folder)
    if path:
        shown["link"] = f"{quote(folder.name)}/{IMAGES}/{quote(path.name)}"
    return shown, path


def stored(name: str, folder: Path) -> Path | None:
    """The file of a picture that a result names, None where there is none below its own folder."""
    try:
        path = inside(folder / IMAGES, name)
    except BenchError:
        return None
    return path if path.is_file() and path.resolve().is_relative_to(folder.resolve()) else None


def small(path: Path) -> tuple[str, int, int] | None:
    """A data URI with width and height: the file itself, or a WebP where that is smaller. None if it is no picture."""
    from PIL import Image

    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else b""
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            if opened.width * opened.height > LARGEST_AREA:
                return None
            image = opened.convert("RGB")
            kind = opened.format or "PNG"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    size = image.size
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, method=4)
    if image.size == size and len(data) <= out.tell():
        return _uri(data, kind), *image.size
    return _uri(out.getvalue(), "WEBP"), *image.size


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"

