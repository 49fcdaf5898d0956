"""What the machine offers a process: its cores, its memory, and how both are used."""

import ctypes
import math
import os
import platform
import signal
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""An option of Linux's prctl(2)."""
GLIBC_TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"
"""The variable of this name by which glibc keeps freed memory, and takes it in huge pages; the image sets it too.

A training step on a CPU frees and allocates the same tensors again and again. By default glibc
maps each large one afresh, and the kernel zeroes every page of it: a quarter of a small network's step.
"""
TICK = 0.01
"""Seconds in which Linux counts the time of a CPU."""
CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps shared memory. A container has 64 MB of it unless it is started with more."""
CGROUP_LIMITS = (CGROUPS / "memory.max", CGROUPS / "memory/memory.limit_in_bytes")


def count_cores() -> int:
    """The cores that this process may use, with a container's limit on CPU time observed."""
    there, limit = count_cpus(), cpu_limit()
    return there if limit is None else min(there, max(1, math.ceil(limit)))


def count_cpus() -> int:
    """The CPUs that this process may run on, whatever share of their time it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def seconds_of_others() -> float:
    """CPU seconds that all but this process have taken so far on the CPUs that it may use, in steps of TICK for each of them."""
    import psutil

    each = psutil.cpu_times(percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(each))
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in the user's too
    busy = sum(sum(each[cpu]) - sum(getattr(each[cpu], name, 0.0) for name in idle) for cpu in own if cpu < len(each))
    return busy - time.process_time()


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


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory, or None if this system has no limit on it."""
    if not SHARED_MEMORY.is_dir():
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def _words_of(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
