"""Writing files that survive: flushed to disk, renamed into place, and one clear error when a disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from bench.errors import BenchError

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file is larger than the system allows"}
REFUSED = {errno.EROFS: "the disk is read-only", errno.EACCES: "writing is not permitted",
           errno.EPERM: "writing is not permitted"}


@contextlib.contextmanager
def told(what: str, folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk, met while writing in ``folder``, into one BenchError that names the folder."""
    try:
        yield
    except BenchError:
        raise
    except Exception as error:
        trouble = disk_trouble(error, folder)
        if trouble is None:
            raise
        raise BenchError(f"{what}: cannot write in {folder}: {trouble}. Nothing that was finished is lost; make room "
                         "there (or make it writable), or choose another folder, and run the same again.") from error


def disk_trouble(error: BaseException | None, folder: Path) -> str | None:
    """What is wrong with the disk below ``folder``, when that is what ``error`` or its cause says."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found = _trouble(error, folder)
        if found:
            return found
        error = error.__cause__ or error.__context__
    return None


def _trouble(error: BaseException, folder: Path) -> str | None:
    if isinstance(error, OSError) and error.errno in FULL:
        return FULL[error.errno]
    if isinstance(error, OSError) and error.errno in REFUSED:
        named = os.path.abspath(str(error.filename or folder))
        return REFUSED[error.errno] if named.startswith(os.path.abspath(folder)) else None
    # Writers in other languages (safetensors, torch) raise errors of their own with the system's text in them.
    return FULL[errno.ENOSPC] if "no space left on device" in str(error).lower() else None


def flush_file(path: Path) -> None:
    """Make sure that a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk, where the system can do it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def look_again(folder: Path) -> None:
    """Make a folder on a network drive show what other machines have put there: opening it asks the server."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY))


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file that is either the old one or the new one, whole, whatever happens meanwhile."""
    data = content.encode() if isinstance(content, str) else content
    temp = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    flush_folder(path.parent)


def inside(folder: Path, relative: str) -> Path:
    """``folder / relative``; refuses a path that leads out of ``folder``."""
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BenchError(f"{folder}: the path '{relative}' leads out of this folder.")
    return path
