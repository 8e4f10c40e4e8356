"""Runs one side of a comparison in a process of its own: its CPU time, its peak memory, how much work passed through
the networks, and what came out.

A side is a function ``prepare(folder, *words)`` that loads and imports what is not to be counted and returns the work.
CPU time, not wall time, so that other processes of the machine change little. Not collected by pytest.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.store import Meter

if TYPE_CHECKING:
    from bench.config import Cell

ROOT = Path(__file__).parents[2]
RESULT = "side.pt"
Work = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Side:
    """``seconds``: CPU time of the work. ``base_mb``: resident size before it; ``peak_mb``: the largest during it.
    ``counts``: rows through each network, and optimiser steps. ``values``: what the work returned."""

    seconds: float
    base_mb: float
    peak_mb: float
    counts: dict[str, int]
    values: dict[str, Tensor]

    @property
    def rise_mb(self) -> float:
        """Memory that the work itself took."""
        return self.peak_mb - self.base_mb


def run_side(module: str, prepare: str, *words: str) -> Side:
    """The side ``module.prepare(folder, *words)`` on one thread of a fresh process."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.sides", module, prepare, folder, *words],
                       cwd=ROOT, env={**os.environ, **single}, check=True)
        return Side(**torch.load(Path(folder) / RESULT, weights_only=True))


def main(module: str, prepare: str, folder: str, *words: str) -> None:
    """What the fresh process does."""
    torch.set_num_threads(1)
    work: Work = getattr(importlib.import_module(module), prepare)(Path(folder), *words)
    side = measure(work)
    torch.save(asdict(side), Path(folder) / RESULT)


def measure(work: Work) -> Side:
    base = resident_mb()
    with counted() as counts:
        meter, start = Meter("cpu"), time.process_time()
        values = work()
        seconds, cost = time.process_time() - start, meter.read()
    return Side(seconds, base, cost.peak_mb or 0.0, dict(counts), values)


def resident_mb() -> float:
    """Of this process, now."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Within it, rows that pass through the networks, and optimiser steps, are counted."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import CLIPTextModel

    counts: Counter[str] = Counter()
    watched = ((UNet2DConditionModel, "forward", "unet"), (UNet2DModel, "forward", "unet"),
               (AutoencoderKL, "encode", "vae"), (CLIPTextModel, "forward", "text"))
    before = [(cls, method, getattr(cls, method)) for cls, method, _ in watched]
    for cls, method, name in watched:
        setattr(cls, method, counting(getattr(cls, method), name, counts))
    hook = register_optimizer_step_post_hook(lambda *_: counts.update(updates=1))
    try:
        yield counts
    finally:
        hook.remove()
        for cls, method, original in before:
            setattr(cls, method, original)


def counting(function: Callable[..., Any], name: str, counts: Counter[str]) -> Callable[..., Any]:
    """``function``, which counts the rows of its first argument, and apart from them those that may need gradients."""

    @wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = len(args[0] if args else next(iter(kwargs.values())))
        counts[name] += rows
        if torch.is_grad_enabled():
            counts[f"{name}_graph"] += rows
        return function(self, *args, **kwargs)

    return call


def compose_cell(words: Sequence[str]) -> Cell:
    """The cell of these command-line words, through the presets in ``conf``."""
    from hydra import compose, initialize_config_dir

    from bench import discovery, sweeper
    from bench.config import build, config_folder, store_schema

    discovery.load()
    store_schema()
    sweeper.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return build(compose("config", overrides=list(words), return_hydra_config=True))


def shown(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(["", title, *lines])


if __name__ == "__main__":
    main(*sys.argv[1:])
