"""Results are whole, valid and say what was wrong with a file that is not."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.identity import file_digest
from bench.plugin import REGISTRY, plugin
from bench.records import Measurement, Row
from bench.results import (
    CellRecord,
    ErrorRecord,
    ModelRecord,
    PluginRecord,
    Result,
    SampleRow,
    add_warnings,
    measurement_record,
    merged,
    plugin_record,
    protocol_hash,
    read_result,
    read_rows,
    read_suite,
    sample_rows,
    seal_of,
    write_result,
)


def record(kind: str, name: str, **fields: Any) -> PluginRecord:
    return PluginRecord(kind=kind, name=name, label=name, version=1, **fields)


def cell(**fields: Any) -> CellRecord:
    point = {"id": "abc", "track": "customization", "model": ModelRecord(name="m", digest="d"),
             "data": record("data", "faces"), "attack": record("attack", "train"),
             "defense": record("defense", "none"), "seed": 0}
    return CellRecord(**{**point, **fields})


ISM = record("metric", "ism")
MEASURED = Measurement("ism", 0.5, 3, "", False, 0.4, 0.6,
                       rows=(Row("a", "s1", 0.4), Row("b", "s2", 0.6), Row("c", "s2", None, "no face")))


def result(**fields: Any) -> Result:
    base: dict[str, Any] = {"suite": "s", "cell": cell(), "status": "ok",
                            "measurements": [measurement_record(MEASURED, ISM, cell())]}
    return Result(**{**base, **fields})


def write(folder: Path, **fields: Any) -> Result:
    return write_result(result(**fields), sample_rows([MEASURED]), {}, folder)


def test_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "abc", stamp="pipeline check, not a result")
    assert read_result(tmp_path / "abc") == written
    assert read_rows(tmp_path / "abc") == [
        SampleRow("ism", "a", "s1", 0.4), SampleRow("ism", "b", "s2", 0.6),
        SampleRow("ism", "c", "s2", None, "no face")]
    assert written.measurements[0].clusters == 2
    assert sorted(p.name for p in (tmp_path / "abc").iterdir()) == ["result.json", "samples.jsonl"]


def test_rows_of_one_cluster_share_a_line_and_keep_their_reasons(tmp_path: Path) -> None:
    rows = [SampleRow(m, f"s{c}/{i}", f"s{c}", None if (m, i) == ("ism", 1) else 1 / 3, "no face" * (i == 1))
            for m in ("ism", "fdfr") for c in (1, 2) for i in range(3)]
    rows += [SampleRow("psnr", "s1/b", "s1", 24.123456789)]
    write_result(result(), rows, {}, tmp_path)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3
    found = read_rows(tmp_path)
    assert {(r.metric, r.sample, r.cluster, r.reason) for r in found} == {
        (r.metric, r.sample, r.cluster, r.reason) for r in rows}
    by_name = {(r.metric, r.sample): r.value for r in found}
    assert by_name["psnr", "s1/b"] == 24.1235 and by_name["fdfr", "s2/2"] == 0.333333
    assert by_name["ism", "s1/1"] is None


def test_rows_as_they_were_written_at_first_can_be_read(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path)
    text = '{"metric": "ism", "sample": "a", "cluster": "s1", "value": 0.4, "reason": ""}\n'
    (tmp_path / "samples.jsonl").write_text(text)
    record = json.loads((tmp_path / "result.json").read_text())
    record["samples"] = {"rows": 1, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "result.json").write_text(json.dumps(record))
    assert read_rows(tmp_path) == [SampleRow("ism", "a", "s1", 0.4)]


def measured_by(name: str, value: float, **fields: Any) -> tuple[Result, list[SampleRow]]:
    one = Measurement(name, value, 1, "", False, rows=(Row("a", "s1", value),))
    made = measurement_record(one, record("metric", name.partition("@")[0]), cell())
    return result(measurements=[made], **fields), sample_rows([one])


def test_another_list_of_metrics_keeps_what_was_measured(tmp_path: Path) -> None:
    same = {"artefacts": {"generate": "g", "measure": "m1"}}
    write_result(*measured_by("ism", 0.5, **same), {}, tmp_path)
    now, rows = merged(*measured_by("fid", 80.0, artefacts={"generate": "g", "measure": "m2"}), ["fid"], tmp_path)
    assert {m.name: m.value for m in now.measurements} == {"fid": 80.0, "ism": 0.5}
    assert {r.metric: r.value for r in rows} == {"fid": 80.0, "ism": 0.5}
    again, rows = merged(*measured_by("ism", 0.7, **same), ["ism"], tmp_path)
    assert [(m.name, m.value) for m in again.measurements] == [("ism", 0.7)] and [r.value for r in rows] == [0.7]
    gone, _ = merged(*measured_by("ism@b", 0.7, **same), ["ism"], tmp_path)
    assert [m.name for m in gone.measurements] == ["ism@b"], "a metric that is asked for is measured anew as a whole"


@pytest.mark.parametrize("now", [
    {"artefacts": {"generate": "other"}}, {"cell": cell(id="other"), "artefacts": {"generate": "g"}},
])
def test_what_rests_on_other_artefacts_is_not_kept(tmp_path: Path, now: dict[str, Any]) -> None:
    write_result(*measured_by("ism", 0.5, artefacts={"generate": "g"}), {}, tmp_path)
    found, rows = merged(*measured_by("fid", 80.0, **now), ["fid"], tmp_path)
    assert [m.name for m in found.measurements] == ["fid"] and len(rows) == 1


def test_images(tmp_path: Path) -> None:
    import torch

    from bench.codecs import read_png

    pixels = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    written = write_result(result(), [], {"strip of ann": pixels}, tmp_path)
    assert written.images == ["strip-of-ann.png"]
    assert torch.equal(read_png(tmp_path / "images" / "strip-of-ann.png"), pixels)
    assert written.image_hashes == {"strip-of-ann.png": file_digest(tmp_path / "images" / "strip-of-ann.png")}
    assert read_rows(tmp_path) == []


def test_the_seal_is_of_what_was_found_not_of_how(tmp_path: Path) -> None:
    one = write(tmp_path / "a", provenance={"host": "x"}, warnings=["built again"])
    two = write(tmp_path / "b", provenance={"host": "y"})
    assert one.seal == two.seal == seal_of(read_result(tmp_path / "a"))
    other = write_result(result(), sample_rows([replace(MEASURED, rows=MEASURED.rows[:2])]), {}, tmp_path / "c")
    assert other.seal != one.seal


def test_a_warning_that_is_added_later_changes_nothing_else(tmp_path: Path) -> None:
    before = write(tmp_path, warnings=["first"])
    after = add_warnings(before, ["second"], tmp_path)
    assert read_result(tmp_path) == after == before.model_copy(update={"warnings": ["first", "second"]})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_missing_with_a_reason(bad: float) -> None:
    measured = Measurement("x", bad, 1, "", None, bad, bad, rows=(Row("a", "s", bad),))
    made = measurement_record(measured, ISM, cell())
    assert (made.value, made.low, made.high) == (None, None, None) and str(bad) in made.reason
    assert sample_rows([measured]) == [SampleRow("x", "a", "s", None, f"the metric gave {bad}")]


def test_a_nan_in_a_free_part_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(BenchError, match="not a finite"):
        write(tmp_path, provenance={"load": math.nan})
    assert read_result(tmp_path).provenance == {}


@pytest.mark.parametrize("fields", [
    {"status": "n/a"},
    {"status": "failed"},
    {"error": ErrorRecord(type="E", message="m")},
    {"status": "fine"},
    {"surprise": 1},
    {"measurements": [measurement_record(MEASURED, ISM, cell())] * 2},
])
def test_inconsistent_results_cannot_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        result(**fields)


def test_missing_values_need_reasons() -> None:
    with pytest.raises(ValueError, match="reason"):
        SampleRow("ism", "a", "s", None)
    with pytest.raises(ValueError, match="reason"):
        result(measurements=[{"name": "x", "metric": "x", "value": None, "n": 0, "protocol_hash": "h"}])
    with pytest.raises(ValueError, match="interval"):
        result(measurements=[{"name": "x", "metric": "x", "value": 1, "low": 1, "n": 0, "protocol_hash": "h"}])


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"value": 0.5', '"value": NaN'),
    lambda text: text.replace('"value": 0.5', '"value": "high"'),
    lambda text: text.replace('"value": 0.5', '"value": null'),
    lambda text: text.replace('"schema": 1', '"schema": 99'),
    lambda text: text.replace('"status": "ok"', '"status": "n/a"'),
    lambda text: "[]",
    lambda text: "\x00\xff",
])
def test_a_corrupt_result_is_named(tmp_path: Path, damage: Any) -> None:
    write(tmp_path / "abc")
    path = tmp_path / "abc" / "result.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(BenchError, match="abc/result.json"):
        read_suite(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda text: text.replace("0.4", "0.1"),
    lambda text: text + '{"metric": "ism", "sample": "d", "cluster": "s1", "value": 1.0, "reason": ""}\n',
    lambda text: "",
])
def test_altered_rows_are_named(tmp_path: Path, damage: Any) -> None:
    write(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(BenchError, match="samples.jsonl"):
        read_rows(tmp_path)


def test_invalid_rows_are_named_even_with_the_right_hash(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text().replace("null", "NaN"))
    record = json.loads((tmp_path / "result.json").read_text())
    record["samples"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "result.json").write_text(json.dumps(record))
    with pytest.raises(BenchError, match="samples.jsonl"):
        read_rows(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="result.json does not exist"):
        read_result(tmp_path)
    with pytest.raises(BenchError, match="no suite"):
        read_suite(tmp_path / "nowhere")


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_crash_leaves_the_old_result_whole_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int,
) -> None:
    """Files are written beside the old ones by two renames; only then do they take their places."""
    import os

    folder = tmp_path / "abc"
    before = write(folder)
    done: list[Path] = []

    def replace(source: Path, target: Path, real: Any = os.replace) -> None:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(folder, stamp="second")
    assert read_suite(tmp_path) == ([before] if steps < 2 else [])
    assert steps >= 2 or read_rows(folder)
    assert not list(folder.glob(".new-*"))


def test_a_full_disk_is_one_error_and_keeps_what_is_finished(tmp_path: Path) -> None:
    import multiprocessing
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        with pytest.raises(BenchError, match="results: cannot write in .*second"):
            write(tmp_path / "second")

    write(tmp_path / "first")
    child = multiprocessing.get_context("fork").Process(target=limited)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert len(read_suite(tmp_path)) == 1
    assert list((tmp_path / "second").iterdir()) == []


def test_the_protocol_hash_is_what_a_comparison_must_share() -> None:
    def hashed(asked: dict[str, Any] | None = None, metric: PluginRecord = ISM, name: str = "ism", **of: Any) -> str:
        return protocol_hash(cell(**of), metric, name, asked or {})

    same = hashed()
    assert hashed(defense=record("defense", "aspl"), seed=7, id="other") == same
    differing = [
        hashed({"n": 8}), hashed(name="fdfr"), hashed(track="editing"), hashed(protocol={"steps": 2}),
        hashed(metric=record("metric", "ism", parameters={"judge": "b"})),
        hashed(metric=PluginRecord(kind="metric", name="ism", label="ism", version=2)),
        hashed(model=ModelRecord(name="m", digest="e")), hashed(data=record("data", "others")),
        hashed(attack=record("attack", "train", parameters={"steps": 2})),
        hashed(purifier=record("purifier", "jpeg")), hashed(data_digest="f"),
    ]
    assert len({same, *differing}) == len(differing) + 1
    renamed = record("attack", "train").model_copy(update={"label": "preset", "facts": {"paper": "x"}})
    assert hashed(attack=renamed) == same
    assert hashed(model=ModelRecord(name="elsewhere", digest="d")) == same


def test_a_plugin_on_record() -> None:
    @dataclass
    class Shield:
        """Protects."""

        eps: float = 16.0
        variant: str = "described"

    name = "shield_of_test_results"
    try:
        made = plugin("defense", name, track=("customization",), acts_on="images", knows=("prompt",))(Shield)
        record = plugin_record(made(eps=8.0), label="shield_small")
    finally:
        REGISTRY.facts.pop(("defense", name), None)
        REGISTRY.classes.pop(("defense", name), None)
    assert (record.label, record.variant, record.changed) == ("shield_small (described)", "described", ["eps"])
    assert record.parameters == {"eps": 8.0, "variant": "described"}
    assert record.facts["knows"] == ["prompt"] and record.facts["acts_on"] == "images"
