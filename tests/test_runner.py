"""Whole cells on tiny random models: stages shared, seeds paired, secrets sealed, failures recorded, bits repeated."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from attacks.baddiffusion import BadDiffusion
from attacks.dreambooth import DreamBooth
from attacks.purifier_none import NoPurifier
from bench.config import Cell, Settings, Tracker
from bench.data.micro_portraits import MicroPortraits
from bench.data.micro_subjects import MicroSubjects
from bench.diffusion.checkpoints import resolve
from bench.launcher import Pool
from bench.plugin import Facts
from bench.protocols import BackdoorProtocol, CustomizationProtocol
from bench.records import Budget
from bench.results import Result, read_result, read_rows
from bench.runner import run_cell
from bench.testing.pipelines import save_ddpm
from defenses.finetune import FineTune
from defenses.noise import SignNoise as Noise
from defenses.none import NoDefense
from metrics.asr import AttackSuccess
from metrics.image_quality import ImageQuality

QUIET = Tracker(wandb="disabled")


@pytest.fixture(scope="module")
def small_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DDPM for the smallest drawn portraits."""
    return save_ddpm(tmp_path_factory.mktemp("small") / "ddpm", size=16)


def settings(folder: Path, tracker: Tracker = QUIET) -> Settings:
    return Settings(folder / "results", folder / "store", "cpu", 1, tracker)


def customization(model: Path, defense: Any = None, **changes: Any) -> Cell:
    known = resolve(str(model))
    cell = Cell(
        id="c" * 16, suite="test", track="customization", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=MicroSubjects(count=3, size=16),
        defense=defense or NoDefense(), purifier=NoPurifier(),
        attack=DreamBooth(steps=1, class_images=1, class_steps=1, batch=1),
        protocol=CustomizationProtocol(per_prompt=1, steps=1), metrics={"image_quality": ImageQuality()},
    )
    return replace(cell, **changes)


def backdoor(model: Path, defense: Any = None) -> Cell:
    known = resolve(str(model))
    return Cell(
        id="b" * 16, suite="test", track="backdoor", model=str(model), model_digest=known.digest,
        capabilities=known.capabilities, allow_pickle=False, seed=0, data=MicroPortraits(train=8, held_out=4, size=16),
        defense=defense or NoDefense(), purifier=NoPurifier(), attack=BadDiffusion(steps=1, batch=2, trigger_size=6),
        protocol=BackdoorProtocol(samples=4, steps=20), metrics={"asr": AttackSuccess()},
    )


def stages(result: Result) -> dict[str, list[bool]]:
    """Stage -> whether each of its artefacts was there already."""
    found: dict[str, list[bool]] = {}
    for stage in result.cost:
        found.setdefault(stage.stage, []).append(stage.reused)
    return found


def fingerprint(store: Path, but: tuple[str, ...] = ("manifest.json",)) -> dict[str, str]:
    """Every artefact file's hash; manifests hold times."""
    files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.name not in but and "locks" not in p.parts]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_cell_runs_to_a_record_with_rows_and_pictures(tiny_sd: Path, tmp_path: Path) -> None:
    result = run_cell(customization(tiny_sd, Noise(eps=4)), settings(tmp_path))
    folder = tmp_path / "results/test" / ("c" * 16)
    assert result.status == "ok", result.error
    assert read_result(folder) == result
    assert result.measurement("linf").value == 4
    assert {row.cluster for row in read_rows(folder)} == {s.name for s in MicroSubjects(count=3, size=16).subjects()}
    assert len(list((folder / "images").glob("strip-*.png"))) == 2


def test_a_second_metric_and_a_second_run_train_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    first = run_cell(customization(tiny_sd, Noise(eps=4)), settings(tmp_path))
    assert not any(any(reused) for reused in stages(first).values())
    other = customization(tiny_sd, Noise(eps=4), metrics={"asr": AttackSuccess(), "image_quality": ImageQuality()})
    again = run_cell(replace(other, metrics={"image_quality": ImageQuality()}), settings(tmp_path))
    assert all(all(reused) for reused in stages(again).values())
    assert again.measurements == first.measurements


def test_defenses_meet_the_same_noise(tiny_sd: Path, tmp_path: Path) -> None:
    """Pairs: same class images, same seeds; a defense that changes nothing is the same attack as none."""
    plain = run_cell(customization(tiny_sd), settings(tmp_path))
    harmless = run_cell(customization(tiny_sd, Noise(eps=0), id="d" * 16), settings(tmp_path))
    assert all(stages(harmless)["customise"]), "photos are the same, so is the attack"
    assert plain.artefacts["generate"] == harmless.artefacts["generate"]
    run_cell(customization(tiny_sd, Noise(eps=8), id="e" * 16), settings(tmp_path))
    assert len(list((tmp_path / "store/class_images").glob("[0-9a-f]*"))) == 1


def test_the_same_seed_gives_the_same_bits_in_any_order(tiny_sd: Path, small_ddpm: Path, tmp_path: Path) -> None:
    cells = [customization(tiny_sd, Noise(eps=8)), backdoor(small_ddpm, FineTune(steps=1, batch=2))]
    for name, order in (("one", cells), ("two", cells[::-1])):
        for cell in order:
            assert run_cell(cell, settings(tmp_path / name)).status == "ok"
    assert fingerprint(tmp_path / "one/store") == fingerprint(tmp_path / "two/store")


def test_two_workers_give_the_bits_of_one(tiny_sd: Path, tmp_path: Path) -> None:
    cells = [customization(tiny_sd, Noise(eps=eps), id=f"{eps:016d}") for eps in (4, 8)]
    for workers in (1, 2):
        ended = Pool(settings(tmp_path / str(workers)), workers).run(cells, lambda ended, left: None)
        assert {one.status for one in ended} == {"ok"}
    assert fingerprint(tmp_path / "1/store") == fingerprint(tmp_path / "2/store")


