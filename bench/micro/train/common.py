"""What all training jobs share: one resumable loop with EMA, cosine learning rate, a loss log and checkpoints."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

StepLoss = Callable[[np.random.Generator, int], tuple[Tensor, dict[str, float]]]


def runs_folder(name: str) -> Path:
    """Where a job keeps its checkpoints and its log: `$BENCH_MICRO_RUNS/<name>` (default `.micro_runs/<name>`)."""
    folder = Path(os.environ.get("BENCH_MICRO_RUNS", ".micro_runs")) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass
class Schedule:
    """How long and how fast a job trains. `seed` starts the weights and draws every batch."""

    steps: int
    lr: float
    seed: int = 0
    warmup: int = 100
    floor: float = 0.02
    weight_decay: float = 0.01
    ema: float = 0.0
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from `lr` down to `floor * lr`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Average:
    """An exponential moving average of a module's parameters; warm at the start, so early values are forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.values = [p.detach().clone() for p in module.parameters()]

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.module.parameters()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averages."""
        kept = [p.detach().clone() for p in self.module.parameters()]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.module.parameters(), values, strict=True):
            parameter.copy_(value)


@dataclass
class Job:
    """A module in training. `export` writes the finished model; it is also called every `export_every` seconds."""

    name: str
    module: nn.Module
    schedule: Schedule
    export: Callable[[], None]
    export_every: float = 600.0
    checkpoint_every: float = 60.0

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        s = self.schedule
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=s.lr, weight_decay=s.weight_decay, betas=(0.9, 0.99)
        )
        self.average = Average(self.module, s.ema) if s.ema else None
        self.folder = runs_folder(self.name)

    def save(self, step: int) -> None:
        state = {"step": step, "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state["average"] = self.average.values
        part = self.folder / "checkpoint.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def resume(self) -> int:
        """Load the last checkpoint if there is one; returns the step to continue from."""
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return 0
        state = torch.load(file, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.values = state["average"]
        return int(state["step"])

    def publish(self) -> None:
        """Export the averaged weights (the plain ones without EMA) in eval mode."""
        self.module.eval()
        if self.average is None:
            self.export()
        else:
            with self.average.applied():
                self.export()
        self.module.train()


def _log(job: Job, step: int, started: float, losses: list[float], facts: dict[str, float]) -> None:
    row = {"step": step, "seconds": round(time.time() - started, 1), "loss": float(np.mean(losses)), **facts}
    with (job.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")


def _one_step(job: Job, loss_of: StepLoss, step: int) -> tuple[float, dict[str, float]]:
    for group in job.optimizer.param_groups:
        group["lr"] = job.schedule.rate(step)
    torch.manual_seed(hash((job.schedule.seed, step)) % 2**31)
    loss, facts = loss_of(np.random.default_rng((job.schedule.seed, step)), step)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(job.parameters, job.schedule.clip_norm)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.average is not None:
        job.average.update(step)
    return float(loss.detach()), facts


def fit(job: Job, loss_of: StepLoss) -> None:
    """Train to `schedule.steps`, resuming from the last checkpoint; each batch depends on (seed, step) alone."""
    step, started, losses = job.resume(), time.time(), list[float]()
    saved = exported = started
    job.module.train()
    while step < job.schedule.steps:
        loss, facts = _one_step(job, loss_of, step)
        losses.append(loss)
        step += 1
        if step % 50 == 0:
            _log(job, step, started, losses, facts)
            losses.clear()
        if time.time() - saved > job.checkpoint_every:
            job.save(step)
            saved = time.time()
        if time.time() - exported > job.export_every:
            job.publish()
            exported = time.time()
    job.save(step)
    job.publish()
    logger.info("%s: %d steps in %.0f s", job.name, step, time.time() - started)


def to_unit(pixels: np.ndarray) -> Tensor:
    """Pictures uint8 [n, 3, s, s] to float32 in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write into a fresh neighbour of `folder` and put it in place of `folder` only when the block succeeds."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
