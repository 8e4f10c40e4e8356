"""Reads the files that W&B writes offline. Not collected by pytest.

A file is a short header and then a log in LevelDB's format: blocks of 32 KiB, in them pieces with a checksum, a length
and a type (whole, first, middle, last); pieces together make one protocol buffer.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER, PIECE = 32768, 7, 7
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass
class Written:
    """What one offline run holds. ``artifacts``: by type; W&B makes one of every table, too."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[Any]] = field(default_factory=dict)
    finished: bool = False


def read_run(file: Path, patience: float = 20.0) -> Written:
    """The run in a ``.wandb`` file, which W&B's own process finishes a moment after the run ended."""
    deadline = time.monotonic() + patience
    while not (found := _parse(file.read_bytes())).finished and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def table(file: Path, found: Written, key: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table that a run logged."""
    told = json.loads((file.parent / "files" / found.history[key]["path"]).read_text())
    return told["columns"], told["data"]


def _parse(data: bytes) -> Written:
    from wandb.proto.wandb_internal_pb2 import Record

    found = Written()
    for raw in _records(data):
        record = Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "history":
            found.history |= _items(record.history.item)
        elif kind == "artifact":
            found.artifacts.setdefault(record.artifact.type, []).append(record.artifact)
        found.finished |= kind == "exit"
    return found


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *above, last = item.nested_key or [item.key]
        place = found
        for key in above:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    parts, place = b"", HEADER
    while place + PIECE <= len(data):
        if BLOCK - place % BLOCK < PIECE:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place:place + PIECE])
        piece = data[place + PIECE:place + PIECE + length]
        place += PIECE + length
        if kind not in (WHOLE, FIRST, 3, LAST) or len(piece) < length:
            return
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            yield parts