def test_another_seed_gives_other_bits(tiny_sd: Path, tmp_path: Path) -> None:
    one = run_cell(customization(tiny_sd, Noise(eps=8)), settings(tmp_path))
    two = run_cell(customization(tiny_sd, Noise(eps=8), seed=1), settings(tmp_path))
    files = [next((tmp_path / "store/protect" / r.artefacts["protect"]).rglob("*.png")) for r in (one, two)]
    assert files[0].read_bytes() != files[1].read_bytes()


@dataclass
class Cheat:
    """Promises 2 levels and takes 30."""

    __plugin__ = Facts("defense", "cheat", ("customization",), acts_on="images")

    def budget(self) -> Budget:
        return Budget(2)

    def protect(self, subjects: Any, model: Any, ctx: Any) -> list[Any]:
        return [replace(s.published, pixels=255 - (255 - s.published.pixels.int() - 30).clamp(0, 255).byte())
                for s in subjects]


def test_photos_over_their_budget_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    result = run_cell(customization(tiny_sd, Cheat()), settings(tmp_path))
    assert result.status == "failed"
    assert "over their budget of 2" in result.error.message
    assert result.error.traceback == "", "one clear message, no trace"
    assert not list((tmp_path / "store").glob("protect/[0-9a-f]*")), "nothing invalid is stored"


@dataclass
class Clumsy:
    """Breaks."""

    __plugin__ = Facts("defense", "clumsy", ("customization",), acts_on="images")

    def budget(self) -> Budget:
        return Budget(2)

    def protect(self, subjects: Any, model: Any, ctx: Any) -> list[Any]:
        raise ZeroDivisionError("in the middle")


def test_a_cell_that_raises_is_a_failed_record_with_its_traceback(tiny_sd: Path, tmp_path: Path) -> None:
    result = run_cell(customization(tiny_sd, Clumsy()), settings(tmp_path))
    assert (result.status, result.error.type) == ("failed", "ZeroDivisionError")
    assert "in the middle" in result.error.traceback
    assert read_result(tmp_path / "results/test" / ("c" * 16)) == result


@dataclass
class Curious:
    """Writes down what it is told."""

    told = []
    knowing: bool = False

    @property
    def __plugin__(self) -> Facts:
        return Facts("defense", f"curious_{self.knowing}", ("backdoor",), acts_on="model",
                     knows=("trigger",) if self.knowing else ())

    def repair(self, suspicious: Any, data: Any, secret: Any, ctx: Any) -> Any:
        self.told.append(secret)
        return suspicious


def test_the_secret_is_sealed_unless_the_defense_declares_it(small_ddpm: Path, tmp_path: Path) -> None:
    Curious.told.clear()
    for knowing in (False, True):
        run_cell(backdoor(small_ddpm, Curious(knowing)), settings(tmp_path))
    assert Curious.told[0] is None
    assert Curious.told[1].trigger.shape == (3, 16, 16)


def test_an_implant_serves_every_defense_and_an_unchanged_model_is_sampled_once(
    small_ddpm: Path, tmp_path: Path,
) -> None:
    run_cell(backdoor(small_ddpm), settings(tmp_path))
    second = run_cell(backdoor(small_ddpm, FineTune(steps=1, batch=2)), settings(tmp_path))
    assert stages(second)["implant"] == [True]
    assert stages(second)["sample"] == [True, True, True, True, False, False]
    assert len(list((tmp_path / "store/sample").glob("[0-9a-f]*"))) == 6


def test_a_real_offline_wandb_run_per_cell(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = run_cell(customization(tiny_sd, Noise(eps=4)), settings(tmp_path, Tracker()))
    assert result.warnings == []
    runs = list((tmp_path / "results/test" / ("c" * 16)).rglob(f"run-{'c' * 16}.wandb"))
    assert len(runs) == 1
    until = time.monotonic() + 30  # W&B's own process writes the file's end after the run has finished here
    while runs[0].stat().st_size <= 1000 and time.monotonic() < until:
        time.sleep(0.1)
    assert runs[0].stat().st_size > 1000


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_runner import customization, settings, Noise, DreamBooth
from bench.runner import run_cell
from bench.testing.pipelines import save_ddpm
cell = customization(Path({model!r}), Noise(eps=4),
                     attack=DreamBooth(steps={steps}, class_images=1, class_steps=1, batch=1))
sys.exit(run_cell(cell, settings(Path({folder!r}))).status != "ok")
"""


def script(model: Path, folder: Path, steps: int) -> list[str]:
    root = str(Path(__file__).resolve().parents[1])
    return [sys.executable, "-c", KILLED.format(root=root, model=str(model), folder=str(folder), steps=steps)]


def test_kill_in_the_middle_of_a_stage_loses_only_that_stage(tiny_sd: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(script(tiny_sd, tmp_path, 100_000), env=env, stderr=subprocess.DEVNULL)
    under_way = tmp_path / "store/customise"
    deadline = time.monotonic() + 120
    while not list(under_way.glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    protected = list((tmp_path / "store/protect").glob("[0-9a-f]*/manifest.json"))
    assert len(protected) == 1
    before = protected[0].stat().st_mtime_ns
    assert not list(under_way.glob("[0-9a-f]*")), "what was half built is not there"

    cell = customization(tiny_sd, Noise(eps=4))
    assert run_cell(cell, settings(tmp_path)).status == "ok"
    assert protected[0].stat().st_mtime_ns == before, "what was complete is not built again"
