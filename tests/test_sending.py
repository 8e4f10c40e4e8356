"""A finished suite is sent afterwards, once, and a W&B that is down costs nothing but a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from bench import cli
from bench.errors import BenchError
from bench.records import Measurement, Row
from bench.results import (
    CellRecord,
    ModelRecord,
    PluginRecord,
    Result,
    measurement_record,
    read_result,
    result_folders,
    sample_rows,
    write_result,
)
from bench.sending import Sent, board_rows, ranking, send_suite
from bench.tracking import WandbTracker
from tests.wandb_files import Written, read_run, table

IDS = {"noise": "0000000000000001", "aspl": "0000000000000002", "none": "0000000000000003"}


def record(kind: str, name: str) -> PluginRecord:
    return PluginRecord(kind=kind, name=name, label=name, version=1, facts={"acts_on": "images"})


def write_cell(suite: Path, defense: str, value: float, **fields: Any) -> Result:
    cell = CellRecord(id=IDS[defense], track="customization", model=ModelRecord(name="tiny", digest="d"),
                      data=record("data", "faces"), attack=record("attack", "train"),
                      defense=record("defense", defense), seed=0)
    rows = tuple(Row(f"{person}/{i}", person, value + i / 10) for person in "abc" for i in range(2))
    measured = Measurement("ism", value + 0.05, 6, "", False, value, value + 0.1, rows=rows)
    base: dict[str, Any] = {"suite": "small", "cell": cell, "status": "ok",
                            "measurements": [measurement_record(measured, record("metric", "ism"), cell)]}
    strip = {"strip-a": torch.zeros(3, 8, 8, dtype=torch.uint8)}
    return write_result(Result(**{**base, **fields}), sample_rows([measured]), strip, suite / cell.id)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "results/small"
    for place, defense in enumerate(("noise", "aspl")):
        write_cell(folder, defense, 0.2 + place / 10)
    return folder


def runs(suite: Path) -> dict[str, Path]:
    """Id -> file, of all runs below a suite's own W&B folder; two runs of one id are an error."""
    files = list(suite.glob("wandb/offline-run-*/run-*.wandb"))
    found = {file.stem.removeprefix("run-"): file for file in files}
    assert len(found) == len(files)
    return found


def contents(suite: Path) -> dict[Path, bytes]:
    """Every file of every cell."""
    return {file: file.read_bytes() for cell in result_folders(suite) for file in cell.rglob("*") if file.is_file()}


def send(suite: Path) -> tuple[Sent, list[str]]:
    lines: list[str] = []
    return send_suite(suite, WandbTracker("p"), lines.append), lines


def the_board(suite: Path) -> tuple[Path, Written]:
    file = next(file for name, file in runs(suite).items() if name not in IDS.values())
    return file, read_run(file)


def test_cells_and_board_are_sent_once(suite: Path) -> None:
    before = contents(suite)
    sent, lines = send(suite)
    assert (sorted(sent.new), sent.before, sent.failed, lines) == (
        [IDS["noise"], IDS["aspl"], "small"], [], {}, [])
    assert len(runs(suite)) == 3
    cell = read_run(runs(suite)[IDS["aspl"]])
    assert (cell.run.run_id, cell.run.run_group, cell.run.job_type, cell.run.project) == (
        IDS["aspl"], "small", "cell", "p")
    assert cell.summary["ism"] == pytest.approx(0.35) and "images/strip-a" in cell.history
    again, _ = send(suite)
    assert (again.new, len(again.before), len(runs(suite))) == ([], 3, 3)
    assert contents(suite) == before, "sending changes no result"


def test_the_board_is_a_table_in_a_run_of_its_own(suite: Path) -> None:
    send(suite)
    file, found = the_board(suite)
    assert (found.run.run_group, found.run.job_type, found.run.display_name) == (
        "small", "leaderboard", "leaderboard small")
    columns, rows = table(file, found, "leaderboard")
    lines = [dict(zip(columns, row, strict=True)) for row in rows]
    values = {line["defense"]: (line["measurement"], line["value"], line["n"]) for line in lines}
    assert values == {"noise": ("ism", pytest.approx(0.25), 6), "aspl": ("ism", pytest.approx(0.35), 6)}
    assert (found.summary["cells"], found.summary["ok"]) == (2, 2)
    [artifact] = found.artifacts["suite"]
    assert {f"{id}/result.json" for id in (IDS["noise"], IDS["aspl"])} <= {e.path for e in artifact.manifest.contents}
    assert all(entry.ref.startswith(suite.as_uri()) for entry in artifact.manifest.contents)


