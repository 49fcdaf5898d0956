"""What the machine offers a process: its cores, and memory that need not go back and forth to the kernel."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""
TOP_PAD = 1 << 28


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Tells glibc not to return freed memory; whether it took it (elsewhere there is no such call).

    A training step on a CPU frees and allocates the same tensors again and again. By default glibc
    maps each large one afresh, and the kernel zeroes every page of it: a quarter of a small network's step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, TOP_PAD)])
