"""Photos from a folder, and what is asked of each, from a table beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.photos import existing_folder, open_photo, pixel_digest, read_photos, square
from bench.data.portraits import check_counts
from bench.errors import BenchError, unknown
from bench.files import inside
from bench.identity import digest
from bench.plugin import plugin
from bench.records import Edit, EditTask, ImageSet, Subject

if TYPE_CHECKING:
    from torch import Tensor

TABLES = ("edits.jsonl", "edits.csv")
NEEDED = ("file", "instruction", "source", "target")
COLUMNS = (*NEEDED, "others", "mask")
BETWEEN = "|"
"""Between captions in the CSV column ``others``."""


@dataclass(frozen=True)
class Line:
    """One line of the table, checked. ``where``: the table and the line, for errors."""

    where: str
    photo: Path
    mask: Path | None
    name: str
    instruction: str
    source: str
    target: str
    others: tuple[str, ...]


@plugin("data", "edit_folder", track=("editing",))
class EditFolder:
    """Real photos: ``root`` holds images and one table, ``edits.jsonl`` or ``edits.csv``, with a line per photo.

    ``file``: the image's path inside ``root``; ``instruction``: the order; ``source``, ``target``: captions of the
    photo and of the wanted result. Optional: ``others``, captions that ``target`` must beat besides ``source`` (a list;
    in CSV with | between), and ``mask``, an image as large as the photo, bright where an attacker who paints over a
    region paints. Photos are scaled and centre cropped to ``size``, masks with them. ``count``: how many lines, from
    the top; 0 for all. A photo may have one edit, since photos are the unit of statistics. There are no further photos
    of anybody: the sets A and C are empty.
    """

    root: str = ""
    size: int = 512
    count: int = 0
    class_noun: str = "person"

    def edits(self) -> list[EditTask]:
        """The tasks in the table's order; raises BenchError naming table and line for whatever is wrong."""
        check_counts("edit_folder", size=self.size)
        lines = self._lines()
        files = [file for line in lines for file in (line.photo, line.mask) if file]
        stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
        return list(_read(tuple(lines), self.size, self.class_noun, stamp))

    def digest(self) -> str:
        """A hash of pictures, masks and words, not of where they lie."""
        tasks = self.edits()
        masks = [[] if task.edit.mask is None else task.edit.mask.nonzero().tolist() for task in tasks]
        words = [[t.edit.instruction, t.edit.source, t.edit.target, t.edit.others, t.subject.class_noun] for t in tasks]
        return digest([pixel_digest([task.subject.published for task in tasks]), masks, words])

    def _lines(self) -> list[Line]:
        root = existing_folder(self.root, "data.root")
        table = _table(root)
        lines = list(_checked(root, table))
        if not lines:
            raise BenchError(f"{table}: no edit in it; every line needs {', '.join(NEEDED)}.")
        if self.count < 0 or self.count > len(lines):
            raise BenchError(f"edit_folder: count={self.count}, but {table} has {len(lines)} edits; give 1 to "
                             f"{len(lines)}, or 0 for all.")
        return lines[:self.count] if self.count else lines


def _table(root: Path) -> Path:
    found = [root / name for name in TABLES if (root / name).is_file()]
    if len(found) != 1:
        said = "both are there" if found else "neither is there"
        raise BenchError(f"data.root={root}: one table, {' or '.join(TABLES)}, says what is asked of the photos; "
                         f"{said}.")
    return found[0]


def _checked(root: Path, table: Path) -> Iterator[Line]:
    """Every line of the table as a record; a photo that comes twice is refused."""
    seen: dict[str, str] = {}
    for where, entry in _entries(table):
        line = _line(root, where, entry)
        if line.name in seen:
            raise BenchError(f"{where}: '{line.name}' is edited in {seen[line.name]} already; give one edit per photo "
                             "(copies of a photo under other names would count as other photos).")
        seen[line.name] = where
        yield line


