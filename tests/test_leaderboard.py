"""Boards say who is ahead, by how much, how surely, and who is missing and why."""

import csv
import gc
import io
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.boarddata import json_text
from bench.boards import Line, Table
from bench.errors import BenchError
from bench.leaderboard import print_boards, read_boards, write_boards
from bench.records import Measurement, Row
from bench.results import (
    CellRecord,
    ErrorRecord,
    ModelRecord,
    PluginRecord,
    Result,
    StageRecord,
    measurement_record,
    sample_rows,
    write_result,
)

STAMP = "pipeline check, not a result"


def record(kind: str, name: str, label: str = "", facts: dict[str, Any] | None = None, **options: Any) -> PluginRecord:
    return PluginRecord(kind=kind, name=name, label=label or name, version=1, parameters=options, facts=facts or {})


NONE = record("defense", "none", facts={"control": True})
NOISE = record("defense", "noise", facts={"control": True}, eps=16.0)
SHIELD = record("defense", "shield", eps=16.0)


def cell(defense: PluginRecord, seed: int = 0, **fields: Any) -> CellRecord:
    point = {"id": f"{defense.label}-{defense.parameters}-{seed}-{sorted(fields)}", "track": "customization",
             "model": ModelRecord(name="tiny", digest="d"), "data": record("data", "faces"),
             "attack": record("attack", "train"), "defense": defense, "seed": seed}
    return CellRecord(**{**point, **fields})


def ism(mean: float, noise: str = "", subjects: int = 8, per: int = 3, sd: float = 0.01) -> Measurement:
    """Subjects differ much; samples of a defense differ from its mean by little."""
    draw = random.Random(noise)
    rows = tuple(Row(f"{i}", f"s{s}", mean + s * 0.1 + draw.gauss(0, sd)) for s in range(subjects) for i in range(per))
    return mean_of("ism", rows, False)


def mean_of(name: str, rows: Sequence[Row], higher: bool | None, unit: str = "") -> Measurement:
    values = [row.value for row in rows if row.value is not None]
    return Measurement(name, statistics.fmean(values), len(rows), unit, higher, rows=tuple(rows))


def add(folder: Path, where: CellRecord, *measured: Measurement, **fields: Any) -> None:
    made = [measurement_record(m, record("metric", m.name), where) for m in measured]
    base: dict[str, Any] = {"suite": folder.name, "cell": where, "status": "ok", "measurements": made, "stamp": STAMP}
    write_result(Result(**{**base, **fields}), sample_rows(measured), {}, folder / where.id.replace("/", "-"))


def board(folder: Path) -> Table:
    tables = read_boards(folder).tables
    assert len(tables) == 1
    return tables[0]


def line(table: Table, label: str) -> Line:
    return next(x for x in table.lines if x.label == label)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "quick"
    for seed in (0, 1):
        add(folder, cell(NONE, seed), ism(0.5, f"a{seed}"))
        add(folder, cell(NOISE, seed), ism(0.5, f"b{seed}"))
        add(folder, cell(SHIELD, seed), ism(0.3, f"c{seed}"),
            cost=[StageRecord(stage="protect", key="k", seconds=4.0 + seed * 2), StageRecord(
                stage="customise", key="l", seconds=100.0)])
    return folder


def test_pooled_values_and_paired_differences(suite: Path) -> None:
    table = board(suite)
    shield, none = line(table, "shield"), line(table, "none")
    rows = [r.value for seed in (0, 1) for r in ism(0.3, f"c{seed}").rows]
    other = [r.value for seed in (0, 1) for r in ism(0.5, f"a{seed}").rows]
    score = shield.scores["ism"]
    assert score.value == pytest.approx(statistics.fmean(rows))
    assert (score.n, score.units) == (48, 8)
    assert score.low < score.value < score.high
    delta = shield.deltas["ism"][0]
    assert delta.control == "none"
    assert delta.difference.value == pytest.approx(statistics.fmean(rows) - statistics.fmean(other), abs=1e-6)
    assert delta.mark == "**"
    assert delta.difference.high - delta.difference.low < (score.high - score.low) / 5
    assert [d.control for d in none.deltas["ism"]] == ["noise"]
    assert shield.seconds == 5.0


def test_ranks_are_shared_unless_the_interval_excludes_0(suite: Path) -> None:
    ranks = {x.label: (x.rank, x.tied) for x in board(suite).lines}
    assert ranks == {"shield": (1, False), "none": (2, True), "noise": (2, True)}


