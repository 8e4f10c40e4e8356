"""A mirror that shows what ran and never costs a cell."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import BenchError
from bench.records import Measurement, Row
from bench.results import (
    CellRecord,
    ErrorRecord,
    ModelRecord,
    PluginRecord,
    Result,
    SampleRow,
    measurement_record,
    read_result,
    sample_rows,
    write_result,
)
from bench.tracking import (
    ListTracker,
    NullTracker,
    WandbTracker,
    fill,
    mirrored,
    run_name,
    summary,
)
from tests.wandb_files import read_run, table

MEASURED = Measurement("ism", 0.5, 2, "", False, 0.4, 0.6, rows=(
    Row("a", "s", 0.4), Row("b", "s", None, "no face"),
))


def record(kind: str, name: str) -> PluginRecord:
    return PluginRecord(kind=kind, name=name, label=name, version=1, parameters={"eps": 16.0})


def result(cell_id: str = "c0ffee", **fields: Any) -> Result:
    cell = CellRecord(id=cell_id, track="customization", model=ModelRecord(name="tiny", digest="d"),
                      data=record("data", "faces"), attack=record("attack", "train"),
                      defense=record("defense", "noise"), seed=3)
    base: dict[str, Any] = {"suite": "quick", "cell": cell, "status": "ok",
                            "measurements": [measurement_record(MEASURED, record("metric", "ism"), cell)]}
    return Result(**{**base, **fields})


PICTURE = {"strip": torch.zeros(3, 8, 8, dtype=torch.uint8)}


def written(folder: Path, cell_id: str) -> list[Path]:
    """Run files with more than a header; wandb's own process writes them out a moment after a run has ended."""
    for _ in range(100):
        found = [p for p in folder.glob(f"wandb/offline-run-*/run-{cell_id}.wandb") if p.stat().st_size > 500]
        if found:
            break
        time.sleep(0.1)
    return found


def test_a_real_offline_run_per_cell(tmp_path: Path) -> None:
    tracker = WandbTracker()
    rows = sample_rows([MEASURED])
    for cell_id in ("c0ffee", "decaf0"):
        folder = tmp_path / cell_id
        folder.mkdir()
        with tracker.start(result(cell_id), folder) as run:
            fill(run, result(cell_id), rows, PICTURE, folder)
            assert (run.id, run.group, run.job_type, run.name) == (cell_id, "quick", "cell", "noise/train/s3")
            assert run.config["defense"]["parameters"] == {"eps": 16.0} and run.config["seed"] == 3
            assert (run.summary["ism"], run.summary["ism_low"], run.summary["ism_high"]) == (0.5, 0.4, 0.6)
            assert set(run.tags) == {"customization", "tiny", "noise", "train", "ok"}
        assert len(written(folder, cell_id)) == 1
        media = [p.suffix for p in folder.glob("wandb/offline-run-*/files/media/**/*.*")]
        assert sorted(media) == [".json", ".png"]


def test_record_writes_the_run_below_its_folder_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again = mirrored(WandbTracker(), result("feed"), sample_rows([MEASURED]), PICTURE, tmp_path / "cell")
    assert again.warnings == []
    assert len(written(tmp_path / "cell", "feed")) == 1
    assert capfd.readouterr().out == ""


def test_what_a_run_holds_when_it_is_read_back(tmp_path: Path) -> None:
    """And its files are referred to where they lie: nothing of them is copied or uploaded."""
    rows = sample_rows([MEASURED])
    done = write_result(result("beef"), rows, PICTURE, tmp_path)
    WandbTracker(files=tmp_path / "w").record(done, rows, {"strip": tmp_path / "images/strip.png"}, tmp_path)
    file = next((tmp_path / "w").glob("wandb/offline-run-*/run-beef.wandb"))
    found = read_run(file)
    assert (found.run.run_id, found.run.run_group, found.run.job_type) == ("beef", "quick", "cell")
    assert found.config["defense"]["parameters"] == {"eps": 16.0}
    assert (found.summary["ism"], found.summary["ism_low"], found.summary["status"]) == (0.5, 0.4, "ok")
    columns, values = table(file, found, "samples")
    assert columns == ["metric", "sample", "cluster", "value", "reason"]
    assert values == [["ism", "a", "s", 0.4, ""], ["ism", "b", "s", None, "no face"]]
    assert (file.parent / "files" / found.history["images/strip"]["path"]).read_bytes().startswith(b"\x89PNG")
    [artifact] = found.artifacts["result"]
    assert artifact.name == "result-beef"
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert {name: entry.ref for name, entry in entries.items()} == {
        name: (tmp_path / name).as_uri() for name in ("result.json", "samples.jsonl", "images/strip.png")}
    md5 = base64.b64encode(hashlib.md5((tmp_path / "result.json").read_bytes()).digest()).decode()
    assert entries["result.json"].digest == md5
    assert json.loads(artifact.metadata)["seal"] == done.seal


class Broken:
    def record(self, result: Result, rows: Sequence[SampleRow], images: Mapping[str, Any], folder: Path) -> None:
        raise RuntimeError("no network")


def test_a_failing_tracker_is_a_warning(tmp_path: Path) -> None:
    before = write_result(result(warnings=["first"]), [], {}, tmp_path)
    after = mirrored(Broken(), before, [], {}, tmp_path)
    assert after.warnings == ["first", "tracking: RuntimeError: no network"]
    assert after.model_copy(update={"warnings": ["first"]}) == before
    assert read_result(tmp_path) == after, "the warning stands in the file, too"


def test_a_disk_that_refuses_wandb_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    after = mirrored(WandbTracker(), result(), [], {}, tmp_path / "file" / "cell")
    assert len(after.warnings) == 1


def test_the_list_keeps_and_null_does_not(tmp_path: Path) -> None:
    tracker, rows = ListTracker(), sample_rows([MEASURED])
    assert mirrored(tracker, result(), rows, PICTURE, tmp_path) == result()
    assert tracker.records == [(result(), tuple(rows), PICTURE)]
    mirrored(NullTracker(), result(), rows, PICTURE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_left_out_of_the_summary() -> None:
    failed = result(status="failed", measurements=[], error=ErrorRecord(type="E", message="it broke"))
    assert summary(failed) == {"status": "failed", "reason": "it broke", "seconds": 0}


def test_names_tell_the_purifier() -> None:
    cell = result().cell.model_copy(update={"purifier": record("purifier", "jpeg")})
    assert run_name(result().model_copy(update={"cell": cell})) == "noise/jpeg/train/s3"


def test_unknown_mode() -> None:
    with pytest.raises(BenchError, match="offline"):
        WandbTracker(mode="ofline")


def test_importing_the_tracker_imports_neither_wandb_nor_torch() -> None:
    code = "import sys, bench.tracking; print({'wandb', 'torch', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


RECORDS = """
import sys, pathlib, importlib
from bench.tracking import WandbTracker, preloaded
from tests.test_tracking import result
for name in preloaded("offline" if sys.argv[2] == "once" else "disabled"):
    importlib.import_module(name)
before = set(sys.modules)
WandbTracker().record(result(), [], {}, pathlib.Path(sys.argv[1]))
print(len([name for name in set(sys.modules) - before if name.startswith("wandb")]))
"""


def test_what_a_run_imports_is_what_fork_servers_load_once(tmp_path: Path) -> None:
    def imported(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", RECORDS, str(tmp_path / how), how], capture_output=True, text=True,
                              check=True)
        return int(done.stdout)

    assert imported("each") > 300  # or this says nothing
    assert imported("once") < 20
