"""Every number of a cell against the rows that it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.findings import Report
from bench.records import Measurement, Row
from bench.results import RESULT, SAMPLES, MeasurementRecord, Result, SampleRow, parse_rows

DIGITS = 1e-5
"""Rows keep six digits: what is computed from them agrees with what was computed before to this share of the largest
of them."""


def check_rows(report: Report, result: Result, path: Path) -> dict[str, list[SampleRow]]:
    """The rows by measurement, read even if they were changed, so that what follows from that is named, too."""
    file, cell, known = path / SAMPLES, result.cell.id, result.samples
    if known is None:
        report.unchecked["cells without a file of samples"] += 1
        return {}
    try:
        data = file.read_bytes()
        rows = parse_rows(data, known.layout, file)
    except (OSError, BenchError) as error:
        report.wrong(file, cell, f"cannot be read: {str(error).replace(f'{report.folder}/', '')}")
        return {}
    report.compare("hashes of samples", file, cell, "was changed after its result was written", known.sha256[:16],
                   hashlib.sha256(data).hexdigest()[:16])
    report.compare("counts of rows", file, cell, "holds another number of rows than its result says", known.rows,
                   len(rows))
    found: dict[str, list[SampleRow]] = {}
    for row in rows:
        found.setdefault(row.metric, []).append(row)
    for name in sorted(found.keys() - {m.name for m in result.measurements}):
        report.wrong(file, cell, f"holds rows of {name}, which its result does not measure")
    return found


def check_value(
    report: Report, result: Result, measured: MeasurementRecord, rows: Sequence[SampleRow], path: Path,
) -> None:
    """Value, count, units and interval of one measurement against those that its rows give."""
    candidates = aggregates(measured, rows)
    if not candidates:
        left = "values that rest on no rows (only running the cell again says whether they are true)"
        report.unchecked[left] += measured.value is not None
        return
    report.checked["values computed from rows"] += 1
    scale = max((abs(row.value) for row in rows if row.value is not None), default=0.0)
    verdicts = [list(differences(measured, again, scale)) for again in candidates]
    for what, expected, found in min(verdicts, key=len):
        report.wrong(path / RESULT, result.cell.id, f"{measured.name}: {what} is not what its rows give", expected,
                     found)


def aggregates(measured: MeasurementRecord, rows: Sequence[SampleRow]) -> list[Measurement]:
    """What the rows give under the rule that the protocol names, one or several that it may mean; none where it names
    none that is known."""
    from bench.measuring import mean_of, share_of

    plain = [Row(row.sample, row.cluster, row.value, row.reason) for row in rows]
    name, unit, better = measured.name, measured.unit, measured.higher_is_better
    values = [row.value for row in rows if row.value is not None]
    if measured.protocol.get("measured") == "maximum" and values:
        return [Measurement(name, max(values), len(values), unit, better, rows=tuple(plain))]
    over = measured.protocol.get("interval")
    if over == "over clusters":
        return [mean_of(name, plain, unit, better, {})]
    if over == "over samples":
        shares = [share_of(name, plain, better, {})] if set(values) <= {0.0, 1.0} else []
        return [*shares, mean_of(name, plain, unit, better, {}, over_samples=True)]
    return []


def differences(
    measured: MeasurementRecord, again: Measurement, scale: float,
) -> Iterator[tuple[str, object, object]]:
    """What of a measurement is not as its rows give it: name, what they give, what is recorded."""
    clusters = len({row.cluster for row in again.rows if row.value is not None})
    for what, right, said in (("n", again.n, measured.n), ("the number of units", clusters, measured.clusters)):
        if right != said:
            yield what, right, said
    for what in ("value", "low", "high"):
        right, said = getattr(again, what), getattr(measured, what)
        if (right is None) != (said is None) or abs((right or 0.0) - (said or 0.0)) > DIGITS * scale:
            yield {"value": "the value"}.get(what, f"the interval's {what} end"), _short(right), _short(said)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
