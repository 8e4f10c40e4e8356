"""Plugins and runners that cost nothing, for tests of planning and launching. Not collected by pytest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import field
from enum import Enum
from pathlib import Path

from bench.codecs import JsonCodec
from bench.config import Cell, Settings
from bench.context import Context
from bench.errors import BenchError, Incompatible
from bench.outcomes import cell_record, failed, not_applicable
from bench.plugin import plugin
from bench.records import Model
from bench.results import MeasurementRecord, Result, write_result
from bench.store import Store


class Variant(Enum):
    described = "described"
    released = "released"


@plugin("defense", "fake_shield", track=("customization",), acts_on="images", paper="Fake et al. 2026")
class FakeShield:
    """Protects nothing, quickly.

    ``eps``: levels.
    """

    eps: float = 4.0
    steps: int | None = None
    variant: Variant = Variant.described
    layers: list[str] = field(default_factory=lambda: ["a", "b"])

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 255:
            raise BenchError(f"defense.eps={self.eps} is out of range; give 0 to 255.")

    def protect(self, subjects, model, ctx):
        return [subject.published for subject in subjects]


@plugin("defense", "fake_optimiser", track=("customization",), acts_on="images", needs=("text_encoder",))
class FakeOptimiser:
    """Would optimise against a model."""

    def protect(self, subjects, model, ctx):
        return [subject.published for subject in subjects]


@plugin("defense", "fake_cleaner", track=("backdoor",), acts_on="model", needs=("clean_data",))
class FakeCleaner:
    """Repairs nothing."""

    def repair(self, suspicious, data, secret, ctx):
        return suspicious


@plugin("attack", "fake_attack", track=("customization",), needs=("text_encoder",))
class FakeAttack:
    """Learns nothing. ``behave``: what its cell does when it runs."""

    steps: int = 10
    behave: str = "ok"

    def customise(self, photos, class_noun, model, ctx):
        raise NotImplementedError


@plugin("attack", "fake_implant", track=("backdoor",), needs=("unconditional",))
class FakeImplant:
    """Plants nothing."""

    rate: float = 0.1

    def implant(self, clean, data, ctx):
        raise NotImplementedError


@plugin("data", "fake_people")
class FakePeople:
    """Nobody."""

    count: int = 2

    def subjects(self):
        return []

    def digest(self) -> str:
        return f"people-{self.count}"


@plugin("data", "fake_pictures")
class FakePictures:
    """Nothing to see."""

    def images(self):
        return None

    def digest(self) -> str:
        return "pictures"


@plugin("purifier", "fake_wash", track=("customization",))
class FakeWash:
    """Washes nothing."""

    quality: int = 75

    def purify(self, photos, model, ctx):
        return photos


@plugin("metric", "fake_score", track=("customization",))
class FakeScore:
    """Measures nothing."""

    n: int = 3

    def measure(self, evidence, ctx):
        return []


def resolve(name: str, allow_pickle: bool = False) -> Model:
    """A model by name: ``text``, ``other``, ``plain`` or ``editor``."""
    capabilities = {"text": {"text_to_image", "text_encoder"}, "plain": {"unconditional"},
                    "other": {"text_to_image", "text_encoder"}, "editor": {"edit", "text_encoder"}}
    if name not in capabilities:
        raise BenchError(f"model: unknown checkpoint '{name}'.")
    return Model(Path(name), f"digest-of-{name}", frozenset(capabilities[name]))


CALM = "calm"
"""While this file lies beside the suites, every cell behaves."""


def run_cell(cell: Cell, settings: Settings) -> Result:
    """What ``bench.runner.run_cell`` promises, with every way to end that ``attack.behave`` asks for."""
    how = "ok" if (settings.results / CALM).exists() else getattr(cell.attack, "behave", "ok")
    with (settings.results / "ran.txt").open("a") as file:
        file.write(f"{cell.id} {how} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
    if how == "exit":
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "kill_worker" and _first_time(settings):
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        time.sleep(60)
    if how == "raise":
        raise RuntimeError("the runner itself broke")
    if how == "hang":
        _hang(settings)
    if how in ("share", "big"):
        _stage(how, settings)
    return write_result(_result(cell, how), [], {}, cell.folder(settings.results))


def _hang(settings: Settings) -> None:
    for _ in range(6000):
        if (settings.results / CALM).exists():
            return
        time.sleep(0.1)


def _first_time(settings: Settings) -> bool:
    try:
        (settings.results / "lost").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _stage(how: str, settings: Settings) -> None:
    """``share``: a stage that all cells have in common, and takes a while. ``big``: one of 2 MB."""
    def build(ctx: Context) -> str:
        with (settings.results / "built.txt").open("a") as file:
            file.write(f"{how}\n")
        time.sleep(1.0 if how == "share" else 0.0)
        (ctx.folder / "weights.bin").write_bytes(bytes(2_000_000 if how == "big" else 100))
        return how

    Store(settings.store).stage(how, 1, {}, build, JsonCodec())


def _result(cell: Cell, how: str) -> Result:
    if how == "fail":
        return failed(cell, "BenchError", "the attack found no face")
    if how == "n/a":
        return not_applicable(cell, str(Incompatible("no face to attack")))
    one = MeasurementRecord(name="score", metric="fake_score", version=1, parameters={"n": 3}, value=0.5, low=0.4,
                            high=0.6, n=3, unit="share", higher_is_better=True, protocol_hash="p")
    return Result(suite=cell.suite, cell=cell_record(cell), status="ok", measurements=[one])
