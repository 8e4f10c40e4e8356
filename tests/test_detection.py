"""Detection boards: rates, areas and thresholds against counting by hand, and what becomes of models without score."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from bench.detection import DetectionBoard, Detector, fewest, threshold
from bench.leaderboard import print_boards, read_boards, write_boards
from bench.records import Measurement
from bench.results import ErrorRecord, StageRecord
from bench.stats import auroc_of_groups, newcombe, wilson
from tests.test_leaderboard import add, cell, record

FINDER, PROBE = record("defense", "finder"), record("defense", "probe", facts={"control": True})
SILENT = record("defense", "silent")
HONEST = record("attack", "honest", facts={"control": True}, trigger="box")


def poison(rate: float = 0.5, target: str = "hat", name: str = "poison") -> Any:
    return record("attack", name, target=target, poison_rate=rate, trigger="box")


def put(folder: Path, defense: Any, attack: Any, seed: int, score: float | None, flagged: bool = False,
        asr: float | None = None, **fields: Any) -> None:
    where = cell(defense, seed, attack=attack, track="backdoor",
                 id=f"{defense.name}-{attack.name}-{sorted(attack.parameters.items())}-{seed}")
    silent = {"reason": "it gives no verdict"} if score is None else {}
    measured = [] if fields else [
        Measurement("asr@implanted", asr, 8 if asr is not None else 0, "share", None, reason="" if asr else "not run"),
        Measurement("model_score", score, 1, "own", None, **silent),
        Measurement("model_flagged", None if score is None else float(flagged), 1, "share", True, **silent)]
    add(folder, where, *measured, cost=[StageRecord(stage="repair", key="k", seconds=3.0)], **fields)


def population(folder: Path, defense: Any, clean: Iterable[float], bad: Iterable[float], attack: Any = None) -> None:
    """Clean models with seeds 0, 1, ...: every other one calibrates; then poisoned ones."""
    for seed, score in enumerate(clean):
        put(folder, defense, HONEST, seed, score, flagged=score > 0.5)
    for seed, score in enumerate(bad):
        put(folder, defense, attack or poison(), seed, score, flagged=score > 0.5, asr=0.9)


def board(folder: Path) -> DetectionBoard:
    found = read_boards(folder).detections
    assert len(found) == 1
    return found[0]


def of(table: DetectionBoard, label: str) -> Detector:
    return next(d for d in table.detectors if d.label == label)


def by_pairs(negatives: list[float], positives: list[float]) -> float:
    """The share of pairs that are in order, ties counting half, counted one by one."""
    won = 0.0
    for low in negatives:
        for high in positives:
            won += 1.0 if high > low else 0.5 if high == low else 0.0
    return won / (len(negatives) * len(positives))


def test_area_is_counted_over_pairs_with_ties() -> None:
    draw = random.Random(0)
    negatives, positives = ([round(draw.gauss(m, 1), 1) for _ in range(n)] for m, n in ((0, 23), (1, 17)))
    found = auroc_of_groups(negatives, positives)
    assert found.value == pytest.approx(by_pairs(negatives, positives))
    assert auroc_of_groups([-x for x in negatives], [-x for x in positives]).value == pytest.approx(1 - found.value)
    assert found.low < found.value < found.high and found.units == 40


def test_perfect_separation_is_no_certainty_and_more_models_are_surer() -> None:
    few, many = (auroc_of_groups([0.0] * n, [1.0] * n) for n in (10, 40))
    assert few.value == many.value == few.high == 1.0
    assert 0.7 < few.low < many.low < 0.99


def test_newcombes_interval_solves_its_equation() -> None:
    def variance(t: float, m: int, n: int) -> float:
        extra = (m + n) / 2 - 1
        return t * (1 - t) / (m * n) * (1 + extra * ((1 - t) / (2 - t) + t / (1 + t)))

    low, high = newcombe(0.8, 20, 35)
    for edge in (low, high):
        assert (0.8 - edge) ** 2 == pytest.approx(1.959964**2 * variance(edge, 20, 35), rel=1e-4)
    assert low < 0.8 < high


def test_the_interval_covers_the_true_area_about_as_often_as_it_says() -> None:
    """Two normals one standard deviation apart: the true area is Phi(1 / sqrt 2) = 0.760."""
    draw, hits = random.Random(1), 0
    for _ in range(120):
        low, high = newcombe(by_pairs([draw.gauss(0, 1) for _ in range(15)], [draw.gauss(1, 1) for _ in range(15)]),
                             15, 15)
        hits += low <= 0.7602 <= high
    assert hits >= 0.88 * 120


def test_a_new_clean_model_exceeds_the_threshold_as_rarely_as_aimed_at() -> None:
    draw, flagged, trials = random.Random(2), 0, 4000
    for _ in range(trials):
        *others, new = (draw.random() for _ in range(40))
        flagged += new > threshold(others)
    assert 0.03 < flagged / trials < 0.06
    assert threshold([3.0, 1.0, 2.0]) == 3.0, "too few to aim at 5 %: the largest"
    assert fewest() == 19


def test_rates_are_those_of_scored_models_at_a_threshold_from_others(tmp_path: Path) -> None:
    """Even seeds: 0.1, 0.3, 0.2 set the threshold 0.3. Odd ones: 0.25, 0.9, 0.05 are judged by it."""
    population(tmp_path, FINDER, [0.1, 0.25, 0.3, 0.9, 0.2, 0.05], [0.8, 0.31, 0.3, 0.2])
    found = of(board(tmp_path), "finder")
    assert found.threshold == 0.3 and (found.poisoned, found.clean, found.calibration) == (4, 3, 3)
    assert found.tpr.value == 0.5 and (found.tpr.low, found.tpr.high) == pytest.approx(wilson(2, 4))
    assert found.fpr.value == pytest.approx(1 / 3) and found.fpr.n == 3
    assert found.accuracy.value == pytest.approx(4 / 7)
    assert found.auroc.value == pytest.approx(by_pairs([0.25, 0.9, 0.05], [0.8, 0.31, 0.3, 0.2]))
    assert found.own_tpr.value == 0.25 and found.own_fpr.value == pytest.approx(1 / 3)
    assert found.seconds == 3.0


def test_scores_of_calibrating_models_change_nothing_but_the_threshold(tmp_path: Path) -> None:
    for name, high in (("a", 0.3), ("b", 99.0)):
        population(tmp_path / name, FINDER, [0.1, 0.25, high, 0.9], [0.8, 0.31])
    one, other = (of(board(tmp_path / name), "finder") for name in "ab")
    assert one.auroc == other.auroc and one.own_fpr == other.own_fpr
    assert one.tpr.value == 1 and other.tpr.value == 0


def test_mistakes_name_the_settings_in_which_attacks_differ(tmp_path: Path) -> None:
    population(tmp_path, FINDER, [0.1, 0.9, 0.3, 0.2], [0.8, 0.1, 0.2], poison(0.5))
    for seed, score in enumerate((0.2, 0.9)):
        put(tmp_path, FINDER, poison(0.1), seed, score, asr=0.4)
    put(tmp_path, FINDER, poison(name="other"), 7, 0.9)
    found = of(board(tmp_path), "finder")
    assert [(m.missed, m.setting, m.seeds, m.of) for m in found.mistakes] == [
        (True, "poison poison_rate=0.5", (1, 2), 3), (True, "poison poison_rate=0.1", (0,), 2),
        (False, "honest", (1,), 2)]
    assert found.mistakes[1].success == 0.4 and found.mistakes[2].success is None
    assert {name: score.value for name, score in found.by_attack.items()} == {"poison": 0.4, "other": 1.0}
    assert board(tmp_path).attacks == ("other", "poison")


def test_defenses_are_ordered_by_area_and_the_silent_stay_away(tmp_path: Path) -> None:
    population(tmp_path, PROBE, [0.1, 0.2, 0.3, 0.4], [0.15, 0.3])
    population(tmp_path, FINDER, [0.1, 0.2, 0.3, 0.4], [0.8, 0.9])
    put(tmp_path, SILENT, HONEST, 1, None)
    put(tmp_path, SILENT, poison(), 1, None)
    table = board(tmp_path)
    assert [d.label for d in table.detectors] == ["finder", "probe"]
    assert of(table, "probe").control and any("19 are needed" in note for note in table.notes)


def test_models_that_only_others_scored_are_said(tmp_path: Path) -> None:
    population(tmp_path, PROBE, [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7])
    population(tmp_path, FINDER, [0.1, 0.2, 0.3, 0.4], [0.9])
    put(tmp_path, FINDER, poison(), 1, None, status="failed", error=ErrorRecord(type="BenchError", message="no"))
    found = of(board(tmp_path), "finder")
    assert found.lacks == ("1 model without a score: failed: BenchError", "1 model without a score: no cell")
    assert any("finder: 1 model without a score" in note for note in board(tmp_path).notes)
    assert found.poisoned == 1 and of(board(tmp_path), "probe").lacks == ()


@pytest.mark.parametrize(("clean", "bad"), [([], [0.5, 0.6]), ([0.1, 0.2], [])])
def test_one_sort_of_models_is_no_population(tmp_path: Path, clean: list[float], bad: list[float]) -> None:
    population(tmp_path, FINDER, clean, bad)
    assert read_boards(tmp_path).detections == ()
    assert '"detections"' not in (write_boards(tmp_path), (tmp_path / "leaderboard.json").read_text())[1]


def test_it_leads_the_page_and_the_data_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    population(tmp_path, FINDER, [0.1, 0.9, 0.3, 0.2], [0.8, 0.1])
    boards = write_boards(tmp_path)
    page = (tmp_path / "leaderboard.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings[0] == "## backdoor: which models are poisoned? tiny" and len(headings) == 3
    assert "missed: poison" in page and "false alarm: honest" in page
    rows = [row for row in csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text()))
            if row["part"] == "detection"]
    values = {row["measurement"]: row["value"] for row in rows}
    assert float(values["tpr"]) == 0.5 and float(values["fpr"]) == 0.5 and values.keys() >= {"auroc", "own_tpr"}
    data = json.loads((tmp_path / "leaderboard.json").read_text())
    assert data["detections"][0]["detectors"][0]["threshold"] == 0.3
    print_boards(boards, width=120)
    assert "which models are poisoned" in capsys.readouterr().out


def test_the_same_population_gives_the_same_bytes(tmp_path: Path) -> None:
    def pages(order: Callable[[list[Any]], list[Any]], name: str) -> str:
        for place in order([(FINDER, 0), (PROBE, 1)]):
            population(tmp_path / name / "suite", place[0], [0.1, 0.9, 0.3, 0.2], [0.8, 0.1 + place[1]])
        write_boards(tmp_path / name / "suite")
        return (tmp_path / name / "suite/leaderboard.json").read_text()

    assert pages(list, "one") == pages(lambda x: x[::-1], "two")