def test_ranks_come_with_what_resampling_says_of_them(suite: Path) -> None:
    placings = {x.label: x.placing for x in board(suite).lines}
    assert (placings["shield"].first, placings["shield"].low, placings["shield"].high) == (1.0, 1, 1)
    assert (placings["none"].low, placings["none"].high) == (2, 3)
    assert placings["none"].mean + placings["noise"].mean == pytest.approx(5, abs=0.1)
    write_boards(suite)
    assert "| 2–3 |" in (suite / "leaderboard.md").read_text()


def test_the_page_says_what_difference_this_n_could_have_seen(tmp_path: Path) -> None:
    def power(subjects: int) -> Any:
        for defense in (NONE, NOISE, SHIELD):
            add(tmp_path, cell(defense), ism(0.5, f"{defense.name}{subjects}", subjects, sd=0.1))
        return board(tmp_path).power

    few, many = power(5), power(60)
    assert (few.units, few.comparisons, few.level) == (5, 2, 0.025)
    assert few.single < few.corrected <= few.most
    assert many.corrected < few.corrected / 2
    error = 0.1 * (2 / 3 / 60) ** 0.5
    assert many.single == pytest.approx(2.85 * error, rel=0.3), "two normal variances, 3 samples of each of 60"
    write_boards(tmp_path)
    assert "Power: with 60 units" in (tmp_path / "leaderboard.md").read_text()


def test_the_better_direction_is_the_metrics(tmp_path: Path) -> None:
    for defense, value in ((NONE, 0.1), (SHIELD, 0.9)):
        rows = [Row(str(i), f"s{i}", value + i * 0.001) for i in range(6)]
        add(tmp_path, cell(defense), mean_of("removal", rows, True))
    assert [x.label for x in board(tmp_path).lines] == ["shield", "none"]


def test_too_few_units_rank_nobody_ahead(tmp_path: Path) -> None:
    for defense, mean in ((NONE, 0.9), (SHIELD, 0.1)):
        add(tmp_path, cell(defense), ism(mean, defense.name, subjects=2))
    table = board(tmp_path)
    assert {(x.rank, x.tied) for x in table.lines} == {(1, True)}
    assert line(table, "shield").scores["ism"].low is None
    assert line(table, "shield").deltas["ism"][0].mark == ""


def test_other_protocols_are_other_boards(suite: Path) -> None:
    where = cell(record("defense", "alien"), 0)
    measured = ism(0.01, "z")
    other = Measurement(**{**vars(measured), "protocol": {"judge": "another"}})
    add(suite, where, other)
    tables = read_boards(suite).tables
    assert sorted(sorted(x.label for x in t.lines) for t in tables) == [["alien"], ["noise", "none", "shield"]]


@pytest.mark.parametrize("fields", [
    {"track": "editing"}, {"model": ModelRecord(name="tiny", digest="e")}, {"data": record("data", "others")},
    {"attack": record("attack", "train", steps=9)}, {"purifier": record("purifier", "jpeg")},
    {"protocol": {"steps": 9}},
])
def test_what_a_comparison_must_share_splits_boards(suite: Path, fields: dict[str, Any]) -> None:
    add(suite, cell(record("defense", "alien"), **fields), ism(0.01))
    assert len(read_boards(suite).tables) == 2


def test_incomplete_lines_are_listed_but_not_ranked(suite: Path) -> None:
    add(suite, cell(record("defense", "half")), ism(0.01, "h"))
    fewer = ism(0.01, "f", subjects=5)
    for seed in (0, 1):
        add(suite, cell(record("defense", "fewer"), seed), fewer)
        add(suite, cell(record("defense", "blind"), seed), mean_of(
            "ism", [*ism(0.01, "g").rows, Row("x", "s0", None, "no face")], False))
    table = board(suite)
    assert [x.label for x in table.lines][:3] == ["shield", "noise", "none"]
    assert {x.label: (x.rank, x.status, x.reason) for x in table.lines[3:]} == {
        "half": (None, "incomplete", "seed 1 missing"),
        "fewer": (None, "incomplete", "6 of 16 units missing"),
        "blind": (None, "incomplete", "2 samples without a value"),
    }


def test_a_line_that_lacks_samples_of_a_unit_is_not_ranked(suite: Path) -> None:
    part = [row for row in ism(0.01, "p").rows if (row.sample, row.cluster) != ("2", "s3")]
    for seed in (0, 1):
        add(suite, cell(record("defense", "part"), seed), mean_of("ism", part, False))
    found = line(board(suite), "part")
    assert (found.rank, found.status, found.reason) == (None, "incomplete", "2 of 48 samples missing")


