"""Leaving cells out of a suite and adding to it from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cli import run
from bench.errors import BenchError
from bench.suites import Suite, extended, kept, read_words

POINTS = [["attack=a", "defense=x"], ["attack=a", "defense=y", "defense.eps=4"],
          ["attack=b", "defense=x", "purifier=jpeg", "metrics=[ism,fid]"]]


def planned(folder: Path, *words: str) -> dict[str, dict[str, str]]:
    """Cell id -> its line of the plan that a grid wrote."""
    from bench import planner, sweeper

    lines: list[dict[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeper.terminal, "show_plan", lambda found: lines.extend(planner._line(p) for p in found))
        assert run(["plan", "-m", *words, f"results={folder}"]) == 0
    return {line["cell"]: line for line in lines}


def test_only_keeps_points_with_the_value_or_whose_default_it_is() -> None:
    assert kept(POINTS, read_words(["only.attack=a"]), {}) == POINTS[:2]
    assert kept(POINTS, read_words(["only.purifier=none"]), {"purifier": "none"}) == POINTS[:2]
    assert kept(POINTS, read_words(["only.attack=a,b", "only.defense=x"]), {}) == [POINTS[0], POINTS[2]]
    with pytest.raises(BenchError, match=r"only\.attack: unknown choice 'c'.* Valid: a, b\."):
        kept(POINTS, read_words(["only.attack=c"]), {})


def test_also_adds_a_choice_without_the_options_of_the_one_it_stands_beside() -> None:
    found = extended(POINTS, read_words(["also.defense=mine", "also.defense.eps=8,16"]))
    assert found[:3] == POINTS
    assert found[3:] == [
        ["attack=a", "defense=mine", "defense.eps=8"], ["attack=a", "defense=mine", "defense.eps=16"],
        ["attack=b", "purifier=jpeg", "metrics=[ism,fid]", "defense=mine", "defense.eps=8"],
        ["attack=b", "purifier=jpeg", "metrics=[ism,fid]", "defense=mine", "defense.eps=16"]]


def test_two_additions_meet_each_other_and_metrics_join_the_list() -> None:
    both = extended(POINTS[:1], read_words(["also.defense=mine", "also.attack=other"]))
    assert sorted(map(sorted, both)) == sorted(
        [[f"attack={a}", f"defense={d}"] for a in ("a", "other") for d in ("mine", "x")])
    assert extended(POINTS[2:], read_words(["also.metrics=mine", "also.metrics.mine.n=3"])) == [
        ["attack=b", "defense=x", "purifier=jpeg", "metrics=[ism,fid,mine]", "metrics.mine.n=3"]]


def test_words_are_sorted_and_wrong_ones_refused() -> None:
    assert read_words(["seed=1", "+also.defense=mine", "only.seed=0"]) == Suite(
        ("seed=1",), {"seed": ["seed=0"]}, {"defense": ["defense=mine"]})
    with pytest.raises(BenchError, match=r"also: unknown key 'seed'.* Valid: attack, defense, metrics, purifier"):
        read_words(["also.seed=1"])
    with pytest.raises(BenchError, match=r"choose one, also\.defense=<name>"):
        read_words(["also.defense.eps=8"])


def test_a_suite_with_one_more_defense_keeps_its_own_cells(tmp_path: Path) -> None:
    before = planned(tmp_path, "experiment=quickstart")
    after = planned(tmp_path, "experiment=quickstart", "also.defense=photoguard_micro")
    assert {cell: after[cell] for cell in before} == before
    new = [line for cell, line in after.items() if cell not in before]
    assert sorted(line["title"] for line in new) == [
        f"photoguard_micro · {rest} · micro-sd-a · seed 0"
        for rest in ("dreambooth_quick", "inpaint_micro", "jpeg · zero_shot", "lora_brief", "zero_shot")]
    assert all(line["plan"] == "run" for line in new)


def test_a_part_of_a_suite_with_one_more_defense(tmp_path: Path) -> None:
    found = planned(tmp_path, "experiment=quickstart", "only.attack=zero_shot", "only.defense=none,noise",
                    "only.purifier=none", "also.defense=photoguard_micro")
    assert [line["title"].split(" · ")[0] for line in found.values()] == ["none", "noise", "photoguard_micro"]


def test_what_fits_nowhere_and_what_is_no_grid_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=quickstart", "only.attack=zero_shot", f"results={tmp_path}"]
    assert run(["plan", "-m", *words, "also.defense=elijah"]) == 2
    assert "also.defense=elijah fits no cell of this grid: elijah repairs models" in capsys.readouterr().err
    assert run(["defense=none", "attack=zero_shot", "also.defense=noise"]) == 2
    assert "also.defense=noise: changes a grid; add -m" in capsys.readouterr().err
