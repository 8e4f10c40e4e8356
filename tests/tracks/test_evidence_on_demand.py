"""Whole backdoor cells: what is drawn only when a metric asks, a control without a backdoor, and what lies on disk."""

import ast
from pathlib import Path
from typing import Any

import pytest

from attacks.baddiffusion import BadDiffusion
from attacks.clean_finetune import CleanFinetune
from attacks.purifier_none import NoPurifier
from bench.config import Cell, Settings, Tracker
from bench.data.micro_portraits import MicroPortraits
from bench.diffusion.checkpoints import resolve
from bench.protocols import BackdoorProtocol
from bench.results import Result
from bench.runner import run_cell
from bench.testing.pipelines import save_ddpm
from defenses.diff_cleanse import DiffCleanse
from defenses.finetune import FineTune
from defenses.noise_probe import NoiseProbe
from defenses.none import NoDefense
from metrics.asr import AttackSuccess
from metrics.defense_report import DefenseReport
from metrics.induced_asr import InducedAsr

ROOT = Path(__file__).parents[2]
SEARCH: dict[str, Any] = {"iterations": 2, "noises": 3, "sampling_steps": 2, "prune_batch": 2, "synthetic_images": 4,
                          "synthetic_steps": 2, "steps": 1, "batch": 2, "ratio": 0.3}
TRAIN: dict[str, Any] = {"steps": 1, "batch": 2, "trigger_size": 6}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_ddpm(tmp_path / "ddpm", size=16)


def run(model: Path, folder: Path, defense: Any, *metrics: Any, attack: Any = None) -> Result:
    known = resolve(str(model))
    cell = Cell(
        id="b" * 16, suite="test", track="backdoor", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=MicroPortraits(train=4, held_out=2, size=16),
        defense=defense, purifier=NoPurifier(), attack=attack or BadDiffusion(**TRAIN),
        protocol=BackdoorProtocol(samples=2, steps=2), metrics={m.__plugin__.name: m for m in metrics},
    )
    result = run_cell(cell, Settings(folder / "results", folder / "store", "cpu", 1, Tracker(wandb="disabled")))
    assert result.status == "ok", result.error
    return result


def drawn(folder: Path) -> int:
    return len(list((folder / "store/sample").glob("[0-9a-f]*")))


def test_samples_with_the_inverted_trigger_are_drawn_when_a_metric_asks_and_only_then(
    model: Path, tmp_path: Path,
) -> None:
    run(model, tmp_path, DiffCleanse(always=True, **SEARCH), DefenseReport())
    before = drawn(tmp_path)
    found = run(model, tmp_path, DiffCleanse(always=True, **SEARCH), DefenseReport(), InducedAsr())
    assert drawn(tmp_path) == before + 1
    assert found.measurement("induced_asr").value in (0, 0.5, 1) and found.measurement("induced_asr").n == 2
    silent = run(model, tmp_path, NoDefense(), InducedAsr())
    assert silent.measurement("induced_asr").value is None
    assert "no trigger" in silent.measurement("induced_asr").reason and drawn(tmp_path) == before + 1


def test_a_model_without_a_backdoor_goes_through_the_whole_track(model: Path, tmp_path: Path) -> None:
    attack = CleanFinetune(**TRAIN)
    found = run(model, tmp_path, NoiseProbe(noises=3, steps=2), AttackSuccess(), DefenseReport(), attack=attack)
    assert found.cell.attack.facts["control"] is True
    assert found.measurement("model_score").value is not None and found.measurement("asr").value == 0
    assert [s.reused for s in found.cost if s.stage == "sample"][-2:] == [True, True], "the model is as it was"


def test_every_artefact_of_a_cell_is_safetensors_json_or_png(model: Path, tmp_path: Path) -> None:
    for defense in (DiffCleanse(always=True, **SEARCH), FineTune(steps=1, batch=2)):
        run(model, tmp_path, defense, AttackSuccess(), DefenseReport(), InducedAsr())
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and "locks" not in path.parts]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".png"}
    assert sum(path.suffix == ".safetensors" for path in files) >= 4
    for path in files:
        start = path.read_bytes()[:2]
        assert start not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), f"{path} is a pickle"


def test_no_code_writes_a_pickle() -> None:
    """torch.save, pickle.dump and their kin are called nowhere, save for scratch of the embedded models' training."""
    writers = {("torch", "save"), ("pickle", "dump"), ("pickle", "dumps"), ("joblib", "dump")}
    for path in [p for part in ("bench", "attacks", "defenses", "metrics") for p in (ROOT / part).rglob("*.py")]:
        if path.is_relative_to(ROOT / "bench/micro/train"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in writers, f"{path.name}:{node.lineno}"
