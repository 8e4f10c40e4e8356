"""Is this installation sound? One line per thing that runs depend on."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.markup import escape

from bench import discovery, terminal
from bench.config import config_folder, gpus
from bench.errors import BenchError

PACKAGES = ("hydra-core", "omegaconf", "torch", "diffusers", "transformers", "peft", "torchmetrics", "wandb",
            "pydantic", "safetensors", "scipy", "insightface")
OPTIONAL = ("hydra-joblib-launcher", "hydra-submitit-launcher", "hydra-ray-launcher", "onnxruntime", "torch-fidelity",
            "lpips", "torchvision")
LITTLE = 5.0
"""Gigabytes of free disk below which a grid is likely to stop."""


@dataclass(frozen=True)
class Finding:
    """``state``: ``ok``, ``n/a`` (optional, absent) or ``failed``."""

    what: str
    state: str
    detail: str


def examine() -> int:
    """Print every finding; 1 if something that is needed is wrong."""
    found = [*_python(), *_packages(), *_plugins(), *_weights(), *_machine()]
    rows = terminal.table("state", "what", "detail")
    for one in found:
        rows.add_row(terminal.styled(one.state), one.what, escape(one.detail))
    terminal.out().print(rows)
    return 1 if any(one.state == "failed" for one in found) else 0


def _python() -> Iterator[Finding]:
    state = "ok" if sys.version_info >= (3, 11) else "failed"
    yield Finding("python", state, f"{platform.python_version()} on {platform.platform()}")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES + OPTIONAL:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            absent = ("n/a", "optional, not installed") if name in OPTIONAL else ("failed", "not installed")
            yield Finding(name, *absent)


def _plugins() -> Iterator[Finding]:
    broken = discovery.warnings()
    yield Finding("plugins", "failed" if broken else "ok", "; ".join(broken) or "all import")
    yield Finding("conf", "ok", str(config_folder()))


def _weights() -> Iterator[Finding]:
    """Every embedded model resolves: complete, safetensors only, and matching its hashes."""
    from bench.diffusion.checkpoints import MICRO, resolve

    names = sorted(path.parent.name for path in MICRO.glob("*/model_index.json"))
    for name in names:
        try:
            yield Finding(name, "ok", f"hashes match, digest {resolve(name).digest[:16]}")
        except BenchError as error:
            yield Finding(name, "failed", str(error))
    if not names:
        yield Finding("embedded models", "failed", f"none in {MICRO}")


def _machine() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding("disk", "ok" if free > LITTLE else "failed", f"{free:.0f} GB free in {Path.cwd()}")
    yield Finding("cores", "ok", f"{len(os.sched_getaffinity(0))} usable")
    yield Finding("GPU", "ok" if gpus() else "n/a", f"{len(gpus())} found" if gpus() else "none: runs on the CPU")
    yield Finding("Weights & Biases", "ok", os.environ.get("WANDB_MODE", "offline unless tracker.wandb says otherwise"))
