"""Content-addressed artefacts: ask for a stage, get what it built, whether now or in an earlier run.

A stage's key is made of everything that produced it and nothing else. Its folder ``<root>/<stage>/<key>`` appears
in one rename when it is whole; a lease keeps processes, on one machine or on many that share the folder, from
building the same thing twice, but correctness rests on the rename alone. On reuse each file is compared with the hash
in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import resource
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from bench.context import Codec, Context, Progress, Share, no_progress
from bench.errors import BenchError
from bench.files import flush_file, flush_folder, look_again, told
from bench.identity import canonical_json, digest, file_digest, plain
from bench.lease import SUFFIX, Lease, birth

T = TypeVar("T")
MANIFEST = "manifest.json"
LOCKS = "locks"
DEBRIS_AGE = 3600.0
"""Seconds after which a temporary folder of another stage, whose process is dead, is removed."""
FOREIGN_DEBRIS_AGE = 7 * 24 * DEBRIS_AGE
"""The same for one that another machine made."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a build took. ``peak_mb``: on CUDA the peak of memory allocated by torch; else the largest resident
    size of the whole process while the stage ran (where the system cannot reset that mark, since its start)."""

    seconds: float
    peak_mb: float | None
    device: str


@dataclass(frozen=True)
class Stored(Generic[T]):
    """A finished stage. ``cost``: of the build, even when it was ``reused``."""

    key: str
    folder: Path
    value: T
    cost: Cost
    reused: bool
    warnings: tuple[str, ...] = ()


@dataclass
class Store:
    """Artefacts below ``root``, shared by any number of processes."""

    root: Path
    _verified: dict[Path, object] = field(default_factory=dict, repr=False)

    def stage(
        self,
        name: str,
        version: int,
        inputs: Mapping[str, Any],
        build: Callable[[Context], T],
        codec: Codec[T],
        device: str = "cpu",
        progress: Progress = no_progress,
        seeded_by: Mapping[str, Any] | None = None,
    ) -> Stored[T]:
        """The value of stage ``name`` for ``inputs`` (plain JSON): reused when it is stored and intact, else built.

        ``build`` gets a Context whose folder becomes the artefact; its randomness comes from ``seeded_by``, or from
        all ``inputs`` when that is None. Raises BenchError when the disk refuses.
        """
        _check_name(name)
        described = describe(name, version, inputs, seeded_by)
        key = digest(described)
        final = self.root / name / key
        if self._problem(final) is None:
            return _loaded(final, codec)
        with told("store", self.root), self._lease(name, key):
            look_again(final.parent)
            problem = self._problem(final)
            if problem is None:
                return _loaded(final, codec)
            warnings = _set_aside(final, problem)
            cost = self._build(final, described, build, codec, device, progress)
        self._problem(final)
        return Stored(key, final, codec.load(final), cost, False, warnings)

    def find(self, name: str, key: str) -> Path | None:
        """The folder of a finished stage, or None."""
        final = self.root / name / key
        return final if (final / MANIFEST).is_file() else None

    def _lease(self, name: str, key: str) -> Lease:
        (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        (self.root / name).mkdir(exist_ok=True)
        return Lease(self.root / LOCKS / f"{name}-{key}{SUFFIX}", name)

    def _build(self, final: Path, described: dict[str, Any], build: Callable[[Context], T], codec: Codec[T],
               device: str, progress: Progress) -> Cost:
        clear_debris(final)
        temp = final.with_name(f".{final.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}")
        temp.mkdir()
        try:
            meter = Meter(device)
            share = self._share(meter, device, progress)
            codec.save(build(Context(seed_key(described), temp, device, progress, share)), temp)
            cost = meter.read()
            write_manifest(temp, {**described, "key": final.name}, cost)
            _publish(temp, final)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return cost

    def _share(self, meter: Meter, device: str, progress: Progress) -> Share:
        """Stages inside a stage: the outer one's cost includes theirs, whoever built them."""
        def share(name: str, version: int, inputs: Mapping[str, Any], build: Callable[[Context], Any],
                  codec: Codec[Any]) -> Any:
            meter.pause()
            stored = self.stage(name, version, inputs, build, codec, device, progress)
            meter.resume(stored.cost)
            return stored.value

        return share

    def _problem(self, folder: Path) -> str | None:
        """As ``verify``, but files that did not change since this process last read them are not read again."""
        signature = _signature(folder)
        if signature and self._verified.get(folder) == signature:
            return None
        problem = verify(folder)
        if problem is None:
            self._verified[folder] = signature
        return problem


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or name == LOCKS:
        raise BenchError(f"store: '{name}' cannot name a stage; give lower-case letters, digits, '_' and '-'.")


