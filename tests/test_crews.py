"""Every launcher ends, records and repeats cells alike, whatever happens to them, to their workers, or to the sweep."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from bench.cli import _short, run
from bench.errors import BenchError
from bench.launchers import slurm_options
from bench.lease import birth
from bench.results import Result, read_result
from tests.conftest import BASE
from tests.fakes import CALM

LIBRARIES = {"local": "bench", "joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}
QUICK = ("local", "joblib")
LIMIT = float(os.environ.get("BENCH_TEST_LIMIT", "15"))
"""Seconds that a cell which costs nothing may take; more on a machine that is busy with other things."""
GRID = ("-m", *BASE, "launcher.runner=tests.fakes:run_cell", "launcher.preload=tests.fakes", "suite=grid", "workers=2")


def launchers(quick: tuple[str, ...] = QUICK, all_of: tuple[str, ...] = tuple(LIBRARIES)) -> list[object]:
    """All launchers as parameters; those that take long to start are slow."""
    marks = {name: [pytest.mark.skipif(importlib.util.find_spec(LIBRARIES[name]) is None,
                                       reason=f"{LIBRARIES[name]} is not installed")] for name in all_of}
    return [pytest.param(name, marks=[*marks[name], *([] if name in quick else [pytest.mark.slow])]) for name in all_of]


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: ModuleType) -> None:
    monkeypatch.setenv("BENCH_RESULTS", str(tmp_path))
    monkeypatch.setenv("BENCH_STORE", str(tmp_path / ".store"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))


def ran(folder: Path) -> Counter[str]:
    """How often cells that behave so were started."""
    file = folder / "ran.txt"
    return Counter(line.split()[1] for line in file.read_text().splitlines()) if file.exists() else Counter()


def found(folder: Path) -> dict[str, Result]:
    """Each cell's record by how it was told to behave."""
    records = [read_result(path.parent) for path in (folder / "grid").glob("*/result.json")]
    return {str(record.cell.attack.parameters["behave"]): record for record in records}


@pytest.mark.parametrize("launcher", launchers())
def test_a_cell_that_raises_exits_is_killed_or_hangs_costs_itself_and_the_same_command_completes(
    tmp_path: Path, launcher: str,
) -> None:
    words = (*GRID, f"launcher={launcher}", "attack.behave=ok,raise,exit,kill,hang,share",
             f"time_limit={LIMIT:g}")
    assert run(words) == 1
    said = {how: record.error.message if record.error else "" for how, record in found(tmp_path).items()}
    assert said["ok"] == said["share"] == ""
    assert "exit code 1" in said["raise"] and "exit code 3" in said["exit"]
    assert "killed by signal 9" in said["kill"] and f"exceeded its time limit of {LIMIT:g} s" in said["hang"]
    assert "the runner itself broke" in found(tmp_path)["raise"].error.traceback
    (tmp_path / CALM).touch()
    assert run(words) == 0
    assert {record.status for record in found(tmp_path).values()} == {"ok"}
    assert ran(tmp_path)["ok"] == 1 + 4 and ran(tmp_path)["share"] == 1, "what was finished did not run again"


@pytest.mark.parametrize("launcher", launchers(quick=("joblib",), all_of=("joblib", "submitit_local", "ray")))
def test_a_worker_that_is_killed_takes_no_cell_with_it(tmp_path: Path, launcher: str) -> None:
    assert run((*GRID, f"launcher={launcher}", "attack.behave=kill_worker,ok,share")) == 0
    assert {record.status for record in found(tmp_path).values()} == {"ok"}
    assert ran(tmp_path)["kill_worker"] == 2