def test_a_sample_that_nobody_can_have_is_nobodys_gap(suite: Path) -> None:
    """A photo without a face scores nobody, so it must not keep everybody from a rank."""
    faceless = [Row("blank", f"s{s}", None, "no face in the photo") for s in (0, 1)]
    for seed in (0, 1):
        for defense, mean in ((NONE, 0.5), (NOISE, 0.5), (SHIELD, 0.3)):
            rows = [*ism(mean, f"{defense.name}{seed}").rows, *faceless]
            add(suite, cell(defense, seed), mean_of("ism", rows, False))
    assert [(x.label, x.rank) for x in board(suite).lines] == [("shield", 1), ("noise", 2), ("none", 2)]
    lost = record("defense", "lost")
    for seed in (0, 1):
        nothing = Measurement("ism", None, 2, "", False, reason="no face in the photo", rows=tuple(faceless))
        add(suite, cell(lost, seed), nothing)
    assert line(board(suite), "lost").status == "incomplete", "no value at all is a gap"


def test_what_is_the_same_for_every_line_is_said_once(suite: Path) -> None:
    def photos(value: float) -> Measurement:
        return mean_of("niqe_photos", [Row(f"{i}", f"s{i}", value + i) for i in range(4)], None, "distance")

    def pages(*values: float) -> str:
        for defense, value in zip((NONE, NOISE, SHIELD), values, strict=True):
            for seed in (0, 1):
                add(suite, cell(defense, seed), ism(0.5, f"{defense.name}{seed}"), photos(value),
                    mean_of("ssim", [Row(f"{i}", f"s{i}", 0.5) for i in range(4)], True))
        write_boards(suite)
        return (suite / "leaderboard.md").read_text()

    same, other = pages(2.0, 2.0, 2.0), pages(2.0, 2.0, 2.5)
    assert "**The same for every line**" in same and "| niqe\\_photos (distance) | 3.50 [" in same
    assert "| defense | ssim ↑ |" in same, "what has a direction is every line's own, though all are equal"
    assert "The same for every line" not in other and "| defense | niqe\\_photos (distance) | ssim ↑ |" in other


def test_na_and_failed_lines_say_why(suite: Path) -> None:
    add(suite, cell(record("defense", "tuner")), status="n/a", reason="acts on models", measurements=[])
    error = ErrorRecord(type="RuntimeError", message="out of memory\nat line 3")
    add(suite, cell(record("defense", "heavy")), status="failed", error=error, measurements=[])
    add(suite, cell(record("defense", "shaky"), 0), ism(0.1))
    add(suite, cell(record("defense", "shaky"), 1), status="failed", error=error, measurements=[])
    table = board(suite)
    assert (line(table, "tuner").status, line(table, "tuner").reason) == ("n/a", "acts on models")
    assert line(table, "heavy").reason == "seed 0 failed: RuntimeError: out of memory"
    assert line(table, "shaky").status == "incomplete"
    assert "seed 1 failed" in line(table, "shaky").reason
    assert {line(table, x).rank for x in ("tuner", "heavy", "shaky")} == {None}


def test_values_without_rows_are_pooled_over_seeds(suite: Path) -> None:
    for seed in (0, 1, 2):
        add(suite, cell(SHIELD, seed), ism(0.3, f"c{seed}"), Measurement("fid", 80.0 + seed, 256, "", None, 70, 95))
    score = line(board(suite), "shield").scores["fid"]
    assert (score.value, score.n, score.units) == (81.0, 768, 3)
    half = 4.30265 / 3**0.5  # Student's t with two degrees of freedom; the values' standard deviation is 1
    assert (score.low, score.high) == pytest.approx((81 - half, 81 + half), abs=1e-4)


def test_a_value_that_is_not_the_mean_of_its_rows_stays_what_it_is(tmp_path: Path) -> None:
    largest = Measurement("linf", 16.0, 2, "levels", False, rows=(Row("a", "s", 16.0), Row("b", "s", 2.0)))
    add(tmp_path, cell(SHIELD), ism(0.3), largest)
    assert line(board(tmp_path), "shield").scores["linf"].value == 16.0


