"""The C library's allocator, told to keep what a training step frees: the next step wants as much again."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
LARGEST = 32 << 20
"""The largest block, in bytes, that glibc serves from memory it keeps."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees until it ends; returns whether it will.

    By default glibc gives memory back after every step, and the kernel clears each page of it again, which takes small
    models 5 to 15 % of their time. Where the C library knows no mallopt (macOS, musl) nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