def _entries(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each entry with its place, ``<table>, line <n>``."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BenchError(f"{table}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8.") from error
    read = _of_csv if table.suffix == ".csv" else _of_jsonl
    for number, entry in read(text, table):
        yield f"{table}, line {number}", entry


def _of_jsonl(text: str, table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchError(f"{table}, line {number}: not valid JSON ({error.msg}, column {error.colno}).") from error
        if not isinstance(entry, dict):
            raise BenchError(f"{table}, line {number}: not an object; write {{\"file\": ..., \"instruction\": ...}}.")
        yield number, entry


def _of_csv(text: str, table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(text.splitlines(keepends=True), restkey="", strict=True)
    try:
        for row in rows:
            if "" in row or None in row.values():
                raise BenchError(f"{table}, line {rows.line_num}: not as many fields as the first line names; quote "
                                 "texts that have commas in them.")
            others = [caption for caption in (row.pop("others", "") or "").split(BETWEEN) if caption.strip()]
            yield rows.line_num, {**{k: v for k, v in row.items() if v}, **({"others": others} if others else {})}
    except csv.Error as error:
        raise BenchError(f"{table}, line {rows.reader.line_num}: not valid CSV ({error}).") from error


def _line(root: Path, where: str, entry: Mapping[str, Any]) -> Line:
    for column in entry:
        if column not in COLUMNS:
            raise unknown("column", str(column), where, COLUMNS)
    words = {column: _text(entry, column, where) for column in NEEDED}
    photo = _file(root, words["file"], where)
    mask = _file(root, _text(entry, "mask", where), where) if entry.get("mask") else None
    name = photo.relative_to(root.resolve()).with_suffix("").as_posix()
    others = entry.get("others") or []
    if not isinstance(others, list) or not all(isinstance(one, str) and one.strip() for one in others):
        raise BenchError(f"{where}: others={others!r}; give a list of captions.")
    captions = [words["source"], *(one.strip() for one in others)]
    if words["target"] in captions:
        raise BenchError(f"{where}: target '{words['target']}' is among source and others; they are what it must beat.")
    return Line(where, photo, mask, name, words["instruction"], words["source"], words["target"],
                tuple(dict.fromkeys(captions)))


def _text(entry: Mapping[str, Any], column: str, where: str) -> str:
    value = entry.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BenchError(f"{where}: {column}={value!r}; give a text." if column in entry else
                         f"{where}: no {column}; every line needs {', '.join(NEEDED)}.")
    return value.strip()


def _file(root: Path, path: str, where: str) -> Path:
    """A file of the folder; a path that leads out of it, or to no file, is refused."""
    try:
        file = inside(root, path).resolve()
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from error
    if not file.is_file():
        raise BenchError(f"{where}: no such file, {file}.")
    return file


@lru_cache(maxsize=4)
def _read(
    lines: tuple[Line, ...], size: int, noun: str, stamp: tuple[tuple[int, int], ...],
) -> tuple[EditTask, ...]:
    """``stamp``: times and sizes of the files, so that a changed one is read again."""
    return tuple(_task(line, size, noun) for line in lines)


def _task(line: Line, size: int, noun: str) -> EditTask:
    import torch

    try:
        photo = replace(read_photos([line.photo], size, [line.source]), names=(line.name,))
        mask = _mask(line.mask, line.photo, size) if line.mask else None
    except BenchError as error:
        raise BenchError(f"{line.where}: {error}") from error
    nobody = ImageSet(torch.zeros(0, 3, size, size, dtype=torch.uint8), ())
    subject = Subject(line.name, nobody, photo, nobody, noun)
    return EditTask(subject, Edit(line.instruction, line.source, line.target, line.others, mask))


def _mask(file: Path, of: Path, size: int) -> Tensor:
    """Where the mask is brighter than half, bool [size, size], scaled and cropped as the photo ``of``."""
    import numpy as np
    import torch

    picture, photo = open_photo(file), open_photo(of)
    if picture.size != photo.size:
        raise BenchError(f"{file}: {picture.width}x{picture.height} pixels, but the photo has "
                         f"{photo.width}x{photo.height}; a mask is as large as its photo.")
    bright = np.asarray(square(picture, size, file).convert("L")) >= 128
    if not bright.any():
        raise BenchError(f"{file}: nothing is bright in the square that is kept; paint white what is to change.")
    return torch.from_numpy(bright)
