"""Where photos were attacked on several models, boards say how far each protection carries."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.boards import Table
from bench.leaderboard import print_boards, read_boards, write_boards
from bench.records import Measurement, Row
from bench.results import ModelRecord, PluginRecord
from tests.test_leaderboard import NONE, add, cell, line, mean_of, record

IP2P, ONE, TWO = (ModelRecord(name=name, digest=name * 2) for name in ("ip2p", "sd-a", "sd-b"))
ORDER, SKETCH = record("attack", "instruct"), record("attack", "sdedit", strength=0.7)
EDITORS = ((ORDER, IP2P), (SKETCH, ONE), (SKETCH, TWO))
NOISE = record("defense", "noise", facts={"control": True, "acts_on": "images"}, eps=16.0)
FLAT = record("defense", "flat", facts={"acts_on": "images", "needs": ["text_encoder"]}, eps=16.0)
PLAIN, JPEG = record("purifier", "none", facts={"control": True}), record("purifier", "jpeg", quality=75)
TOLD = {"seeds": 2, "told": True}
PHOTOS, SEEDS = 6, 2


def value(defense: PluginRecord, on: ModelRecord | None, attack: PluginRecord, model: ModelRecord, s: int, i: int,
          ) -> float:
    """Success of picture i of photo s: most photos fall, but a protection holds on the model that it was made on."""
    holds = defense is FLAT and (on or model) is model
    falls = {"instruct": (s + i) % 2, "sdedit": s % 3 == 0}[attack.name] if holds else s > 0
    return float(falls)


def success(defense: PluginRecord, on: ModelRecord | None, attack: PluginRecord, model: ModelRecord) -> Measurement:
    rows = [Row(f"s{s}_{i}", f"s{s}", value(defense, on, attack, model, s, i))
            for s in range(PHOTOS) for i in range(SEEDS)]
    return mean_of("edit_success", rows, False, "share")


def put(folder: Path, defense: PluginRecord, attack: PluginRecord, model: ModelRecord, on: ModelRecord | None = None,
        purifier: PluginRecord = PLAIN, shown: Measurement | None = None, **fields: Any) -> None:
    name = "-".join([defense.label, attack.label, model.name, on.name if on else "", purifier.label, str(fields)])
    where = cell(defense, 0, **{"track": "editing", "model": model, "attack": attack, "surrogate": on,
                                "purifier": purifier, "protocol": TOLD, "id": name, **fields})
    shift = mean_of("edit_psnr", [Row(f"s{s}_0", f"s{s}", 20.0 + s) for s in range(PHOTOS)], False, "dB")
    add(folder, where, shown or success(defense, on, attack, model), shift)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Both controls and a defense made on two of three models, against an editor on each."""
    folder = tmp_path / "edits"
    for attack, model in EDITORS:
        for control in (NONE, NOISE):
            put(folder, control, attack, model)
        for on in (IP2P, ONE):
            put(folder, FLAT, attack, model, None if on is model else on)
    return folder


def carried(folder: Path) -> list[Table]:
    return [table for table in read_boards(folder).tables if table.attack == "all attacks"]


def test_every_editor_has_its_board_with_transfer_beside_the_seen_model(suite: Path) -> None:
    boards = {(t.attack, t.model): [x.label for x in t.lines] for t in read_boards(suite).tables if not t.worst_of}
    assert set(boards) == {("instruct", "ip2p"), ("sdedit", "sd-a"), ("sdedit", "sd-b")}
    assert sorted(boards["instruct", "ip2p"]) == ["flat", "flat on sd-a", "noise", "none"]
    assert sorted(boards["sdedit", "sd-b"]) == ["flat on ip2p", "flat on sd-a", "noise", "none"]
    seen = next(t for t in read_boards(suite).tables if t.model == "ip2p")
    delta = {d.control: d.difference.value for d in line(seen, "flat").deltas["edit_success"]}
    assert delta == pytest.approx({"none": 6 / 12 - 10 / 12, "noise": 6 / 12 - 10 / 12})
    assert line(seen, "flat").scores["edit_success"].low is not None


def test_one_board_holds_the_worst_editor_of_every_picture(suite: Path) -> None:
    (table,) = carried(suite)
    assert (table.model, len(table.worst_of)) == ("all models", 3)
    assert table.purifier == "worst case over 3 attacks: instruct on ip2p, sdedit on sd-a, sdedit on sd-b"
    assert {x.label: x.status for x in table.lines} == {
        "flat on ip2p": "ok", "flat on sd-a": "ok", "noise": "ok", "none": "ok"}
    for on in (IP2P, ONE):
        worst = [max(value(FLAT, on, attack, model, s, i) for attack, model in EDITORS)
                 for s in range(PHOTOS) for i in range(SEEDS)]
        assert line(table, f"flat on {on.name}").scores["edit_success"].value == pytest.approx(statistics.fmean(worst))
    assert [c.name for c in table.columns] == ["edit_success", "edit_psnr"]


