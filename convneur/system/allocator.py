"""glibc's allocator, which gives memory back to the kernel at the end of one step and fetches it again in the next."""

import ctypes
import platform

# <malloc.h>'s names. Arrays above the second, of which this is the largest value, always go back when they are freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """Lets this process keep what it has freed. The kernel clears every page that it hands out, which takes longer than
    many of PyTorch's operations; what a step needs is needed by the next one. Does nothing with other allocators.
    """
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM)
        glibc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP)
