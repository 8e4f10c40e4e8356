"""Rows read as columns are the rows that were written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.records import Measurement, Row
from bench.results import (
    CellRecord,
    ModelRecord,
    PluginRecord,
    Result,
    SampleFile,
    SampleRow,
    read_result,
    rows_of,
    sample_rows,
    write_result,
)
from bench.runs import read_run, samples_of
from bench.samples import of_rows, read_samples

ROWS = (Row("0", "anna", 1.0), Row("1", "anna", None, "no face"), Row("0", "ben", 0.25), Row("1", "ben", 0.5))


def cell(track: str = "customization", seed: int = 0) -> CellRecord:
    def plugin(kind: str) -> PluginRecord:
        return PluginRecord(kind=kind, name=kind, label=kind, version=1)

    return CellRecord(id=f"{track}{seed}", track=track, model=ModelRecord(name="m"), data=plugin("data"),
                      attack=plugin("attack"), defense=plugin("defense"), seed=seed)


def write(folder: Path, *measured: Measurement, **where: Any) -> Result:
    return write_result(Result(suite="s", cell=cell(**where), status="ok"), sample_rows(measured), {}, folder)


def three(folder: Path, **where: Any) -> Result:
    halves = tuple(Row(row.sample, row.cluster, 0.5) for row in ROWS)
    return write(folder, Measurement("ism", 0.58, 4, "", False, rows=ROWS),
                 Measurement("clip", 0.375, 2, "", None, rows=ROWS[2:]),
                 Measurement("ssim", 0.5, 4, "", True, rows=halves), **where)


def test_columns_hold_what_rows_hold(tmp_path: Path) -> None:
    result = three(tmp_path)
    found, rows = read_samples(result, tmp_path), rows_of(result, tmp_path)
    assert set(found) == {"ism", "clip", "ssim"}
    for metric, samples in found.items():
        assert list(samples) == [row for row in rows if row.metric == metric]
        assert list(of_rows(metric, samples)) == list(samples)
    ism = found["ism"]
    assert (len(ism), ism.known, ism.missing) == (4, (1.0, 0.25, 0.5), {"1"})
    assert ism.mean == pytest.approx(1.75 / 3)
    assert ism.known_places.clusters == ("anna", "ben", "ben")


def test_the_same_samples_are_one_object_across_results(tmp_path: Path) -> None:
    one, other = (read_samples(three(tmp_path / str(i), seed=i), tmp_path / str(i)) for i in (0, 1))
    assert one["ism"].places is one["ssim"].places is other["ism"].places
    assert one["clip"].places is not one["ism"].places
    assert one["ism"].known_places is other["ism"].known_places


def test_the_first_layout_is_read_too(tmp_path: Path) -> None:
    result = three(tmp_path)
    rows = rows_of(result, tmp_path)
    lines = "".join(json.dumps({"metric": r.metric, "sample": r.sample, "cluster": r.cluster, "value": r.value,
                                "reason": r.reason}) + "\n" for r in rows)
    (tmp_path / "samples.jsonl").write_text(lines)
    old = result.model_copy(update={"samples": SampleFile(rows=len(rows), layout="rows", sha256=hashlib.sha256(
        lines.encode()).hexdigest())})
    assert {metric: list(of) for metric, of in read_samples(old, tmp_path).items()} == {
        metric: [row for row in rows if row.metric == metric] for metric in ("ism", "clip", "ssim")}


@pytest.mark.parametrize("line", [
    '{"cluster": "a", "samples": ["0", "1"], "values": {"ism": [0.5]}}',
    '{"cluster": "a", "samples": ["0"], "values": {"ism": [null]}}',
    '{"cluster": "a", "samples": ["0"], "values": {"ism": ["much"]}}',
])
def test_what_is_not_valid_is_refused_by_name(tmp_path: Path, line: str) -> None:
    result = three(tmp_path)
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    forged = result.model_copy(update={"samples": SampleFile(rows=1, layout="blocks", sha256=hashlib.sha256(
        f"{line}\n".encode()).hexdigest())})
    with pytest.raises(BenchError, match=r"samples\.jsonl holds a row that is not valid"):
        read_samples(forged, tmp_path)
    with pytest.raises(BenchError, match="hash mismatch"):
        read_samples(result, tmp_path)


def test_units_are_subjects_over_all_seeds_but_implants_by_seed(tmp_path: Path) -> None:
    def units(track: str) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        folders = [tmp_path / f"{track}{seed}" for seed in (0, 1)]
        for seed, folder in enumerate(folders):
            three(folder, track=track, seed=seed)
        found = samples_of([read_run(folder) for folder in folders], "ism")
        return found.layout.units, found.layout.seeds, len(found)

    assert units("customization") == (("anna", "ben"), ("0", "1"), 6)
    assert units("backdoor") == (("anna/s0", "anna/s1", "ben/s0", "ben/s1"), ("",), 6)


def test_a_result_without_rows_has_no_columns(tmp_path: Path) -> None:
    result = write(tmp_path)
    assert read_samples(result, tmp_path) == {}
    assert read_samples(read_result(tmp_path).model_copy(update={"samples": None}), tmp_path) == {}
    assert list(of_rows("x", [])) == []
    assert SampleRow("x", "0", "a", 1.0).alone().rows() == [SampleRow("x", "0", "a", 1.0)]
