"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

HEAP = """
import ctypes, sys
sys.path.insert(0, {root!r})
from bench.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks mapped a b c d e f".split()]
libc.mallinfo2.restype = Info
if {keep}:
    assert keep_freed_memory()
before = libc.mallinfo2()
for block in [libc.malloc(30 << 20) for _ in range(9)]:
    libc.free(block)
print((libc.mallinfo2().arena - before.arena) >> 20)
"""


def kept(keep: bool) -> int:
    """Megabytes that the heap has grown by once nine blocks of 30 are freed."""
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", HEAP.format(root=root, keep=keep)], check=True, capture_output=True,
                          text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_freed_blocks_stay_with_the_process() -> None:
    assert kept(keep=False) < 30
    assert kept(keep=True) >= 270
