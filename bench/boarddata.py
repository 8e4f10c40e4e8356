"""Boards as data: comma-separated, and as JSON. Same input, same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from json.encoder import encode_basestring
from typing import Any

from bench.boards import Boards, Delta, Line, Table
from bench.detection import DetectionBoard, Detector
from bench.entries import Column
from bench.stats import Estimate
from bench.worst_case import Matrix

BETTER = {True: "higher", False: "lower", None: ""}
FORMULA = ("=", "+", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula."""
SPECIAL = re.compile('[,"\n\r]')
HEAD = (
    "board", "part", "track", "model", "data", "attack", "purifier", "defense", "surrogate", "control", "knows", "eps",
    "status", "rank", "tied", "p_best", "rank_mean", "rank_low", "rank_high",
    "reason", "seeds", "measurement", "unit", "better", "value", "low", "high", "n", "units",
    "missing_because", "seconds", "protocol_hash",
)
DELTA_HEAD = ("control_name", "difference", "difference_low", "difference_high", "difference_units", "p", "mark",
              "p_holm", "detectable")


# Comma-separated


def comma_separated(boards: Boards) -> str:
    """One row per board, defense, measurement and control; a row without control for lines that have none. Of a matrix
    a row per defense and column, of an option a row per pair of lines."""
    rows = [",".join([*HEAD, *DELTA_HEAD])]
    for table in boards.tables:
        for line in table.lines:
            rows += csv_rows(table, line)
        rows += csv_matrix(table, table.matrix) if table.matrix else ()
        rows += csv_switches(table)
    for board in boards.detections:
        rows += csv_detection(board)
    return "\n".join(rows) + "\n"


def csv_rows(table: Table, line: Line) -> Iterator[str]:
    """A row per measurement and control."""
    where = _joined([
        table.id, "board", table.track, table.model, table.data, table.attack, table.purifier, line.label,
        line.surrogate, int(line.control), " ".join(line.knows), line.eps, line.status, line.rank, int(line.tied),
        *placing_data(line), line.reason, " ".join(map(str, line.seeds))])
    if not table.columns:
        yield where + "," * (len(HEAD) - HEAD.index("measurement") + len(DELTA_HEAD))
    for column in table.columns:
        what = csv_score(column, line)
        for more in csv_deltas(line.deltas[column.name]):
            yield f"{where},{what},{more}"


def csv_score(column: Column, line: Line) -> str:
    score = line.scores[column.name]
    return _joined([column.name, column.unit, BETTER[column.higher_is_better], score.value, score.low, score.high,
                    score.n, score.units, score.reason, line.seconds, column.protocol_hash])


def csv_deltas(deltas: Sequence[Delta]) -> Iterator[str]:
    """What the differences to controls add to a row; one row without them where there are none."""
    if not deltas:
        yield _joined([None] * len(DELTA_HEAD))
    for delta in deltas:
        d = delta.difference
        yield _joined([delta.control, d.value, d.low, d.high, d.units, d.p, delta.mark, delta.p_holm, delta.detectable])


def placing_data(line: Line) -> list[float | None]:
    found = line.placing
    return [found.first, found.mean, found.low, found.high] if found else [None] * 4


def csv_matrix(table: Table, matrix: Matrix) -> Iterator[str]:
    for row in matrix.rows:
        for column, score in zip(matrix.columns, row.cells, strict=True):
            yield _row({**_place(table), "part": "matrix", "defense": row.label, matrix.over: column,
                        "control": int(row.control), "measurement": matrix.measurement, "unit": matrix.unit,
                        "better": BETTER[matrix.higher_is_better], **_score(score)})


def csv_switches(table: Table) -> Iterator[str]:
    """A row per option that two lines differ in; ``control_name`` is the line without it."""
    for switch in table.switches:
        column, d = table.columns[0], switch.difference
        yield _row({**_place(table), "part": f"option {switch.option}", "defense": switch.on,
                    "measurement": column.name, "unit": column.unit, "control_name": switch.off,
                    "difference": d.value, "difference_low": d.low, "difference_high": d.high,
                    "difference_units": d.units, "p": d.p, "mark": switch.mark})


def csv_detection(board: DetectionBoard) -> Iterator[str]:
    """A row per defense and measurement."""
    for d in board.detectors:
        for name, better, score in detection_measures(d):
            yield _row({"board": board.id, "part": "detection", "track": board.track, "model": board.model,
                        "data": board.data, "defense": d.label, "control": int(d.control), "knows": " ".join(d.knows),
                        "measurement": name, "unit": "share", "better": better, **_score(score),
                        "seconds": d.seconds})


def detection_measures(d: Detector) -> Iterator[tuple[str, str, Estimate]]:
    """Name, better direction and value of everything that a line says."""
    yield from (("auroc", "higher", d.auroc), ("tpr", "higher", d.tpr), ("fpr", "lower", d.fpr),
                ("accuracy", "higher", d.accuracy), ("own_tpr", "higher", d.own_tpr), ("own_fpr", "lower", d.own_fpr))
    yield from ((f"tpr {name}", "higher", score) for name, score in d.by_attack.items())


def _place(table: Table) -> dict[str, object]:
    return {"board": table.id, "track": table.track, "model": table.model, "data": table.data,
            "attack": table.attack, "purifier": table.purifier}


def _score(score: Estimate) -> dict[str, object]:
    return {"value": score.value, "low": score.low, "high": score.high, "n": score.n, "units": score.units,
            "missing_because": score.reason}


def _row(known: Mapping[str, object]) -> str:
    return _joined(known.get(name) for name in (*HEAD, *DELTA_HEAD))


def _joined(values: Iterable[object]) -> str:
    return ",".join([_cell(value) for value in values])


def _cell(value: object) -> str:
    """Of the CSV; text that a spreadsheet would run as a formula is quoted."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return _number(value) if isinstance(value, float) else str(value)
    text = f"'{value}" if value[:1] in FORMULA else value
    return '"' + text.replace('"', '""') + '"' if SPECIAL.search(text) else text


# JSON


def as_json(boards: Boards) -> str:
    """Everything that the boards say, a line per board."""
    parts = {name: getattr(boards, name) for name in _names(Boards)}
    if not boards.detections:
        del parts["detections"]
    tables = ",\n".join(map(json_text, parts.pop("tables")))
    return json_text(parts)[:-1] + f',"tables":[\n{tables}\n]}}\n'


def json_text(value: Any) -> str:
    """Compact JSON of records, with floats to 6 digits: the last bits of a resampled mean depend on the machine's
    linear algebra. Raises ValueError for a number that is not finite."""
    if write := PLAIN.get(type(value)):
        return write(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join([json_text(one) for one in value])}]"
    if isinstance(value, dict):
        items = [f"{encode_basestring(key)}:{json_text(one)}" for key, one in value.items()]
        return f"{{{','.join(items)}}}"
    parts = [f"{key}{json_text(getattr(value, name))}" for name, key in _names(type(value)).items()]
    return f"{{{','.join(parts)}}}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"boards: {value} is not a finite number")
    return repr(float(f"{value:.6g}"))


PLAIN: dict[type, Callable[[Any], str]] = {
    str: encode_basestring, int: str, float: _number, bool: lambda value: "true" if value else "false",
    type(None): lambda value: "null",
}
"""How values without parts are written."""


NAMES: dict[type, dict[str, str]] = {}
"""The fields of each kind of record, as keys of JSON."""


def _names(kind: type) -> dict[str, str]:
    if kind not in NAMES:
        NAMES[kind] = {field.name: f"{encode_basestring(field.name)}:" for field in fields(kind)}
    return NAMES[kind]
