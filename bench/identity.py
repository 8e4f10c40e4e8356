"""Names made of content: canonical JSON and digests, the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bench.errors import BenchError

ADDED = "added"
"""Metadata of a dataclass field that came later than the first stored identities."""


def added(default: Any) -> Any:
    """A dataclass field that was added later, and whose ``default`` means "as before": it is left out of identities
    while it has that value, so that what was stored before it existed keeps its name."""
    return field(default=default, metadata={ADDED: True})


def canonical_json(value: object) -> str:
    """One text per value: sorted keys, no blanks, floats as their shortest exact decimal, ASCII only.

    Dataclasses become mappings, enums their value, paths POSIX text, tuples lists and sets sorted lists. A field that
    was declared with ``added`` is left out while it has its default.
    Raises BenchError for a number that is not finite, a key that is not text, and any other type.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: object, where: str = "value") -> Any:
    """``value`` as plain JSON types; ``where`` names the place in an error."""
    if isinstance(value, Enum):
        return plain(value.value, where)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return _finite(value, where)
    if isinstance(value, Path):
        return value.as_posix()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)
                if not (f.metadata.get(ADDED) and getattr(value, f.name) == f.default)}
    if isinstance(value, Mapping):
        return {_key(k, where): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v, where) for v in value), key=canonical_json)
    raise BenchError(f"identity: {where} is a {type(value).__name__}; give text, numbers, true/false, lists or "
                     "mappings of these.")


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise BenchError(f"identity: {where}={value} is not a finite number.")
    return float(value)


def _key(key: object, where: str) -> str:
    if isinstance(key, str) and not isinstance(key, Enum):
        return key
    raise BenchError(f"identity: {where} has the key {key!r}; keys must be text.")


def digest(value: object, length: int = 16) -> str:
    """The first ``length`` hexadecimal digits of the SHA-256 of ``canonical_json(value)``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def digest_plain(value: object, length: int = 16) -> str:
    """The same, of what is plain JSON already, as all parts of a record are: four times as fast."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the relative names and bytes of all files below ``folder``; the folder's own name is no part."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    return digest(listing, length=64)
