"""Whole backdoor cells with a defense that reports: the secret stays sealed, the report reaches the result."""

from pathlib import Path
from typing import Any

from attacks.baddiffusion import BadDiffusion
from attacks.purifier_none import NoPurifier
from bench.config import Cell, Settings, Tracker
from bench.data.micro_portraits import MicroPortraits
from bench.diffusion.checkpoints import resolve
from bench.protocols import BackdoorProtocol
from bench.results import Result
from bench.runner import run_cell
from bench.testing.pipelines import save_ddpm
from defenses.diff_cleanse import DiffCleanse
from defenses.none import NoDefense
from defenses.prune_random import PruneRandom
from metrics.defense_report import DefenseReport

REPAIR: dict[str, Any] = {"synthetic_images": 4, "synthetic_steps": 2, "steps": 1, "batch": 2, "ratio": 0.3}
SEARCH: dict[str, Any] = {"iterations": 2, "noises": 3, "sampling_steps": 2, "prune_batch": 2}


def run(model: Path, defense: Any, folder: Path) -> Result:
    known = resolve(str(model))
    cell = Cell(
        id="b" * 16, suite="test", track="backdoor", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=MicroPortraits(train=4, held_out=2, size=16),
        defense=defense, purifier=NoPurifier(), attack=BadDiffusion(steps=1, batch=2, trigger_size=6),
        protocol=BackdoorProtocol(samples=2, steps=2), metrics={"defense_report": DefenseReport()},
    )
    result = run_cell(cell, Settings(folder / "results", folder / "store", "cpu", 1, Tracker(wandb="disabled")))
    assert result.status == "ok", result.error
    return result


def test_reports_reach_the_result_and_secrets_only_who_declares_them(tmp_path: Path) -> None:
    model = save_ddpm(tmp_path / "ddpm", size=16)
    silent = run(model, NoDefense(), tmp_path)
    assert silent.measurement("model_flagged").value is None and silent.measurement("model_flagged").reason

    blind = run(model, DiffCleanse(always=True, **SEARCH, **REPAIR), tmp_path)
    assert blind.measurement("model_flagged").value in (0, 1)
    assert -1 <= (blind.measurement("trigger_cosine").value or 2) < 1
    removed = blind.measurement("removed_share").value
    assert removed is not None and 0 < removed < 0.5

    told = run(model, DiffCleanse(trigger="known", **REPAIR), tmp_path)
    assert told.measurement("model_flagged").value is None and told.measurement("removed_share").value
    chance = run(model, PruneRandom(**REPAIR), tmp_path)
    assert chance.measurement("removed_share").value == removed

    drawn = [path for path in (tmp_path / "store/synthetic_images").iterdir() if path.is_dir() and path.name[0] != "."]
    assert len(drawn) == 1, "all repair on the same synthetic images of the suspicious model"


def test_a_model_found_clean_is_sampled_once_and_its_verdict_is_kept(tmp_path: Path) -> None:
    model = save_ddpm(tmp_path / "ddpm", size=16)
    found = run(model, DiffCleanse(similarity=0.9999999, **SEARCH, **REPAIR), tmp_path)
    assert found.measurement("model_flagged").value == 0 and found.measurement("removed_share").value == 0
    reused = [stage.reused for stage in found.cost if stage.stage == "sample"]
    assert reused[-2:] == [True, True]
