"""What the machine offers a process: its cores, and memory that need not go back and forth to the kernel."""

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""An option of Linux's prctl(2)."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""
TOP_PAD = 1 << 28
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """What the CPU calls itself, or its architecture where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def end_with(parent: str) -> None:
    """Has Linux kill this process when its parent, the process `parent` by number, is gone; "" for no such wish."""
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


def free_memory() -> int:
    """Bytes that this process may still take, with a container's limit observed."""
    import psutil

    free = psutil.virtual_memory().available
    used = psutil.Process().memory_info().rss
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit():
            free = min(free, int(text) - used)
    return max(free, 0)


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
