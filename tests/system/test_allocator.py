"""Memory that a training process has had stays with it."""

import platform
import subprocess
import sys

import pytest

# glibc's own account, not page faults: how many there are depends on the machine's kernel and glibc's defaults there.
SCRIPT = """
import ctypes
from convneur.system.allocator import keep_freed_memory

glibc = ctypes.CDLL(None)
glibc.malloc.restype, glibc.malloc.argtypes, glibc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "heap b c mapped_blocks e f g h i j".split()]
glibc.mallinfo2.restype = Account

keep_freed_memory()
before = glibc.mallinfo2()
blocks = [glibc.malloc(16 * 2**20) for _ in range(8)]
held = glibc.mallinfo2()
for block in blocks:
    glibc.free(block)
freed = glibc.mallinfo2()
print(held.mapped_blocks - before.mapped_blocks, held.heap - before.heap >= 7 * 16 * 2**20, freed.heap == held.heap)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split(".")[:2])) < (2, 33),
    reason="no mallinfo2, which tells what the allocator holds",
)
def test_freed_memory_stays_in_the_heap() -> None:
    """Large blocks are cut from the heap and not mapped one by one, and the heap doesn't shrink when they are freed."""
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["0", "True", "True"]