def started(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """A sweep in a process and a session of its own, which hears Ctrl-C: what is started in the background does not."""
    with (folder / "head.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "tests.fake_bench", *GRID, *words], stdout=log, stderr=log,
                                start_new_session=True, cwd=Path(__file__).parents[1],
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def until(holds: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds * LIMIT
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def alive(folder: Path) -> list[int]:
    """Processes of cells that still run."""
    pids = [int(line.split()[2]) for line in (folder / "ran.txt").read_text().splitlines()]
    return [pid for pid in pids if birth(pid)]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("launcher", launchers(quick=("joblib",)))
def test_a_sweep_that_is_killed_or_interrupted_loses_nothing_that_was_finished(
    tmp_path: Path, launcher: str, ending: signal.Signals,
) -> None:
    words = (f"launcher={launcher}", "attack.behave=ok,hang")
    head = started(tmp_path, *words)
    until(lambda: ran(tmp_path)["hang"] and "ok" in found(tmp_path))
    (os.killpg if ending == signal.SIGINT else os.kill)(head.pid, ending)
    assert head.wait(20 * LIMIT) == (130 if ending == signal.SIGINT else -9)
    outlives = (launcher, ending) == ("submitit_local", signal.SIGKILL)
    if not outlives:
        until(lambda: not alive(tmp_path))
    assert found(tmp_path)["ok"].status == "ok" and "hang" not in found(tmp_path)
    (tmp_path / CALM).touch()
    assert run((*GRID, *words)) == 0
    assert {how: record.status for how, record in found(tmp_path).items()} == {"ok": "ok", "hang": "ok"}
    again = 0 if outlives else 1  # a job of submitit goes on without its head, and its result is taken
    assert ran(tmp_path) == {"hang": 1, "ok": 1 + again}


@pytest.mark.parametrize("launcher", launchers(quick=("local",)))
def test_two_sweeps_over_one_store_share_the_work(tmp_path: Path, launcher: str) -> None:
    words = (f"launcher={launcher}", "attack.behave=ok,share", "seed=0,1,2")
    heads = [started(tmp_path, *words) for _ in range(2)]
    assert [head.wait(40 * LIMIT) for head in heads] == [0, 0], (tmp_path / "head.log").read_text()
    ids = [line.split()[0] for line in (tmp_path / "ran.txt").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 6, "every cell ran once"
    assert (tmp_path / "built.txt").read_text() == "share\n", "and so did the stage that they share"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.call(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)],
                                      stderr=subprocess.DEVNULL):
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.call(["umount", "-l", str(folder)])


@pytest.mark.parametrize("launcher", launchers(quick=("local",)))
def test_a_store_on_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, launcher: str,
) -> None:
    words = (*GRID, f"launcher={launcher}", f"store={small_disk}", "attack.behave=share,big,ok")
    assert run(words) == 1
    assert {how: record.status for how, record in found(tmp_path).items()} == {
        "share": "ok", "big": "failed", "ok": "ok"}
    log = next(path.parent / "log.txt" for path in (tmp_path / "grid").glob("*/result.json")
               if read_result(path.parent).status == "failed").read_text()
    assert "the disk is full" in log and "make room" in log
    subprocess.check_call(["mount", "-o", "remount,size=16m", str(small_disk)])
    assert run(words) == 0
    assert found(tmp_path)["big"].status == "ok"
    assert ran(tmp_path) == {"share": 1, "ok": 1, "big": 2}


def test_results_on_a_full_disk_end_in_messages_and_not_in_a_crash(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    words = (*GRID, f"results={small_disk}", "attack.behave=ok,share")
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2_000_000))
    assert run(words) == 2
    assert "the disk is full" in capsys.readouterr().err
    (small_disk / "filler").unlink()
    assert run(words) == 0


@pytest.mark.parametrize("launcher", launchers(quick=("local",), all_of=("local", "joblib", "submitit_local")))
def test_each_worker_has_a_gpu_of_those_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("bench.config.version", lambda name: "2.13.0+cu130")
    assert run((*GRID, f"launcher={launcher}", "device=cuda", "attack.behave=share", "seed=0,1")) == 0
    assert {line.split()[3] for line in (tmp_path / "ran.txt").read_text().splitlines()} == {"3", "5"}


@pytest.mark.parametrize("launcher", launchers())
def test_stop_starts_no_cell_after_a_failure(tmp_path: Path, launcher: str) -> None:
    words = (*GRID, f"launcher={launcher}", "workers=1", "on_error=stop", "attack.behave=fail,ok,share")
    assert run(words) == 1
    assert ran(tmp_path) == {"fail": 1}
    assert run((*words, "mode=retry")) == 1
    assert ran(tmp_path) == {"fail": 2}, "retry: what failed, and nothing else"


def test_a_launcher_without_its_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run((*GRID, "launcher=submitit_local")) == 2
    assert "pip install 'diffusion-defense-bench[slurm]'" in capsys.readouterr().err


def test_launchers_are_chosen_in_a_word() -> None:
    assert [_short(word) for word in ("launcher=ray", "launcher.cpus=2", "seed=1")] == [
        "hydra/launcher=ray", "hydra.launcher.cpus=2", "seed=1"]


def test_slurm_is_told_in_its_own_words() -> None:
    asked = {"partition": "gpu", "account": None, "timeout_min": 90, "gpus_per_node": 1, "cpus_per_task": 4,
             "mem_gb": 32, "setup": ["module load cuda"], "extra": {"nodelist": "a01"}, "requeues": 3}
    assert slurm_options(asked, "quickstart") == {
        "partition": "gpu", "time": 90, "gpus_per_node": 1, "cpus_per_task": 4, "mem": "32GB",
        "setup": ["module load cuda"], "additional_parameters": {"nodelist": "a01"}, "job_name": "bench-quickstart"}


