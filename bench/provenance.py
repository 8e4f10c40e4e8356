"""Where a result came from: code, packages, hardware and when. Gathered once per process, without importing torch."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import bench

NAMED = (
    "accelerate", "diffusers", "filelock", "huggingface-hub", "hydra-core", "insightface", "numpy", "omegaconf",
    "pandas", "peft", "pillow", "pydantic", "safetensors", "scipy", "tokenizers", "torch", "torch-fidelity",
    "torchmetrics", "transformers", "wandb",
)
"""Packages whose versions are spelled out; all others count in the hash."""


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(started: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What produced a result that began at ``started`` (see ``now``) and ends at this call. ``overrides``: what the
    user gave on the command line. GPUs are listed when torch is already imported."""
    return {
        "bench": bench.__version__, "git": _git(), **_packages(), "python": platform.python_version(),
        "os": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count(), **_torch(),
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        "overrides": list(overrides), "started": started, "ended": now(),
    }


@cache
def _git() -> dict[str, Any] | None:
    """Commit, and whether anything differs from it, of the checkout that this package lies in; None if installed."""
    root = Path(bench.__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    status = _run(root, "status", "--porcelain=v2", "--branch")
    if status is None:
        return None
    head = [line for line in status.splitlines() if line.startswith("# ")]
    commit = next((line.split()[2] for line in head if line.startswith("# branch.oid")), "")
    return {"commit": commit, "dirty": len(status.splitlines()) > len(head)}


def _run(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True,
                              text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def _packages() -> dict[str, Any]:
    """Versions of the named packages, and one hash over all that are installed.

    Read from the names of their folders: opening each package's metadata takes many times as long.
    """
    found = {}
    for path in reversed(sys.path):
        found.update(_distributions(path))
    listing = "\n".join(f"{name}=={version}" for name, version in sorted(found.items()))
    return {"packages": {name: found[name] for name in NAMED if name in found},
            "packages_hash": hashlib.sha256(listing.encode()).hexdigest()[:16]}


def _distributions(path: str) -> dict[str, str]:
    """Normalised name -> version of what is installed in one folder of the import path."""
    try:
        entries = os.listdir(path or ".")
    except OSError:
        return {}
    stems = [entry.removesuffix(".dist-info") for entry in entries if entry.endswith(".dist-info")]
    split = [stem.rpartition("-") for stem in stems]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in split}


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.machine())


def _torch() -> dict[str, Any]:
    """Threads, CUDA and GPUs, as far as torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    known: dict[str, Any] = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda,
                             "deterministic": torch.are_deterministic_algorithms_enabled()}
    if torch.cuda.is_available():
        known["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        known["driver"] = _driver()
    return known


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
