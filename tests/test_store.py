"""Artefacts survive kills, races, flipped bytes and disks that refuse."""

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.codecs import JsonCodec
from bench.context import Context
from bench.errors import BenchError
from bench.store import MANIFEST, Meter, Store, Stored, read_manifest, verify

INPUTS = {"plugin": {"name": "x", "eps": 16.0}, "seed": 0}


def number(ctx: Context) -> int:
    (ctx.folder / "weights.bin").write_bytes(bytes(range(256)) * 16)
    return ctx.seed("number") % 1000


def ask(root: Path, build: Callable[[Context], int] = number, **inputs: object) -> Stored[int]:
    return Store(root).stage("train", 1, {**INPUTS, **inputs}, build, JsonCodec())


def never(ctx: Context) -> int:
    raise AssertionError("built again")


def debris(root: Path) -> list[str]:
    return [p.name for p in root.rglob(".*") if p.is_dir()]


def test_second_request_reuses_and_keeps_the_cost(tmp_path: Path) -> None:
    first, second = ask(tmp_path), ask(tmp_path, never)
    assert (first.reused, second.reused) == (False, True)
    assert (first.value, first.cost, first.folder) == (second.value, second.cost, second.folder)
    assert debris(tmp_path) == []


def test_the_key_is_inputs_alone(tmp_path: Path) -> None:
    keys = {Store(tmp_path / str(i)).stage("train", 1, INPUTS, number, JsonCodec(), device=device).key
            for i, device in enumerate(["cpu", "cuda:7"])}
    assert len(keys) == 1
    store = Store(tmp_path)
    assert store.stage("train", 2, INPUTS, number, JsonCodec()).key not in keys
    assert store.stage("teach", 1, INPUTS, number, JsonCodec()).key not in keys
    assert store.stage("train", 1, {**INPUTS, "seed": 1}, number, JsonCodec()).key not in keys


def test_randomness_comes_from_seeded_by(tmp_path: Path) -> None:
    def value(seed: int, strength: int) -> int:
        return Store(tmp_path).stage("attack", 1, {"strength": strength, "seed": seed}, number, JsonCodec(),
                                     seeded_by={"seed": seed}).value

    assert value(0, 1) == value(0, 2) != value(1, 1)


def test_no_path_of_the_machine_is_in_the_manifest(tmp_path: Path) -> None:
    stored = ask(tmp_path)
    assert str(tmp_path) not in (stored.folder / MANIFEST).read_text()
    manifest = read_manifest(stored.folder)
    assert manifest["inputs"] == INPUTS and manifest["files"]["weights.bin"]["bytes"] == 4096


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    from test_store import ask
    def build(ctx):
        (ctx.folder / "weights.bin").write_bytes(b"half")
        print("building", flush=True)
        signal.pause()
    ask(Path({root!r}), build)
