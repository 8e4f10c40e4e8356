"""The worst case over purifiers is taken sample by sample, beside the matrix of what it is the worst of."""

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
from bench.results import ErrorRecord, ModelRecord, PluginRecord
from tests.test_leaderboard import NOISE, NONE, SHIELD, add, cell, line, mean_of, record

PLAIN = record("purifier", "none", facts={"control": True})
JPEG = record("purifier", "jpeg", quality=75)
BLUR = record("purifier", "blur", radius=2)
SUBJECTS, PER = 6, 4


def value(defense: PluginRecord, purifier: PluginRecord, seed: int, s: int, i: int) -> float:
    """Which purifier serves the attacker best differs from sample to sample; blur moves every photo by -0.2."""
    base = {"none": 0.7, "noise": 0.65, "shield": 0.3}[defense.name] + s * 0.01 + seed * 0.003
    helps = {"jpeg": 0.1 * (i % 2), "blur": -0.2 + 0.001 * i, "none": 0.05 * ((i + 1) % 2)}[purifier.name]
    return base + helps


def ism(defense: PluginRecord, purifier: PluginRecord, seed: int = 0, name: str = "ism", higher: bool = False,
        ) -> Measurement:
    sign = -1 if higher else 1
    return mean_of(name, [Row(f"s{s}/{i}", f"s{s}", sign * value(defense, purifier, seed, s, i))
                          for s in range(SUBJECTS) for i in range(PER)], higher)


def put(folder: Path, defense: PluginRecord, purifier: PluginRecord, seed: int = 0, *more: Measurement,
        **fields: Any) -> None:
    where = cell(defense, seed, purifier=purifier, id=f"{defense.label}-{purifier.label}-{seed}-{len(fields)}")
    add(folder, where, *([] if "status" in fields else [ism(defense, purifier, seed), *more]), **fields)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "washed"
    for seed in (0, 1):
        for defense in (NONE, NOISE, SHIELD):
            for purifier in (JPEG, PLAIN, BLUR):
                put(folder, defense, purifier, seed)
    return folder


def worst(folder: Path) -> Table:
    found = [t for t in read_boards(folder).tables if t.worst_of]
    assert len(found) == 1
    return found[0]


def by_hand(defense: PluginRecord, *purifiers: PluginRecord, seeds: tuple[int, ...] = (0, 1)) -> list[float]:
    """Sample by sample the largest value."""
    return [max(value(defense, p, seed, s, i) for p in purifiers)
            for seed in seeds for s in range(SUBJECTS) for i in range(PER)]


def test_a_suite_in_which_nothing_was_everywhere_yet_has_its_boards(tmp_path: Path) -> None:
    put(tmp_path, NONE, PLAIN)
    put(tmp_path, NOISE, JPEG)
    write_boards(tmp_path)
    table = worst(tmp_path)
    assert (table.matrix, table.columns) == (None, ())
    assert {(x.label, x.rank, x.reason) for x in table.lines} == {
        ("none", None, "no cell under jpeg"), ("noise", None, "no cell under none")}


def test_every_sample_counts_under_the_purifier_that_served_best(suite: Path) -> None:
    table = worst(suite)
    score = line(table, "shield").scores["ism"]
    assert score.value == pytest.approx(statistics.fmean(by_hand(SHIELD, PLAIN, JPEG, BLUR)), abs=1e-5)
    assert score.value > max(c.value for c in table.matrix.rows[0].cells[:3])
    assert (score.n, score.units) == (2 * SUBJECTS * PER, SUBJECTS)
    assert score.low < score.value < score.high
    delta = next(d for d in line(table, "shield").deltas["ism"] if d.control == "none")
    assert delta.difference.value == pytest.approx(-0.4, abs=1e-5)
    assert delta.difference.high - delta.difference.low < 0.001, "the same samples are compared"
    assert [x.label for x in table.lines] == ["shield", "noise", "none"]


def test_where_more_is_better_the_worst_is_the_least(tmp_path: Path) -> None:
    for defense in (NONE, SHIELD):
        for purifier in (PLAIN, JPEG):
            where = cell(defense, purifier=purifier, id=f"{defense.name}{purifier.name}")
            add(tmp_path, where, ism(defense, purifier, name="fdfr", higher=True))
    found = worst(tmp_path)
    expected = statistics.fmean(by_hand(SHIELD, PLAIN, JPEG, seeds=(0,)))
    assert line(found, "shield").scores["fdfr"].value == pytest.approx(-expected, abs=1e-5)