def test_backdoors_are_units_by_seed(tmp_path: Path) -> None:
    for defense in (NONE, SHIELD):
        for seed in range(3):
            rows = [Row(str(i), "implant", float(defense is NONE)) for i in range(10)]
            add(tmp_path, cell(defense, seed, track="backdoor"), mean_of("asr", rows, False, "share"))
    table = board(tmp_path)
    assert line(table, "shield").scores["asr"].units == 3
    assert line(table, "none").scores["asr"].low < 1.0
    assert [(x.label, x.rank) for x in table.lines] == [("shield", 1), ("none", 2)]


def test_controls_that_leave_the_same_pictures_are_compared_with_once(tmp_path: Path) -> None:
    """A test of inputs leaves a model as it was; three columns of the same differences would only triple the number of
    comparisons that Holm's correction divides by."""
    probe = record("defense", "a_probe", facts={"control": True, "acts_on": "model"})
    for seed in (0, 1):
        for defense, mean, picture in ((NONE, 0.5, "p"), (probe, 0.5, "p"), (NOISE, 0.5, "q"), (SHIELD, 0.3, "r")):
            own = {"repair": f"own {defense.name}", "sample": f"{picture}{seed}", "score_inputs": f"too {defense.name}"}
            add(tmp_path, cell(defense, seed), ism(mean, f"{picture}{seed}"), artefacts=own)
    table = board(tmp_path)
    assert table.controls == ("none", "noise")
    assert [x.control for x in line(table, "shield").deltas["ism"]] == ["none", "noise"]
    assert table.power is not None and table.power.comparisons == 2
    assert line(table, "a_probe").deltas["ism"][0].difference.value == 0
    assert "Δ none is Δ a_probe as well: what they leave is the very same." in table.notes


def test_controls_are_of_the_same_budget(tmp_path: Path) -> None:
    weak = record("defense", "noise", facts={"control": True}, eps=4.0)
    for defense, mean in ((NONE, 0.5), (NOISE, 0.45), (weak, 0.5), (SHIELD, 0.3), (
            record("defense", "shield", eps=4.0), 0.4), (record("defense", "shield", eps=2.0), 0.4)):
        add(tmp_path, cell(defense), ism(mean, sd=0.0))
    table = board(tmp_path)
    assert {x.label for x in table.lines} == {
        "none", "noise eps=16.0", "noise eps=4.0", "shield eps=16.0", "shield eps=4.0", "shield eps=2.0"}
    noise = {x.label: [round(d.difference.value, 6) for d in x.deltas["ism"] if d.control == "noise"]
             for x in table.lines if x.name == "shield"}
    assert noise == {"shield eps=16.0": [-0.15], "shield eps=4.0": [-0.1], "shield eps=2.0": []}


def test_only_a_change_of_images_is_a_budget(tmp_path: Path) -> None:
    """Adversarial neuron pruning calls the size of its perturbation of channels eps, too."""
    prune = record("defense", "prune", facts={"acts_on": "model"}, eps=0.4)
    for defense in (NONE, NOISE, prune, record("defense", "shield", facts={"acts_on": "images"}, eps=4.0)):
        add(tmp_path, cell(defense), ism(0.5, sd=0.0))
    assert {x.label: x.eps for x in board(tmp_path).lines} == {"none": None, "noise": 16, "prune": None, "shield": 4}


def test_missing_numbers_carry_their_reason(suite: Path) -> None:
    add(suite, cell(SHIELD, 0), ism(0.3, "c0"), Measurement("kid", None, 0, "", None, reason="needs 50 images"))
    table = board(suite)
    assert "kid of shield: needs 50 images" in table.notes
    assert "kid of noise, none: not measured" in table.notes


def test_what_has_no_value_makes_no_column_and_is_told_once_per_reason(suite: Path) -> None:
    """Its protocol says little where nothing was measured: here no count of the inputs that another defense scored."""
    def detection(value: float | None, **protocol: Any) -> list[Measurement]:
        return [Measurement(name, value, 0 if value is None else 1, "share", True,
                            reason="it scores no inputs" if value is None else "", protocol=protocol)
                for name in ("auroc", "tpr")]

    add(suite, cell(SHIELD, 0), ism(0.3, "c0"), *detection(0.9, inputs=128))
    add(suite, cell(NONE, 2), ism(0.3, "c0"), *detection(None))
    table = board(suite)
    assert [column.name for column in table.columns][-2:] == ["auroc", "tpr"]
    assert line(table, "shield").scores["auroc"].value == 0.9
    assert sorted(note for note in table.notes if "auroc" in note) == [
        "auroc, tpr of noise: not measured", "auroc, tpr of none: it scores no inputs"]