def test_the_matrix_shows_how_far_each_protection_carries(suite: Path) -> None:
    matrix = carried(suite)[0].matrix
    assert matrix.over == "attack"
    assert matrix.columns == ("instruct on ip2p", "sdedit on sd-a", "sdedit on sd-b", "mean", "worst")
    rows = {row.label: [round(cell.value, 3) for cell in row.cells] for row in matrix.rows}
    whole = round(10 / 12, 3)
    assert rows["none"] == [whole] * 5 == rows["noise"]
    assert rows["flat on ip2p"][:3] == [0.5, whole, whole]
    assert rows["flat on sd-a"][:3] == [whole, round(4 / 12, 3), whole]
    assert rows["flat on sd-a"][3] == pytest.approx((10 + 4 + 10) / 36, abs=1e-3)
    assert matrix.shifts == {} and matrix.notes == ()


def test_purifiers_have_a_worst_case_of_their_own_and_one_over_editors(suite: Path) -> None:
    """Under JPEG the attackers get everything back."""
    whole = mean_of("edit_success", [Row(f"s{s}_{i}", f"s{s}", 1.0) for s in range(PHOTOS) for i in range(SEEDS)],
                    False, "share")
    for attack, model in EDITORS:
        for defense in (NONE, NOISE, FLAT):
            put(suite, defense, attack, model, None, JPEG, whole)
    plain, purified = carried(suite)
    assert [len(plain.worst_of), len(purified.worst_of)] == [3, 3]
    assert purified.worst_of[0] == "instruct on ip2p, worst of 2 purifiers"
    assert line(purified, "none").scores["edit_success"].value == 1
    flat = line(purified, "flat on ip2p")
    assert flat.status == "incomplete"
    assert "sdedit on sd-a, worst of 2 purifiers: no cell under jpeg" in flat.reason
    own = [t for t in read_boards(suite).tables if t.worst_of == ("none", "jpeg")]
    assert len(own) == 3 and line(own[0], "flat").scores["edit_success"].value == 1


def test_protocols_stay_apart(suite: Path) -> None:
    """A defender that is told what will be asked is never ranked with one that is not."""
    for attack, model in EDITORS[:2]:
        for defense in (NONE, FLAT):
            put(suite, defense, attack, model, protocol={"seeds": 2, "told": False})
    tables = read_boards(suite).tables
    assert {(t.protocol["told"], len(t.worst_of)) for t in tables} == {(True, 0), (True, 3), (False, 0), (False, 2)}
    untold = next(t for t in tables if t.worst_of and not t.protocol["told"])
    assert [d.control for d in line(untold, "flat on ip2p").deltas["edit_success"]] == ["none"]


def test_one_model_is_no_transfer(tmp_path: Path) -> None:
    for attack in (ORDER, SKETCH):
        for defense in (NONE, FLAT):
            put(tmp_path, defense, attack, ONE)
    assert [t.worst_of for t in read_boards(tmp_path).tables] == [(), ()]


def test_defenses_of_models_have_no_worst_attacker(tmp_path: Path) -> None:
    """There the attack comes first: nobody chooses it with the defense in view."""
    repair = record("defense", "repair", facts={"acts_on": "model"})
    for model in (ONE, TWO):
        for defense in (NONE, repair):
            put(tmp_path, defense, SKETCH, model, track="backdoor")
    assert [t.worst_of for t in read_boards(tmp_path).tables] == [(), ()]


def test_an_editor_without_controls_does_not_count(suite: Path) -> None:
    put(suite, FLAT, record("attack", "inpaint"), ONE, shown=success(FLAT, None, SKETCH, ONE))
    assert len(carried(suite)[0].worst_of) == 3


def test_page_terminal_and_data_files_lead_with_it(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_boards(suite)
    text = (suite / "leaderboard.md").read_text()
    assert [x for x in text.splitlines() if x.startswith("#")][1] == "## editing: all attacks on all models"
    assert "under each attack" in text and "clean photos" in text
    rows = list(csv.DictReader(io.StringIO((suite / "leaderboard.csv").read_text())))
    matrix = [r for r in rows if r["part"] == "matrix" and r["defense"] == "flat on ip2p"]
    assert [r["attack"] for r in matrix] == ["instruct on ip2p", "sdedit on sd-a", "sdedit on sd-b", "mean", "worst"]
    assert json.loads((suite / "leaderboard.json").read_text())["tables"][0]["matrix"]["over"] == "attack"
    print_boards(read_boards(suite), width=100)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and "all attacks on all models" in out