def test_what_changed_or_came_later_is_sent_and_nothing_else(suite: Path) -> None:
    send(suite)
    write_cell(suite, "noise", 0.5)
    write_cell(suite, "none", 0.7)
    sent, _ = send(suite)
    assert sorted(sent.new) == [IDS["noise"], IDS["none"], "small"] and sent.before == [IDS["aspl"]]
    found = runs(suite)
    assert len(found) == 4, "the run of an outdated result is gone, for both would be uploaded under one id"
    assert read_run(found[IDS["noise"]]).summary["ism"] == pytest.approx(0.55)


def test_a_cell_that_was_mirrored_when_it_ran_is_not_sent_again(suite: Path) -> None:
    folder = suite / IDS["noise"]
    WandbTracker("p").record(read_result(folder), [], {}, folder)
    sent, _ = send(suite)
    assert sorted(sent.new) == [IDS["aspl"], "small"]


def test_a_cell_that_did_not_run_is_sent_with_its_reason(suite: Path) -> None:
    write_cell(suite, "none", 0.1, status="n/a", reason="needs a text encoder", measurements=[])
    send(suite)
    found = read_run(runs(suite)[IDS["none"]])
    assert (found.summary["status"], found.summary["reason"]) == ("n/a", "needs a text encoder")


def test_a_failure_is_told_and_the_same_command_sends_the_rest(suite: Path) -> None:
    broken = suite / IDS["noise"] / "samples.jsonl"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:-20])
    sent, lines = send(suite)
    assert list(sent.failed) == [IDS["noise"]] and sorted(sent.new) == [IDS["aspl"], "small"]
    assert "hash mismatch" in lines[0] and IDS["noise"] in lines[0]
    broken.write_bytes(kept)
    again, _ = send(suite)
    assert (again.new, again.failed) == ([IDS["noise"]], {})


def test_w_and_b_is_down(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at this address: two are tried, the rest is left, nothing is lost, and the verb says so."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    write_cell(suite, "none", 0.7)
    before = contents(suite)
    tracker = WandbTracker("p", "online", timeout=1.0)
    lines: list[str] = []
    sent = send_suite(suite, tracker, lines.append)
    assert (len(sent.failed), len(sent.left), sent.new) == (2, 2, []) and len(lines) == 2
    assert sent.told() == "2 failed, 2 not tried"
    assert contents(suite) == before
    assert not (suite / "wandb/sent.json").exists()
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()  # in the process that failed, W&B still holds the runs
    assert len(send(suite)[0].new) == 4


def test_the_verb(suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BENCH_RESULTS", str(suite.parent))
    assert cli.run(["send", "small", "--project", "mine"]) == 0
    said = capsys.readouterr().out
    assert "3 sent" in said and "wandb sync" in said
    assert cli.run(["send", "small", "--project", "mine"]) == 0
    assert "3 sent before" in capsys.readouterr().out
    (suite / IDS["noise"] / "result.json").write_text("{}")
    assert cli.run(["send", "small", "--project", "mine"]) == 1
    assert IDS["noise"] in capsys.readouterr().err
    (suite / "wandb/sent.json").write_text("{")
    with pytest.raises(BenchError, match="remove it"):
        send(suite)


def test_numbers_are_numbers_and_names_stay_names() -> None:
    text = "board,part,defense,surrogate,measurement,value,eps,p\n1e5,board,7,,ism,0.5,,\n2,board,8,,ism,,4,0.1\n"
    first, second = board_rows(text)
    assert (first["board"], first["defense"], first["value"], first["eps"]) == ("1e5", "7", 0.5, None)
    assert (second["value"], second["eps"]) == (None, 4.0)
    more = [first, {**first, "p": 0.3}, {**first, "measurement": "fid"}, {**second, "part": "matrix"}]
    assert [line["measurement"] for line in ranking(more)] == ["ism"] and "p" not in ranking(more)[0]
    json.dumps(ranking(more), allow_nan=False)
