"""A thousand cells are planned, and found to be done, in seconds of processor time."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest

from bench.cli import run
from bench.config import Settings
from tests import fakes
from tests.conftest import BASE, least

GRID = ("-m", *BASE, "launcher.runner=tests.fakes:run_cell", "launcher.preload=tests.fakes", "suite=grid",
        "attack.behave=ok,share", "defense=none,fake_shield")
PLAN, DONE = 10.0, 20.0
"""Seconds of processor time for 1,000 cells."""


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: ModuleType) -> None:
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path))
    monkeypatch.setenv("BENCH_STORE", str(tmp_path / ".store"))
    monkeypatch.setattr("bench.results.flush_folder", lambda folder: None)  # the disk's time is not ours to measure
    monkeypatch.setattr("bench.files.os.fsync", lambda handle: None)


def spent(*words: str) -> float:
    """Seconds of processor time of a command line that ends well."""
    began = time.process_time()
    assert run(words) == 0
    return time.process_time() - began


def finish_all(folder: Path) -> None:
    """A result for every planned cell, from the plan's own words."""
    from hydra import compose, initialize_config_dir

    from bench import sweeper
    from bench.config import config_folder, store_schema
    from bench.planner import expand, resolve_cells

    words = [word for word in GRID if word != "-m" and not word.startswith("launcher")]
    store_schema()
    sweeper.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        points = expand([*words, seeds(folder)], [])
        cells = resolve_cells(points, lambda w: compose("config", overrides=list(w), return_hydra_config=True))
    for cell in cells:
        fakes.write_result(fakes._result(cell, "ok"), [], {}, cell.folder(Settings(folder, folder).results))


def seeds(folder: Path) -> str:
    return (folder / "seeds.txt").read_text()


@pytest.mark.parametrize("cells", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_cells_plan_fast_and_are_found_done_fast(tmp_path: Path, cells: int) -> None:
    # What Hydra takes however few cells there are.
    any_grid = 0.0 if cells == 1000 else min(spent("plan", *GRID, "seed=0") for _ in range(2))
    (tmp_path / "seeds.txt").write_text(f"seed={','.join(map(str, range(cells // 4)))}")
    plan, done = (any_grid + limit * cells / 1000 for limit in (PLAN, DONE))
    assert least(lambda: spent("plan", *GRID, seeds(tmp_path)), enough=plan) < plan
    finish_all(tmp_path)
    assert len(list((tmp_path / "grid").glob("*/result.json"))) == cells
    assert least(lambda: spent(*GRID, seeds(tmp_path)), enough=done) < done
    assert not (tmp_path / "ran.txt").exists()