def test_names_are_text(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "<script>alert(1)</script>|x [red]\x1b[2J**b**"
    for seed in (0, 1):
        add(suite, cell(record("defense", "evil", name).model_copy(update={"name": "evil"}), seed,
                        id=f"evil{seed}"), ism(0.4, "e"))
    add(suite, cell(record("defense", "bad"), id="bad"), status="n/a", reason="a|b <img src=x>\nnext", measurements=[])
    write_boards(suite)
    text = (suite / "leaderboard.md").read_text()
    assert "<script>" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|x \\[red\\]" in text
    assert "\\*\\*b\\*\\*" in text
    rows = [x.replace("\\|", "") for x in text.splitlines() if x.startswith("|")]
    assert {x.count("|") for x in rows} == {4, 10}
    print_boards(read_boards(suite), width=100)
    out = capsys.readouterr().out
    assert "[red]" in out.replace("\n", "")
    assert "\x1b[2J" not in text + out


def test_the_page_reads_well(suite: Path) -> None:
    write_boards(suite)
    text = (suite / "leaderboard.md").read_text()
    assert text.startswith(f"# Leaderboard: quick\n\n**{STAMP}**\n\n6 cells: 6 ok\n")
    header = next(x for x in text.splitlines() if x.startswith("| rank"))
    assert header == "| rank | defense | ε | ism ↓ | Δ none | Δ noise | P(best) | rank 95 % | cost |"
    shield = next(x for x in text.splitlines() if "| shield |" in x)
    assert shield.startswith("| 1 | shield | 16 | 0.6")
    assert "**" in shield.replace("\\*", "*")
    assert shield.endswith("| 5.0 s |")
    assert "| 2= | none *(control)* |" in text


@pytest.mark.parametrize("width", [80, 100, 110, 200])
def test_the_terminal_is_never_wider_than_asked(suite: Path, capsys: pytest.CaptureFixture[str], width: int) -> None:
    extra = [mean_of(f"measurement_{i}", ism(i, "m").rows, True) for i in range(8)]
    for seed in (0, 1):
        add(suite, cell(record("defense", "a defense with quite a long label (described)"), seed), ism(0.4), *extra)
    print_boards(read_boards(suite), width=width)
    out = capsys.readouterr().out
    assert max(len(x) for x in out.splitlines()) <= min(width, 120)
    assert STAMP in out
    assert all(f"measurement_{i}" in out for i in range(8))


@pytest.mark.parametrize(("width", "apart"), [(80, True), (120, False)])
def test_differences_to_many_controls_get_room(
    suite: Path, capsys: pytest.CaptureFixture[str], width: int, apart: bool,
) -> None:
    """On a narrow terminal they stand below the ranking, whole, instead of breaking every word."""
    add(suite, cell(record("defense", "plain", facts={"control": True}, eps=16.0)), ism(0.5))
    print_boards(read_boards(suite), width=width)
    out = capsys.readouterr().out
    heads = [line.split() for line in out.splitlines() if "defense" in line and "Δ" in line]
    assert heads[0][0] == ("defense" if apart else "rank")
    assert [word for word in heads[0] if word in ("none", "noise", "plain")] == ["none", "noise", "plain"]


def test_the_same_bytes_again_and_in_any_order(suite: Path, tmp_path: Path) -> None:
    def written(folder: Path) -> list[bytes]:
        write_boards(folder)
        return [(folder / f"leaderboard.{kind}").read_bytes() for kind in ("md", "csv", "json")]

    first = written(suite)
    assert written(suite) == first
    again = tmp_path / "elsewhere" / "quick"
    again.mkdir(parents=True)
    for i, path in enumerate(sorted(suite.glob("*/result.json"), reverse=True)):
        path.parent.rename(again / f"cell{i}")
    assert written(again) == first


def test_csv_and_json_hold_what_the_page_shows(suite: Path) -> None:
    boards = write_boards(suite)
    rows = list(csv.DictReader(io.StringIO((suite / "leaderboard.csv").read_text())))
    shield = next(r for r in rows if r["defense"] == "shield" and r["control_name"] == "none")
    found = line(boards.tables[0], "shield")
    assert float(shield["value"]) == pytest.approx(found.scores["ism"].value, rel=1e-5)
    assert float(shield["difference"]) == pytest.approx(found.deltas["ism"][0].difference.value, rel=1e-5)
    assert (shield["rank"], shield["mark"], shield["better"]) == ("1", "**", "lower")
    data = json.loads((suite / "leaderboard.json").read_text())
    assert data["stamps"] == [STAMP]
    assert data["tables"][0]["lines"][0]["label"] == "shield"


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "result.json").write_text("{"),
    lambda folder: (folder / "samples.jsonl").write_text(""),
])
def test_a_corrupt_cell_is_left_out_and_named(suite: Path, damage: Callable[[Path], None]) -> None:
    folder = sorted(suite.glob("none*"))[0]
    damage(folder)
    boards = write_boards(suite)
    assert len(boards.notes) == 1
    assert folder.name in boards.notes[0]
    assert str(suite) not in (suite / "leaderboard.md").read_text()
    assert boards.counts == {"ok": 5}


