"""What the machine offers a process: its cores, and memory that need not go back and forth to the kernel."""

import ctypes
import math
import os
import platform
import resource
import signal
import sys
from collections.abc import MutableMapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""An option of Linux's prctl(2)."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1
"""Parameters of glibc's mallopt(3), and the threshold that no free memory is above."""
MADV_HUGEPAGE = 14
"""An advice of Linux's madvise(2)."""
HUGE_PAGES, OVERCOMMIT = Path("/sys/kernel/mm/transparent_hugepage/enabled"), Path("/proc/sys/vm/overcommit_memory")
TOP_PAD = 1 << 28
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_LIMITS = (CGROUPS / "memory.max", CGROUPS / "memory/memory.limit_in_bytes")


def count_cores() -> int:
    """The cores that this process may use, with a container's limit on CPU time observed."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return there if limit is None else min(there, max(1, math.ceil(limit)))


def cpu_limit(cgroups: Path = CGROUPS) -> float | None:
    """Seconds of CPU time a second that the container's cgroup (version 2 or 1) allows, None without a limit."""
    own, *given = _words_of(cgroups / "cpu.max").split() or [
        _words_of(cgroups / "cpu/cpu.cfs_quota_us"),
        _words_of(cgroups / "cpu/cpu.cfs_period_us"),
    ]
    return int(own) / int(given[0]) if own.isdigit() else None  # "max", "-1": no limit


def start_no_more_threads(environ: MutableMapping[str, str]) -> None:
    """Has libraries that load later start as many threads as a limit on CPU time lets run, where the user does not say it.

    They count the machine's cores, and threads beyond the limit have all of them stand still for the rest of each period.
    """
    if cpu_limit() is not None:
        environ.setdefault("OMP_NUM_THREADS", str(count_cores()))


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
    """Tells glibc not to return freed memory, and to take it in huge pages; whether it took it (elsewhere there is no such call).

    A training step on a CPU frees and allocates the same tensors again and again. By default glibc
    maps each large one afresh, and the kernel zeroes every page of it: a quarter of a small network's step.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if getattr(libc, "mallopt", None) is None:
        return False
    kept = all([libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, NEVER), libc.mallopt(M_TOP_PAD, TOP_PAD)])
    if kept:
        _take_huge_pages(libc)
    return kept


def _take_huge_pages(libc: ctypes.CDLL) -> None:
    """Has the kernel use huge pages for the heap as it grows, where it gives them on advice and no limit stands against it.

    Addresses alone are taken for it, as many as there is free memory: what is advised must be mapped, and a heap
    that grows afterwards does so in common pages.
    """
    limited = any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )
    if limited or _words_of(OVERCOMMIT) == "2" or "[madvise]" not in _words_of(HUGE_PAGES):
        return
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free(libc.malloc(free_memory()))  # of what cannot be had malloc gives nothing, which free takes
    for start, end in _heaps():
        libc.madvise(start, end - start, MADV_HUGEPAGE)


def _heaps() -> list[tuple[int, int]]:
    """Where the parts of this process's heap begin and end."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def _words_of(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