def test_it_leads_its_family_and_names_its_purifiers(suite: Path) -> None:
    tables = read_boards(suite).tables
    assert [t.purifier for t in tables] == ["worst case over 3 purifiers: none, blur, jpeg", "none", "blur", "jpeg"]
    assert tables[0].worst_of == ("none", "blur", "jpeg")
    assert len({t.family for t in tables}) == 1


def test_the_matrix_holds_every_purifier_their_mean_and_the_worst(suite: Path) -> None:
    table = worst(suite)
    matrix = table.matrix
    assert matrix.columns == ("none", "blur", "jpeg", "mean", "worst")
    assert [(r.label, r.control, r.clean) for r in matrix.rows] == [
        ("shield", False, False), ("noise", True, False), ("none", True, True)]
    boards = {t.purifier: t for t in read_boards(suite).tables}
    shield = matrix.rows[0].cells
    for place, purifier in enumerate(("none", "blur", "jpeg")):
        assert shield[place] == line(boards[purifier], "shield").scores["ism"]
    assert shield[3].value == pytest.approx(statistics.fmean(c.value for c in shield[:3]))
    assert shield[4] == line(table, "shield").scores["ism"]


def test_a_purifier_that_harms_clean_photos_is_named(suite: Path) -> None:
    matrix = worst(suite).matrix
    assert matrix.shifts["blur"].value == pytest.approx(-0.2235, abs=1e-4)
    assert matrix.shifts["blur"].excludes_zero
    assert [note.split(" moves")[0] for note in matrix.notes] == ["blur"], "jpeg does not lower the clean score"


def test_one_purifier_has_no_worst_case(tmp_path: Path) -> None:
    put(tmp_path, NONE, PLAIN)
    put(tmp_path, SHIELD, PLAIN)
    assert [t.worst_of for t in read_boards(tmp_path).tables] == [()]


def test_a_defense_that_lacks_a_purifier_is_listed_and_not_ranked(suite: Path) -> None:
    half, broken, barred = (record("defense", "shield", label) for label in ("half", "broken", "barred"))
    error = ErrorRecord(type="RuntimeError", message="out of memory")
    for number, defense in enumerate((half, broken, barred)):
        defense.parameters["number"] = number
    for seed in (0, 1):
        put(suite, half, PLAIN, seed)
        put(suite, half, JPEG, seed)
        put(suite, broken, PLAIN, seed)
        put(suite, broken, JPEG, seed)
        put(suite, broken, BLUR, seed, status="failed", error=error, measurements=[])
        for purifier in (PLAIN, JPEG, BLUR):
            put(suite, barred, purifier, seed, status="n/a", reason="acts on models", measurements=[])
    table = worst(suite)
    found = {x.label: (x.rank, x.status, x.reason) for x in table.lines[3:]}
    assert found == {"half": (None, "incomplete", "no cell under blur"),
                     "broken": (None, "incomplete", "failed under blur: RuntimeError"),
                     "barred": (None, "n/a", "acts on models")}
    row = next(r for r in table.matrix.rows if r.label == "half")
    assert [c.value is None for c in row.cells] == [False, True, False, True, True]
    assert line(table, "half").scores["ism"].value is None, "no worst of what there is"


def test_a_purifier_without_a_clean_photo_control_does_not_count(suite: Path) -> None:
    alone = record("purifier", "alone", quality=5)
    where = cell(SHIELD, 0, purifier=alone, id="alone")
    add(suite, where, ism(SHIELD, JPEG))
    assert worst(suite).worst_of == ("none", "blur", "jpeg")
    assert line(worst(suite), "shield").rank == 1


def test_seeds_that_the_controls_lack_do_not_count(suite: Path) -> None:
    put(suite, NONE, PLAIN, 2)
    put(suite, SHIELD, PLAIN, 2)
    assert line(worst(suite), "shield").seeds == (0, 1)
    assert line(worst(suite), "shield").status == "ok"