def test_texts_survive_the_data_files(tmp_path: Path) -> None:
    """Commas, quotes and line breaks; what a spreadsheet would run is text; numbers keep six digits."""
    name = 'a,"b"\r\nc \x7f ünï'
    for defense, mean in ((NONE, 2 / 3), (record("defense", name), 1 / 3), (record("defense", "=cmd()"), 123456.789)):
        add(tmp_path / "quick", cell(defense, id=str(mean)),
            mean_of("psnr", [Row("x", str(i), mean) for i in range(4)], True, "dB"))
    boards = write_boards(tmp_path / "quick")
    text = (tmp_path / "quick/leaderboard.csv").read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    values = {row["defense"]: row["value"] for row in rows}
    assert values == {"none": "0.666667", name: "0.333333", "'=cmd()": "123457.0"}
    data = json.loads((tmp_path / "quick/leaderboard.json").read_text())
    assert {x["label"] for x in data["tables"][0]["lines"]} == {x.label for x in boards.tables[0].lines}
    assert line(boards.tables[0], name).scores["psnr"].value == pytest.approx(1 / 3, abs=1e-6)
    assert {x["scores"]["psnr"]["value"] for x in data["tables"][0]["lines"]} == {0.666667, 0.333333, 123457.0}
    assert data["tables"][0]["switches"] == [] and data["tables"][0]["matrix"] is None


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        json_text({"value": float("nan")})


def test_garbage_is_collected_again_after_boards(suite: Path) -> None:
    write_boards(suite)
    assert gc.isenabled()
    with pytest.raises(BenchError):
        read_boards(suite / "nowhere")
    assert gc.isenabled()


def test_without_results_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no results"):
        write_boards(tmp_path)
    with pytest.raises(BenchError, match="no suite"):
        write_boards(tmp_path / "nowhere")


REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "customization"


def copies(folder: Path, total: int) -> None:
    """Real cells, again and again, each time on what says that it is another model."""
    found = [json.loads(path.read_text()) | {"images": []} for path in sorted(REFERENCE.glob("*/result.json"))]
    rows = [path.read_bytes() for path in sorted(REFERENCE.glob("*/samples.jsonl"))]
    for place in range(total):
        turn, which = divmod(place, len(found))
        result = json.loads(json.dumps(found[which]))
        result["cell"]["id"] = f"{turn:04x}{result['cell']['id'][4:]}"
        result["cell"]["model"]["digest"] = f"{turn:04x}{result['cell']['model']['digest'][4:]}"
        for measured in result["measurements"]:
            measured["protocol_hash"] = f"{turn:04x}{measured['protocol_hash'][4:]}"
        cell = folder / f"{turn:04x}{which:04x}"
        cell.mkdir(parents=True)
        (cell / "result.json").write_text(json.dumps(result))
        (cell / "samples.jsonl").write_bytes(rows[which])


MANY = pytest.param(10_000, 30, marks=pytest.mark.slow)


@pytest.mark.parametrize(("records", "seconds"), [(500, 6), MANY])
def test_thousands_of_records_in_seconds_and_without_torch(tmp_path: Path, records: int, seconds: float) -> None:
    copies(tmp_path, records)
    code = ("import sys, pathlib, time; from bench.leaderboard import write_boards; t = time.process_time(); "
            "b = write_boards(pathlib.Path(sys.argv[1])); "
            "print(time.process_time() - t, sum(b.counts.values()), len(b.notes), 'torch' in sys.modules)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True,
                          text=True, check=True)
    spent, cells, notes, torch = done.stdout.split()
    assert (cells, notes, torch) == (str(records), "0", "False")
    assert float(spent) < seconds, f"{spent} s of processor time for {records} records"
