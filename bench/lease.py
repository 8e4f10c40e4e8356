"""Leases: who works on what, in a folder that processes of many machines share.

A lease is a small file that appears in one step and whose owner touches it now and then, its heartbeat. It needs no
lock daemon and no clocks that agree. Of the folder it assumes what NFS (version 3 or newer), Lustre, BeeGFS and local
disks promise: ``O_CREAT | O_EXCL`` and ``rename`` happen once, opening a file shows its newest times, and "touch it
now" and a new file's time come from one clock, the server's. A lease is a hint that saves work done twice. Whether
what is built is right must rest on something stronger, such as a rename into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

PATIENCE = 90.0
"""Seconds of silence after which a lease is taken over. The environment's BENCH_LEASE changes it."""
BEATS = 6
"""Heartbeats within that time."""
TELL = 60.0
"""Seconds of waiting after which the log says for whom."""
SUFFIX = ".lease"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lease. ``machine``: processes of the same one see each other. ``born``: tells a process from a later
    one with its number. ``what``: what is being done. ``since``: seconds since 1970, by the owner's clock.
    ``patience``: the silence, in seconds, after which it gives the lease up."""

    token: str
    host: str
    machine: str
    pid: int
    born: str
    what: str
    since: float
    patience: float

    def known_dead(self) -> bool:
        """Whether its process is seen to be gone; only ever true on its own machine."""
        if self.machine != machine():
            return False
        now = birth(self.pid)
        return not now or ("?" not in (now, self.born) and now != self.born)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Seen:
    """A lease file at one moment. ``age``: seconds since the last heartbeat. ``owner``: None while it says nothing."""

    text: str
    age: float
    owner: Owner | None

    def over(self) -> bool:
        patience = self.owner.patience if self.owner else default_patience()
        return self.age > patience or bool(self.owner and self.owner.known_dead())


@dataclass
class Lease:
    """The exclusive right to do ``what``, as long as this process lives and its heart beats."""

    path: Path
    what: str = ""
    patience: float = field(default_factory=lambda: default_patience())
    _owner: Owner | None = None
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Lease:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def take(self) -> None:
        """Wait until it is ours: released by its owner, or left by one that died or fell silent."""
        started, pause, told = time.monotonic(), 0.02, False
        while not self.try_take():
            if not told and time.monotonic() - started > TELL:
                told = True
                log.info("Waiting for %s: %s", owner_of(self.path), self.what or self.path.name)
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def try_take(self) -> bool:
        """Whether it is ours now. Raises OSError where the folder refuses new files."""
        seen = look(self.path)
        if seen is None:
            return self._create()
        if not seen.over() or not evict(self.path, seen):
            return False
        log.info("Taken over from %s: %s", seen.owner or "a process that left no name", self.path.name)
        return self._create()

    def _create(self) -> bool:
        owner = Owner(secrets.token_hex(8), socket.gethostname(), machine(), os.getpid(), birth(os.getpid()), self.what,
                      time.time(), self.patience)
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(handle, json.dumps(asdict(owner)).encode())
        except OSError:
            os.close(handle)
            self.path.unlink(missing_ok=True)
            raise
        self._owner, self._end = owner, threading.Event()
        threading.Thread(target=self._beat, args=(handle, self._end), daemon=True).start()
        return True

    def _beat(self, handle: int, end: threading.Event) -> None:
        """Touch the file that was made, wherever it is now: never one that another owner put in its place."""
        while not end.wait(self.patience / BEATS):
            with contextlib.suppress(OSError):
                os.utime(handle)
        os.close(handle)

    def release(self) -> None:
        """Give it back; without effect where it was lost, apart from a line in the log."""
        if self._owner is None:
            return
        mine, self._owner = self._owner, None
        with contextlib.suppress(OSError):
            if parsed(self.path.read_text(errors="replace")) == mine:
                self.path.unlink()
            else:
                log.warning("%s was taken over: its owner had been silent for %g s.", self.path, self.patience)
        self._end.set()


def look(path: Path) -> Seen | None:
    """The lease at ``path``, None where there is none. It is opened, since that shows its newest times."""
    try:
        with path.open("rb") as file:
            text, touched = file.read().decode(errors="replace"), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    return Seen(text, folder_time(path.parent) - touched, parsed(text))


def parsed(text: str) -> Owner | None:
    """The owner that a lease names; None where it is not, or not yet, whole."""
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def evict(path: Path, seen: Seen) -> bool:
    """Take a lease that is over out of the way; false if another was faster."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    mistaken = aside.read_text(errors="replace") != seen.text
    if mistaken:  # between the look and the rename another did the same, and now holds it
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return not mistaken


def owner_of(path: Path) -> Owner | None:
    """Who holds the lease at ``path`` now; None if nobody does."""
    try:
        seen = look(path)
    except OSError:
        return None
    return None if seen is None or seen.over() else seen.owner


def owners(folder: Path) -> dict[str, Owner]:
    """The name of each lease in a folder -> who holds it now."""
    held = {path.name.removesuffix(SUFFIX): owner_of(path) for path in sorted(folder.glob(f"[!.]*{SUFFIX}"))}
    return {name: owner for name, owner in held.items() if owner is not None}


def clear(folder: Path) -> None:
    """Remove the leases that dead or silent owners left in a folder."""
    for path in folder.glob(f"[!.]*{SUFFIX}"):
        with contextlib.suppress(OSError):
            seen = look(path)
            if seen is not None and seen.over():
                evict(path, seen)


@contextlib.contextmanager
def announced(path: Path, what: str) -> Iterator[None]:
    """Hold a lease that nobody competes for, so that others see what is under way; a disk that refuses is no reason
    not to work."""
    lease = Lease(path, what)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lease.try_take()
    try:
        yield
    finally:
        lease.release()


def default_patience() -> float:
    try:
        return max(1.0, float(os.environ["BENCH_LEASE"]))
    except (KeyError, ValueError):
        return PATIENCE


def folder_time(folder: Path) -> float:
    """Now, by the clock that stamps this folder's files; by this machine's where the folder refuses a file."""
    probe = folder / f".clock.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with probe.open("xb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def birth(pid: int) -> str:
    """When a process of this machine started; "" when it is gone, "?" where the system does not tell."""
    with contextlib.suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    return "?" if _there(pid) else ""


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@cache
def machine() -> str:
    """The same for processes that see each other: one host since its last start, one container."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