def test_a_missing_sample_is_not_the_worst_of_the_others(tmp_path: Path) -> None:
    for defense in (NONE, SHIELD):
        put(tmp_path, defense, PLAIN)
    put(tmp_path, NONE, JPEG)
    fewer = mean_of("ism", ism(SHIELD, JPEG).rows[1:], False)
    add(tmp_path, cell(SHIELD, purifier=JPEG, id="fewer"), fewer)
    shield = line(worst(tmp_path), "shield")
    assert (shield.status, shield.reason) == ("incomplete", "1 samples without a value")


def test_what_is_no_mean_of_samples_has_no_worst_case(suite: Path) -> None:
    for purifier in (PLAIN, JPEG, BLUR):
        put(suite, record("defense", "shield", "more", more=1), purifier, 0, Measurement("fid", 80.0, 9, "", True),
            Measurement("linf", 16.0, 2, "", False, rows=(Row("a", "s", 16.0), Row("b", "s", 2.0))),
            mean_of("clip", ism(SHIELD, purifier).rows, None))
    assert [c.name for c in worst(suite).columns] == ["ism"]


def test_shares_of_clean_photos_are_families_of_their_own(suite: Path) -> None:
    for defense in (NONE, SHIELD):
        for purifier in (PLAIN, JPEG):
            where = cell(defense, 0, purifier=purifier, protocol={"clean_share": 0.5}, id=f"half{defense}{purifier}")
            add(suite, where, ism(defense, purifier))
    tables = read_boards(suite).tables
    assert [len(t.worst_of) for t in tables] == [3, 0, 0, 0, 2, 0, 0]
    assert [dict(t.protocol) for t in tables][3:5] == [{}, {"clean_share": 0.5}]


def test_lines_name_their_surrogate_and_share_a_board(suite: Path) -> None:
    for seed in (0, 1):
        for name, digest in (("other", "e" * 8), ("third", "f" * 8)):
            where = cell(SHIELD, seed, purifier=PLAIN, surrogate=ModelRecord(name=name, digest=digest),
                         id=f"{name}{seed}")
            add(suite, where, ism(SHIELD, PLAIN, seed))
    plain = next(t for t in read_boards(suite).tables if t.unpurified)
    assert {x.label: x.surrogate for x in plain.lines if x.name == "shield"} == {
        "shield": "", "shield on other": "other", "shield on third": "third"}
    assert line(plain, "shield on other").seeds == (0, 1)


def test_the_page_leads_with_the_worst_case_and_keeps_many_purifiers_short(suite: Path) -> None:
    write_boards(suite)
    text = (suite / "leaderboard.md").read_text()
    headings = [x for x in text.splitlines() if x.startswith("#")]
    assert headings == ["# Leaderboard: washed", "## customization: train on tiny", "### purifier none",
                        "### purifier blur", "### purifier jpeg"]
    assert text.index("worst case over 3") < text.index("under each purifier") < text.index("### purifier none")
    assert "none *(clean photos)*" in text and "blur moves ism of clean photos" in text
    for seed in (0, 1):
        for defense in (NONE, NOISE, SHIELD):
            where = cell(defense, seed, purifier=record("purifier", "resize", side=8), id=f"{defense}{seed}")
            add(suite, where, ism(defense, JPEG, seed))
    write_boards(suite)
    text = (suite / "leaderboard.md").read_text()
    assert [x for x in text.splitlines() if x.startswith("###")] == ["### purifier none"]
    assert "The boards under blur, jpeg, resize are in leaderboard.csv and leaderboard.json." in text


def test_data_files_and_terminal_hold_both(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_boards(suite)
    rows = list(csv.DictReader(io.StringIO((suite / "leaderboard.csv").read_text())))
    matrix = [r for r in rows if r["part"] == "matrix" and r["defense"] == "shield"]
    assert [r["purifier"] for r in matrix] == ["none", "blur", "jpeg", "mean", "worst"]
    headline = next(r for r in rows if r["part"] == "board" and r["purifier"].startswith("worst case"))
    assert headline["rank"] == "1" and headline["value"] == matrix[-1]["value"]
    table = json.loads((suite / "leaderboard.json").read_text())["tables"][0]
    assert table["worst_of"] == ["none", "blur", "jpeg"]
    assert len(table["matrix"]["rows"]) == 3 and table["matrix"]["shifts"]["blur"]["value"] < 0
    print_boards(read_boards(suite), width=100)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "under each purifier" in out and "clean photos" in out
