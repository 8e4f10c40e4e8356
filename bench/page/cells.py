"""Every cell as the page unfolds it: what it is, its numbers, stages, pictures and where it came from.

What many cells share (plugins, protocols, environments, measurements) is said once and pointed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.identity import canonical_json
from bench.page.pictures import Album, entry
from bench.results import RESULT, MeasurementRecord, PluginRecord, Result

FOR_TEXT = 0.6
"""Share of their room that cells may fill without their pictures."""
OWN = ("started", "ended", "overrides")
"""Provenance that no two cells share."""


@dataclass(frozen=True)
class Kept:
    """A result with the folder that it lies in."""

    folder: Path
    result: Result


@dataclass
class Pool:
    """Values, each once; :meth:`put` says at which place."""

    values: list[Any] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def put(self, value: Any) -> int:
        key = canonical_json(value)
        if key not in self.places:
            self.places[key] = len(self.values)
            self.values.append(value)
        return self.places[key]


@dataclass
class Island:
    """The data that the page carries, as it grows."""

    plugins: Pool = field(default_factory=Pool)
    protocols: Pool = field(default_factory=Pool)
    measures: Pool = field(default_factory=Pool)
    sources: Pool = field(default_factory=Pool)

    def pools(self) -> dict[str, list[Any]]:
        return {name: pool.values for name, pool in vars(self).items()}


def make_island(kept: Sequence[Kept], room: int) -> tuple[str, Album, int]:
    """All cells as JSON for a script element, in about ``room`` bytes: a part of it at most without pictures, which
    get the rest; with the album, and how many cells are only named for want of room."""
    island, told, texts = Island(), [], room * FOR_TEXT
    for one in kept:
        short = brief(one)
        whole = {**short, **detailed(one.result, island)} if texts > 0 else short
        told.append(whole)
        texts -= size_of(whole)
    album = Album(room - size_of({**island.pools(), "cells": told}))
    add_pictures(kept, told, album)
    return script_json({**island.pools(), "cells": told}), album, sum("stages" not in one for one in told)


def add_pictures(kept: Sequence[Kept], told: Sequence[dict[str, Any]], album: Album) -> None:
    """What all pictures are called takes room first; then the first of every cell comes before the second of any."""
    entries: list[tuple[int, dict[str, Any], Path | None]] = []
    for one, cell in zip(kept, told, strict=True):
        found = [entry(name, one.folder) for name in one.result.images]
        entries += [(place, shown, path) for place, (shown, path) in enumerate(found)]
        if found:
            cell["images"] = [shown for shown, _ in found]
    album.room -= sum(size_of(shown) for _, shown, _ in entries)
    for _, shown, path in sorted(entries, key=lambda one: one[0]):
        shown.update(album.embed(path))


def brief(kept: Kept) -> dict[str, Any]:
    """What names a cell."""
    cell, result = kept.result.cell, kept.result
    return {
        "id": cell.id, "file": f"{quote(kept.folder.name)}/{RESULT}", "status": result.status, "track": cell.track,
        "model": cell.model.name, "attack": cell.attack.label, "defense": cell.defense.label,
        "purifier": cell.purifier.label if cell.purifier else "none", "seed": cell.seed,
    }


def detailed(result: Result, island: Island) -> dict[str, Any]:
    """Everything else; empty parts are left out."""
    cell, told = result.cell, result.provenance
    whole = {
        "digests": {"model": cell.model.digest, "data": cell.data_digest,
                    **({"surrogate": cell.surrogate.digest} if cell.surrogate else {})},
        "surrogate": cell.surrogate.name if cell.surrogate else "",
        "plugins": [island.plugins.put(plugin(one)) for one in (cell.defense, cell.attack, cell.purifier, cell.data)
                    if one], "protocol": island.protocols.put(cell.protocol),
        "numbers": [number(one, island) for one in result.measurements],
        "stages": [[s.stage, s.key, s.seconds, s.peak_mb, s.device, int(s.reused)] for s in result.cost],
        "source": island.sources.put({k: v for k, v in told.items() if k not in OWN}),
        **{name: told[name] for name in OWN if told.get(name)},
        "samples": result.samples.sha256 if result.samples else "",
        "rows": result.samples.rows if result.samples else 0,
        "stamp": result.stamp, "reason": result.reason, "warnings": result.warnings,
        "error": f"{result.error.type}: {result.error.message}" if result.error else "",
    }
    return {name: part for name, part in whole.items() if part or name == "stages" or isinstance(part, int)}


def plugin(one: PluginRecord) -> dict[str, Any]:
    said = {name: one.facts[name] for name in ("paper", "official_code", "knows", "summary") if one.facts.get(name)}
    return {"kind": one.kind, "name": one.name, "label": one.label, "version": one.version, "variant": one.variant,
            "parameters": one.parameters, "changed": one.changed, **said}


def number(one: MeasurementRecord, island: Island) -> list[Any]:
    """Where its measurement stands, value, interval, samples, units, and why it is missing."""
    place = island.measures.put({"name": one.name, "unit": one.unit, "better": one.higher_is_better,
                                 "hash": one.protocol_hash})
    found = [place, *map(_short, (one.value, one.low, one.high)), one.n, one.clusters]
    return [*found, one.reason] if one.reason else found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def ordered(kept: Iterable[Kept], first: Iterable[str]) -> list[Kept]:
    """Cells in the order of ``first``, then the others by id."""
    by_id = {one.result.cell.id: one for one in sorted(kept, key=lambda one: (one.result.cell.id, one.folder.name))}
    names = dict.fromkeys([*(id for id in first if id in by_id), *by_id])
    return [by_id[name] for name in names]


def script_json(value: object) -> str:
    """JSON that no text inside can end the script element of, or open a comment in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def size_of(value: object) -> int:
    """Bytes on the page."""
    return len(script_json(value).encode())
