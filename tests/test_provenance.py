"""Where results came from, told quickly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from bench.provenance import now, provenance

CODE = """
import json, sys, time
from bench.provenance import now, provenance
began = time.process_time()
known = provenance(now(), ["a=1"])
spent = time.process_time() - began
print(json.dumps([known, spent, "torch" in sys.modules]))
"""


def in_a_new_process(prefix: str = "") -> tuple[dict[str, object], float, bool]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", prefix + CODE], env=environment, capture_output=True, text=True,
                          check=True)
    known, spent, torch = json.loads(done.stdout)
    return known, spent, torch


def test_cheap_and_without_torch() -> None:
    known, spent, torch = in_a_new_process()
    assert spent < 0.1
    assert not torch
    assert known["overrides"] == ["a=1"]
    assert known["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "threads" not in known


def test_versions_are_those_that_packages_state() -> None:
    from importlib.metadata import version

    packages = provenance(now())["packages"]
    for name in ("numpy", "pydantic", "hydra-core", "huggingface-hub", "torch"):
        assert packages[name] == version(name)


def test_the_commit_is_gits() -> None:
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        found = provenance(now())["git"]
        assert re.fullmatch(r"[0-9a-f]{40}", found["commit"])
        assert said.stdout.strip()
        assert isinstance(found["dirty"], bool)


def test_threads_when_torch_is_loaded_and_no_host_name_ever() -> None:
    import socket

    import torch

    known = provenance(now())
    assert known["threads"] == torch.get_num_threads()
    assert socket.gethostname() not in (known["host"], known["os"])
    assert known["started"] <= known["ended"]
    json.dumps(known, allow_nan=False)