SCRIPTS = {
    "sbatch": """script="${@: -1}"; id=$RANDOM$RANDOM; cp "$script" "$(dirname "$0")/script"
SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
  setsid bash "$script" >/dev/null 2>&1 </dev/null & echo $! >"$(dirname "$0")/$id"; echo "Submitted batch job $id" """,
    "srun": """while [[ "$1" == --* ]]; do [[ "$1" == --unbuffered ]] || shift; shift; done; exec "$@" """,
    "sacct": """echo "JobID|State|NodeList"; for file in "$(dirname "$0")"/[0-9]*; do
kill -0 "$(cat $file)" 2>/dev/null && state=RUNNING || state=COMPLETED; echo "$(basename $file)|$state|here"; done""",
    "scancel": """kill -9 -- -"$(cat "$(dirname "$0")/$1")" """,
}
"""A scheduler that starts every job at once, on this machine."""


@pytest.mark.slow
def test_slurm_jobs_are_submitted_watched_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in SCRIPTS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    words = (*GRID, "launcher=slurm", "launcher.partition=gpu", "attack.behave=ok,kill,share")
    assert run(words) == 1
    assert {how: record.status for how, record in found(tmp_path).items()} == {
        "ok": "ok", "kill": "failed", "share": "ok"}
    script = (commands / "script").read_text()
    assert "#SBATCH --partition=gpu" in script and "#SBATCH --gpus-per-node=1" in script
    (tmp_path / CALM).touch()
    assert run(words) == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", launchers())
def test_records_are_those_of_hydras_basic_launcher_and_each_stage_is_built_once(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str,
) -> None:
    from bench.diffusion import checkpoints

    monkeypatch.setattr("bench.config._resolve", checkpoints.resolve)
    words = ("-m", f"model={tiny_sd}", "data=micro_subjects", "data.count=3", "data.size=16", "attack=dreambooth",
             "attack.steps=1", "attack.class_images=1", "attack.class_steps=1", "attack.batch=1", "seed=0,1",
             "customization.per_prompt=1", "customization.steps=1", "metrics=[image_quality]", "defense=none,noise",
             "tracker.wandb=disabled", "suite=grid", "workers=2")
    assert run((*words, "hydra/launcher=basic", f"results={tmp_path}/a", f"store={tmp_path}/a/.store")) == 0
    assert run((*words, f"launcher={launcher}", f"results={tmp_path}/b", f"store={tmp_path}/b/.store")) == 0
    assert len(records(tmp_path / "a" / "grid")) == 4
    assert_same_and_built_once(records(tmp_path / "a" / "grid"), records(tmp_path / "b" / "grid"))


def records(suite: Path) -> dict[str, Result]:
    return {path.parent.name: read_result(path.parent) for path in suite.glob("*/result.json")}


def assert_same_and_built_once(basic: dict[str, Result], other: dict[str, Result]) -> None:
    """Equal records, cost aside; of the workers that shared a store, one built each stage."""
    unlike = {"cost", "provenance"}
    assert {name: one.model_dump(exclude=unlike) for name, one in other.items()} == {
        name: one.model_dump(exclude=unlike) for name, one in basic.items()}
    built = Counter(stage.key for one in other.values() for stage in one.cost if not stage.reused)
    assert set(built.values()) == {1} and set(built) == {s.key for one in basic.values() for s in one.cost}


QUICKSTART = (
    ("only.attack=zero_shot", "only.defense=none,noise"),
    ("only.attack=zero_shot", "only.defense=aspl_quick", "defense.outer_steps=1", "defense.class_images=2"),
    ("only.attack=inpaint_micro", "only.defense=none,noise"),
    ("only.attack=badt2i_quick", "only.defense=none,delete_trigger", "attack.steps=2"),
)
"""Cells of all tracks. The second line's share a protected set, the last one's an implant, each made in a few steps."""


def ran_quickstart(folder: Path, launcher: str) -> dict[str, Result]:
    """The records of these cells, by ``bench`` itself."""
    words = ("experiment=quickstart", "tracker.wandb=disabled", f"results={folder}", f"store={folder}/.store",
             launcher, *(() if launcher.endswith("basic") else ("workers=2",)))
    for part in QUICKSTART:
        done = subprocess.run([sys.executable, "-m", "bench", "-m", *words, *part], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return records(folder / "quickstart")


@pytest.fixture(scope="module")
def basic_quickstart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What Hydra's basic launcher makes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
        return ran_quickstart(tmp_path_factory.mktemp("basic"), "hydra/launcher=basic")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", launchers(quick=()))
def test_cells_of_the_quickstart_are_those_of_hydras_basic_launcher(
    tmp_path: Path, basic_quickstart: dict[str, Result], launcher: str,
) -> None:
    assert Counter(record.cell.track for record in basic_quickstart.values()) == {
        "customization": 5, "editing": 2, "backdoor": 2}
    assert_same_and_built_once(basic_quickstart, ran_quickstart(tmp_path, f"launcher={launcher}"))


def test_slurm_where_there_is_none_is_one_message() -> None:
    pytest.importorskip("submitit")
    from bench.crews import Submitit

    with pytest.raises(BenchError, match="submitit refuses"):
        Submitit("slurm", Path("/nonexistent/jobs"), {})