def describe(name: str, version: int, inputs: Mapping[str, Any], seeded_by: Mapping[str, Any] | None,
             ) -> dict[str, Any]:
    """What a stage's key is the digest of."""
    described = {"stage": name, "version": version, "inputs": plain(inputs, "inputs")}
    # Part of the key, lest two requests that differ in their randomness alone be taken for one.
    return described if seeded_by is None else {**described, "seeded_by": plain(seeded_by, "seeded_by")}


def seed_key(described: Mapping[str, Any]) -> str:
    """The source of a stage's randomness."""
    if "seeded_by" not in described:
        return digest(described)
    return digest({k: described[k] for k in ("stage", "version", "seeded_by")})


def write_manifest(folder: Path, described: Mapping[str, Any], cost: Cost) -> None:
    """Flush every file below ``folder`` and list it, with its hash, in the manifest."""
    listing = {}
    for path in _files(folder):
        flush_file(path)
        listing[path.relative_to(folder).as_posix()] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {**described, "files": listing, "cost": asdict(cost), "created": created}
    manifest["seal"] = _seal(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, sort_keys=True, allow_nan=False))  # an indent takes ten times as long
    flush_file(path)
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        flush_folder(inner)
    flush_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artefact; raises BenchError when it is missing, unreadable or altered."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        intact = manifest.pop("seal") == _seal(manifest)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BenchError(f"store: {path} cannot be read ({error}).") from error
    if not intact:
        raise BenchError(f"store: {path} was altered.")
    return dict(manifest)


def verify(folder: Path) -> str | None:
    """None when there is an artefact in ``folder`` and every file is as it was written; "" when there is none;
    else what is wrong with it."""
    if not folder.exists():
        return ""
    try:
        listing = read_manifest(folder)["files"]
    except BenchError as error:
        return str(error)
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(listing.keys() | found.keys()):
        if name not in found:
            return f"{folder / name} is missing."
        if name not in listing:
            return f"{folder / name} does not belong there."
        if file_digest(found[name]) != listing[name]["sha256"]:
            return f"{folder / name} does not match its hash."
    return None


def clear_debris(final: Path) -> None:
    """Remove temporary folders that dead processes left beside ``final``.

    Called under the lease of ``final``. Those of other stages go only when they are old, because this machine's
    name may be shared by containers that do not see each other's processes; those of other machines when they are
    very old, since a machine that was silent for long may still write.
    """
    for path in final.parent.glob(".*.*"):
        key, _, owner = path.name[1:].partition(".")
        host, _, rest = owner.partition("-")
        pid = rest.partition("-")[0]
        here = host == _host()
        if not pid.isdigit() or (here and birth(int(pid))):
            continue
        with contextlib.suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if (here and key == final.name) or age > (DEBRIS_AGE if here else FOREIGN_DEBRIS_AGE):
                shutil.rmtree(path, ignore_errors=True)


class Meter:
    """Time and memory of what runs between its making and ``read``. ``pause`` and ``resume`` enclose a stage inside
    the stage, which is counted by its own cost: the same whether it was built now or earlier."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0
        self.peak = 0.0
        self.started = self._start()

    def _start(self) -> float:
        if self._cuda():
            sys.modules["torch"].cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        return time.perf_counter()

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.started
        now = sys.modules["torch"].cuda.max_memory_allocated(self.device) if self._cuda() else _resident_peak()
        self.peak = max(self.peak, now / 1e6)

    def resume(self, inner: Cost) -> None:
        self.seconds += inner.seconds
        self.peak = max(self.peak, inner.peak_mb or 0.0)
        self.started = self._start()

    def read(self) -> Cost:
        self.pause()
        return Cost(round(self.seconds, 3), round(self.peak, 1), self.device)

    def _cuda(self) -> bool:
        """Whether torch is loaded and has used the GPU in this process."""
        torch = sys.modules.get("torch")
        return self.device.startswith("cuda") and torch is not None and bool(torch.cuda.is_initialized())


def _resident_peak() -> float:
    """Bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024.0
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _loaded(final: Path, codec: Codec[T]) -> Stored[T]:
    cost = Cost(**read_manifest(final)["cost"])
    return Stored(final.name, final, codec.load(final), cost, True)


def _set_aside(final: Path, problem: str) -> tuple[str, ...]:
    """Take a damaged artefact out of the way, and say so; nothing to do when there is none."""
    if not problem:
        return ()
    message = f"store: {problem} The artefact is built again."
    log.warning(message)
    aside = final.with_name(f".{final.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}")
    os.rename(final, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return (message,)


def _publish(temp: Path, final: Path) -> None:
    try:
        os.rename(temp, final)
    except OSError:
        # Where locks do not work, another process may have been first; its artefact has the same content key.
        if verify(final) is not None:
            raise
    flush_folder(final.parent)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _signature(folder: Path) -> object:
    """Changes when a file below ``folder`` is replaced or written to, as far as the file system tells."""
    stats = [(str(p), p.stat()) for p in [folder / MANIFEST, *_files(folder)] if p.is_file()]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
