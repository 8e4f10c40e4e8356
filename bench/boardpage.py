"""The boards of a suite as one HTML page that needs nothing but itself: ``leaderboard.html``.

Every text from results is escaped, by the template or as JSON that cannot leave its script element; a content security
policy admits the page's own script and style, by their hashes, and pictures that are inside it. Same input, same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import sheets
from bench.boards import Boards
from bench.page.cells import Kept, make_island, ordered
from bench.page.views import Track, make_tracks

if TYPE_CHECKING:
    from jinja2 import Template

LARGEST = 8_000_000
"""Bytes that a page aims to stay below: pictures, then details of cells, give way to the boards."""
FOR_NOTE = 300
"""Bytes of what is said of that."""
FOLDER = Path(__file__).parent / "page"
CELLS, SAID = "<!--cells-->", "<!--left-out-->"
"""Marks in the rendered template; no text from results can hold one, for its < is escaped."""


def html_page(boards: Boards, kept: Sequence[Kept], largest: int = LARGEST) -> str:
    """The page. ``kept``: every cell behind the boards."""
    tracks = make_tracks(boards, {one.result.cell.id: one.result for one in kept})
    met = ordered(kept, cells_of(tracks))
    page = rendered(boards, tracks, {one.result.cell.id: place for place, one in enumerate(met)})
    island, album, brief = make_island(met, largest - len(page.encode()) - FOR_NOTE)
    said = "; ".join(text for text in (album.told(), left_out(brief)) if text)
    return page.replace(CELLS, island, 1).replace(SAID, f"<p class=\"note\">{said}.</p>" if said else "", 1)


def left_out(cells: int) -> str:
    return f"details left out of {cells} cells, which link to their files" if cells else ""


def cells_of(tracks: Sequence[Track]) -> list[str]:
    """The ids of cells in the order in which a reader meets them."""
    return [id for track in tracks for question in track.questions for board in question.boards
            for grid in board.grids for row in grid.rows for id in row.cells]


def rendered(boards: Boards, tracks: Sequence[Track], places: Mapping[str, int]) -> str:
    """The page without its cells, to which lines point by their ``places``."""
    from markupsafe import Markup

    style, script = own("page.css"), own("page.js")
    known: dict[str, Any] = {
        "suite": boards.suite, "overview": sheets.overview(boards), "stamps": boards.stamps, "notes": boards.notes,
        "legend": sheets.LEGEND, "tracks": tracks, "style": Markup(style), "script": Markup(script),
        "style_hash": fingerprint(style), "script_hash": fingerprint(script), "cells": Markup(CELLS),
        "left_out": Markup(SAID), "places": lambda ids: " ".join(str(places[id]) for id in ids if id in places),
    }
    return template().render(known).lstrip()


@cache
def template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True, finalize=shown)
    return found.get_template("page.html")


def shown(value: object) -> object:
    """Text from results without control characters; what is already markup stays as it is."""
    return sheets.printable(value) if type(value) is str else value


@cache
def own(name: str) -> str:
    """A file of the page itself, without the blank around it."""
    return (FOLDER / name).read_text(encoding="utf-8").strip()


def fingerprint(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
