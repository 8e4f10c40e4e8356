"""The root config, and the identity of the cell that it describes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.config import Cell, Config, build, cell_id, config_folder, root_of, settings
from bench.errors import BenchError
from bench.protocols import BackdoorProtocol, CustomizationProtocol, EditingProtocol
from tests.conftest import Compose

EDITING = ("attack=sdedit", "data=micro_edits")
GOLDEN = "a32b2e6bfb53d963"
"""The id of the fake cell. If it changes, every stored result loses its name: raise SCHEMA_VERSION, then mend this."""


def cell_of(compose: Compose, *words: str) -> Cell:
    cfg = compose(words)
    return build(cfg, {k: str(v) for k, v in cfg.hydra.runtime.choices.items()}, tuple(words))


def test_the_id_of_a_cell_never_changes_by_itself(compose: Compose) -> None:
    assert cell_of(compose, "defense=fake_shield", "purifier=fake_wash").id == GOLDEN


def test_the_id_is_the_same_in_another_process_with_another_hash_seed(compose: Compose) -> None:
    script = ("from tests.fakes import *\nfrom bench.config import *\nfrom bench.protocols import *\n"
              "cell = Cell('', 'x', 'customization', 'text', 'digest-of-text', frozenset({'b', 'a'}), False, 0, "
              "FakePeople(), FakeShield(), FakeWash(), FakeAttack(), CustomizationProtocol(), {})\n"
              "print(cell_id(cell))")
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True)
        assert done.stdout.strip() == GOLDEN


@pytest.mark.parametrize("word", [
    "seed=1", "model=plain", "defense=fake_shield", "purifier=fake_wash", "attack.steps=11", "data.count=3",
    "customization.steps=26", "customization.prompts=['{token}']", "customization.clean_share=0.25",
])
def test_what_changes_a_result_changes_the_id(compose: Compose, word: str) -> None:
    assert cell_of(compose, word).id != cell_of(compose).id


@pytest.mark.parametrize("word", [
    "device=cuda", "threads=2", "workers=7", "results=/elsewhere", "store=/elsewhere", "tracker.wandb=disabled",
    "metrics=[]", "metrics.fake_score.n=9", "backdoor.steps=5", "suite=other", "mode=force", "stamp=x",
    "attack.steps=10", "customization.clean_share=0", "surrogate=", "surrogate=text", "surrogate=other",
])
def test_what_does_not_change_a_result_leaves_the_id(compose: Compose, word: str) -> None:
    assert cell_of(compose, word).id == cell_of(compose).id


def test_a_surrogate_is_part_of_a_cell_whose_defense_looks_at_it(compose: Compose) -> None:
    plain = cell_of(compose, "defense=fake_optimiser")
    moved = cell_of(compose, "defense=fake_optimiser", "surrogate=other")
    assert (moved.surrogate, moved.surrogate_digest) == ("other", "digest-of-other")
    assert moved.surrogate_capabilities == {"text_to_image", "text_encoder"}
    assert moved.model_digest == plain.model_digest
    assert moved.id not in (plain.id, cell_of(compose, "defense=fake_optimiser", "model=other").id)
    assert moved.title().startswith("fake_optimiser on other · ")
    assert cell_of(compose, "defense=fake_optimiser", "surrogate=text") == replace(
        plain, overrides=("defense=fake_optimiser", "surrogate=text"))
    blind = cell_of(compose, "defense=fake_shield", "surrogate=other")
    assert (blind.id, blind.surrogate) == (cell_of(compose, "defense=fake_shield").id, "")


def test_a_plugins_version_and_a_models_digest_are_in_the_id(compose: Compose) -> None:
    cell = cell_of(compose)
    assert cell_id(replace(cell, model_digest="other")) != cell.id
    facts = type(cell.attack).__plugin__
    type(cell.attack).__plugin__ = replace(facts, version=2)
    try:
        assert cell_id(cell) != cell.id
    finally:
        type(cell.attack).__plugin__ = facts


def test_a_cell_holds_plugin_instances_and_the_protocol_of_its_track(compose: Compose) -> None:
    cell = cell_of(compose, "defense=fake_shield", "defense.eps=8", "customization.per_prompt=2", "seed=3")
    assert (cell.defense.eps, cell.attack.steps, cell.seed, cell.track) == (8.0, 10, 3, "customization")
    assert cell.protocol == CustomizationProtocol(per_prompt=2)
    other = cell_of(compose, "attack=fake_implant", "model=plain", "data=fake_pictures", "backdoor.samples=9")
    assert other.protocol == BackdoorProtocol(samples=9)
    edits = cell_of(compose, *EDITING, "editing.seeds=3", "editing.told=false")
    assert (edits.track, edits.protocol) == ("editing", EditingProtocol(seeds=3, told=False))


@pytest.mark.parametrize("word", [
    "editing.told=false", "editing.seeds=3", "editing.steps=9", "attack.strength=0.4", "data.count=3",
    "editing.judge=other", "data.start=7",
])
def test_what_changes_an_edit_changes_the_id(compose: Compose, word: str) -> None:
    assert cell_of(compose, *EDITING, word).id != cell_of(compose, *EDITING).id
    assert cell_of(compose, *EDITING, "customization.steps=9").id == cell_of(compose, *EDITING).id


def test_labels_name_the_choice_the_variant_and_what_was_changed_by_hand(compose: Compose) -> None:
    cell = cell_of(compose, "defense=fake_shield", "defense.eps=8")
    assert cell.labels["defense"] == "fake_shield eps=8"
    assert cell.title().startswith("fake_shield eps=8 (described) · fake_attack · text · seed 0")


def test_metrics_of_another_track_are_left_out_with_a_reason(compose: Compose) -> None:
    cell = cell_of(compose, "attack=fake_implant")
    assert cell.metrics == {}
    assert cell.skipped == {"fake_score": "fake_score scores the customization track, not backdoor"}


def test_without_a_choice_every_metric_of_the_track_is_measured(compose: Compose) -> None:
    chosen = cell_of(compose, "metrics=[]").metrics
    assert "fake_score" in chosen
    assert len(chosen) > 1


@pytest.mark.parametrize(("words", "said"), [
    (["defense=fake_shield", "defense.eps=300"], r"defense.eps=300.0 is out of range"),
    (["customization.steps=0"], r"customization.steps=0 is out of range; give 1 to 1000"),
    (["customization.prompts=['a photo']"], r"'a photo' must contain \{token\}"),
    (["customization.prompts=['{token} {x}']"], r"no other braces"),
    (["customization.prompts=[]"], r"customization.prompts is empty"),
    (["customization.sampler=euler"], r"unknown sampler 'euler'"),
    (["backdoor.samples=1"], r"backdoor.samples=1 is out of range"),
    (["editing.seeds=1"], r"editing.seeds=1 is out of range; give 2 to 1000"),
    (["editing.sampler=euler"], r"editing.sampler: unknown sampler 'euler'"),
    (["seed=-1"], r"seed=-1 is out of range"),
    (["mode=forced"], r"mode: unknown value 'forced'. Did you mean force"),
    (["suite=../x"], r"suite: '../x' must be the plain name"),
    (["tracker.wandb=on"], r"tracker.wandb: unknown mode 'on'"),
    (["~attack"], r"attack: nothing chosen; give attack=<name>"),
    (["+defense.nothing=1"], r"defense: unknown option 'nothing'"),
    (["model=nowhere"], r"unknown checkpoint 'nowhere'"),
    (["defense=fake_optimiser", "surrogate=nowhere"], r"unknown checkpoint 'nowhere'"),
    (["customization.clean_share=0.8"], r"customization.clean_share=0.8 is out of range; give 0 to 0.75"),
])
def test_bad_values_are_one_clear_error(compose: Compose, words: list[str], said: str) -> None:
    with pytest.raises(BenchError, match=said):
        cell_of(compose, *words)


def test_the_primary_config_and_the_schema_agree(compose: Compose) -> None:
    root = root_of(compose([]))
    defaults = Config()
    for name in ("suite", "stamp", "seed", "device", "threads", "workers", "time_limit", "on_error", "mode", "tracker"):
        assert getattr(root, name) == getattr(defaults, name), name


def test_settings_are_absolute_and_come_from_the_environment(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path / "r"))
    how = settings(compose(["device=cpu"]))
    assert (how.results, how.device, how.store.is_absolute()) == (tmp_path / "r", "cpu", True)


def test_every_preset_and_suite_has_a_name_of_its_own_and_composes(compose: Compose) -> None:
    from omegaconf import OmegaConf

    from bench.plugin import GROUPS, KINDS, REGISTRY

    for kind in KINDS:
        group = GROUPS.get(kind, kind)
        for file in (config_folder() / group).glob("*.yaml"):
            assert file.stem not in REGISTRY.names(kind), f"{file} has the name of a plugin"
            chosen = compose([f"{group}={file.stem}"])[group]
            assert hasattr(OmegaConf.to_object(chosen), "__plugin__")