"""


def test_kill_9_in_the_middle_then_the_same_request_finishes(tmp_path: Path) -> None:
    ask(tmp_path, seed=1)
    code = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert len(debris(tmp_path)) == 1

    stored = ask(tmp_path)
    assert not stored.reused and (stored.folder / "weights.bin").stat().st_size == 4096
    assert debris(tmp_path) == []
    assert ask(tmp_path, never, seed=1).reused


def test_debris_of_living_processes_and_of_other_stages_stays(tmp_path: Path) -> None:
    stored = ask(tmp_path)
    own = stored.folder.with_name(f".{'0' * 16}.{'1' * 8}-1-ab")
    own.mkdir()
    ask(tmp_path, seed=2)
    assert own.is_dir()


def _one_of_many(root: str, log: str) -> None:
    def build(ctx: Context) -> int:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return 7

    assert ask(Path(root), build).value == 7


def test_16_processes_one_build(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [fork.Process(target=_one_of_many, args=(str(tmp_path / "store"), str(log))) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [w.exitcode for w in workers] == [0] * 16
    assert log.read_text() == "built\n"


def flip(path: Path, place: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_noticed_rebuilt_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = ask(tmp_path).folder / "weights.bin"
    good = weights.read_bytes()
    flip(weights)
    with caplog.at_level(logging.WARNING):
        again = ask(tmp_path)
    assert not again.reused and weights.read_bytes() == good
    assert "weights.bin does not match its hash" in caplog.text
    assert len(again.warnings) == 1 and "weights.bin" in again.warnings[0]
    assert ask(tmp_path, never).reused


def test_the_same_process_notices_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    weights = store.stage("train", 1, INPUTS, number, JsonCodec()).folder / "weights.bin"
    assert store.stage("train", 1, INPUTS, never, JsonCodec()).reused
    flip(weights)
    assert not store.stage("train", 1, INPUTS, number, JsonCodec()).reused


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "weights.bin").unlink(),
    lambda folder: (folder / "extra").write_text("x"),
    lambda folder: (folder / MANIFEST).write_text("{"),
    lambda folder: (folder / MANIFEST).unlink(),
    lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"seed": 0', '"seed": 1')),
], ids=["missing", "extra", "broken manifest", "no manifest", "altered manifest"])
def test_other_damage_is_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = ask(tmp_path).folder
    damage(folder)
    assert verify(folder)
    assert len(ask(tmp_path).warnings) == 1
    assert verify(folder) is None


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        ask(tmp_path, lambda ctx: 1 // 0)
    assert debris(tmp_path) == [] and not ask(tmp_path).reused


def _full(ctx: Context) -> int:
    (ctx.folder / "big").symlink_to("/dev/full")
    (ctx.folder / "big").write_bytes(b"x" * 10)
    return 1


def test_full_disk_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    ask(tmp_path)
    with pytest.raises(BenchError, match=f"{tmp_path}: the disk is full"):
        ask(tmp_path, _full, seed=5)
    assert debris(tmp_path) == []
    assert ask(tmp_path, never).reused


def test_full_disk_told_by_a_library(tmp_path: Path) -> None:
    def build(ctx: Context) -> int:
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")

    with pytest.raises(BenchError, match="the disk is full"):
        ask(tmp_path, build)


def _limited(root: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(BenchError, match="larger than the system allows"):
        ask(Path(root), seed=3)
    assert ask(Path(root), never).reused


def test_file_size_limit(tmp_path: Path) -> None:
    ask(tmp_path)
    _in_child(_limited, str(tmp_path))


def _as_nobody(root: str) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    with pytest.raises(BenchError, match="not permitted.*choose another folder"):
        ask(Path(root), seed=3)
    assert ask(Path(root), never).reused


def test_read_only_folder_still_serves_what_is_finished(tmp_path: Path) -> None:
    root = tmp_path / "store"
    ask(root)
    for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        path.chmod(0o555)
    for parent in [tmp_path, *tmp_path.parents][:4]:  # pytest-xdist adds a level
        parent.chmod(0o755)
    _in_child(_as_nobody, str(root))


def _in_child(check: Callable[[str], None], root: str) -> None:
    child = multiprocessing.get_context("fork").Process(target=check, args=(root,))
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_errors_that_are_not_the_disks_pass_through(tmp_path: Path) -> None:
    def build(ctx: Context) -> int:
        raise PermissionError(errno.EACCES, "no", "/somewhere/else/photo.png")

    with pytest.raises(PermissionError):
        ask(tmp_path, build)


@pytest.mark.parametrize("name", ["locks", "../x", "", "A b"])
def test_bad_stage_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(BenchError, match="cannot name a stage"):
        Store(tmp_path).stage(name, 1, {}, number, JsonCodec())


def test_peak_memory_is_of_this_stage_alone() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no resettable mark on this system")
    before = Meter("cpu").read().peak_mb or 0
    meter = Meter("cpu")
    block = b"x" * (64 << 20)  # written to, so that its pages are resident
    during = meter.read().peak_mb or 0
    del block
    after = Meter("cpu").read().peak_mb or 0
    assert during - before > 60 and during - after > 60


def test_a_gpu_that_is_not_there_breaks_no_bookkeeping() -> None:
    import torch

    if torch.cuda.is_initialized():
        pytest.skip("this process has used a GPU")
    cost = Meter("cuda:7").read()
    assert cost.device == "cuda:7"
    assert (cost.peak_mb or 0) > 0


def test_a_shared_stage_counts_in_the_outer_cost_whoever_built_it(tmp_path: Path) -> None:
    def slow(ctx: Context) -> int:
        time.sleep(0.2)
        return ctx.seed() % 100

    def outer(ctx: Context) -> int:
        return ctx.share("class-images", 1, {"n": 4}, slow, JsonCodec())

    first, second = ask(tmp_path, outer, seed=1), ask(tmp_path, outer, seed=2)
    assert first.value == second.value
    assert first.cost.seconds >= 0.2 and second.cost.seconds >= 0.2  # kept in whole milliseconds
    assert len(list((tmp_path / "class-images").iterdir())) == 1


def test_find(tmp_path: Path) -> None:
    stored = ask(tmp_path)
    assert Store(tmp_path).find("train", stored.key) == stored.folder
    assert Store(tmp_path).find("train", "0" * 16) is None
    assert json.loads((stored.folder / "value.json").read_text()) == stored.value
