"""Lines that differ in one option that is on or off are compared on the same samples."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from bench.boards import Table
from bench.leaderboard import print_boards, read_boards, write_boards
from bench.records import Row
from bench.results import ModelRecord, PluginRecord
from bench.switches import switched_on
from tests.test_leaderboard import NONE, add, cell, mean_of, record

PHOTOS = 8


def plug(label: str, flat: bool, prompt: bool, base: str = "noise", **options: Any) -> PluginRecord:
    return record("defense", "plug", label, base=base, flat=flat, prompt=prompt, eps=8.0, **options)


BASE, FLAT, BOTH = plug("base", False, False), plug("base + flat", True, False), plug("both", True, True)


def put(folder: Path, defense: PluginRecord, gain: float, **fields: Any) -> None:
    """Photos differ much, what a part adds is nearly the same for all."""
    rows = [Row(f"s{s}_{i}", f"s{s}", 0.1 * s - gain + 0.001 * (s % 2)) for s in range(PHOTOS) for i in range(2)]
    add(folder, cell(defense, id=f"{defense.label}{sorted(fields)}", **fields), mean_of("success", rows, False))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    for defense, gain in ((NONE, 0.0), (BASE, 0.1), (FLAT, 0.1), (BOTH, 0.15)):
        put(folder, defense, gain)
    return folder


def board(folder: Path) -> Table:
    (table,) = read_boards(folder).tables
    return table


def test_each_part_is_compared_with_the_same_defense_without_it(suite: Path) -> None:
    found = {(s.off, s.option, s.on): (s.difference.value, s.mark) for s in board(suite).switches}
    assert found == {("base", "flat", "base + flat"): (0, ""), ("base + flat", "prompt", "both"): (
        pytest.approx(-0.05), "**")}


def test_the_interval_is_that_of_pairs(suite: Path) -> None:
    table = board(suite)
    added = next(s.difference for s in table.switches if s.option == "prompt")
    score = next(x for x in table.lines if x.label == "both").scores["success"]
    assert added.units == PHOTOS and added.high - added.low < (score.high - score.low) / 20


def test_only_one_switch_at_a_time_of_one_defense_on_one_model() -> None:
    point = cell(BASE)

    def between(other: PluginRecord, **fields: Any) -> str:
        return switched_on(point, cell(other, **fields))

    assert between(FLAT) == "flat"
    assert switched_on(cell(FLAT), point) == "", "the line without it comes first"
    assert between(BOTH) == "", "two switches at once"
    assert between(plug("x", False, False, base="encoder")) == "", "no switch"
    assert between(plug("x", True, False, steps=3)) == "", "an option that the other lacks"
    assert between(FLAT.model_copy(update={"name": "other"})) == ""
    assert between(FLAT, surrogate=ModelRecord(name="b", digest="b")) == ""


def test_switches_of_every_surrogate_and_no_line_without_common_samples(suite: Path) -> None:
    for defense, gain in ((BASE, 0.02), (FLAT, 0.08)):
        put(suite, defense, gain, surrogate=ModelRecord(name="b", digest="b"))
    alone = plug("alone", True, False, base="other")
    put(suite, alone, 0.1)
    labels = {(s.off, s.on) for s in board(suite).switches}
    assert labels == {("base", "base + flat"), ("base + flat", "both"), ("base on b", "base + flat on b")}


def test_page_terminal_and_data_file_have_them(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_boards(suite)
    text = (suite / "leaderboard.md").read_text()
    assert "**What single options do**" in text and "| both | prompt | base + flat | -0.05" in text
    rows = list(csv.DictReader(io.StringIO((suite / "leaderboard.csv").read_text())))
    (row,) = [r for r in rows if r["part"] == "option prompt"]
    assert (row["defense"], row["control_name"], row["mark"]) == ("both", "base + flat", "**")
    assert float(row["difference"]) == pytest.approx(-0.05) and float(row["difference_high"]) < 0
    print_boards(read_boards(suite), width=100)
    out = capsys.readouterr().out
    assert "What single options do" in out and max(map(len, out.splitlines())) <= 100
