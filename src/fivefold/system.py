"""CPU cores, memory and process options of this machine."""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""An option of Linux's prctl(2)."""
GLIBC_TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"
"""Value of the variable of this name: glibc keeps freed memory, and uses huge pages. The image sets it too.

By default glibc maps each large tensor again, and the kernel zeroes its pages: a quarter of a small network's step on a CPU.
"""
DEADLINE = "FIVEFOLD_DEADLINE"
"""The variable with the end of a training process, in seconds since 1970. The launcher of a run sets it."""
TICK = 0.01
"""Resolution in seconds of Linux's CPU times."""
CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps shared memory. A container has 64 MB of it unless it is started with more."""
CGROUP_LIMITS = (CGROUPS / "memory.max", CGROUPS / "memory/memory.limit_in_bytes")


def count_cores() -> int:
    """Return the number of cores that this process may use, within a container's limit on CPU time."""
    cpus, limit = count_cpus(), cpu_limit()
    return cpus if limit is None else min(cpus, max(1, math.ceil(limit)))


def count_cpus() -> int:
    """Return the number of CPUs that this process may run on, without regard to a limit on CPU time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_limit(cgroups: Path = CGROUPS) -> float | None:
    """Return the CPU seconds per second that the container's cgroup (version 2 or 1) allows, or None without a limit."""
    quota, *period = _read_text(cgroups / "cpu.max").split() or [
        _read_text(cgroups / "cpu/cpu.cfs_quota_us"),
        _read_text(cgroups / "cpu/cpu.cfs_period_us"),
    ]
    return int(quota) / int(period[0]) if quota.isdigit() else None  # "max", "-1": no limit


def limit_threads(environ: MutableMapping[str, str]) -> None:
    """Set OMP_NUM_THREADS to the cores that a limit on CPU time allows, unless the user has set it.

    Libraries that load later count the machine's cores, and the kernel halts threads beyond the limit for the rest of each period.
    """
    if cpu_limit() is not None:
        environ.setdefault("OMP_NUM_THREADS", str(count_cores()))


def other_cpu_seconds() -> float:
    """Return the CPU seconds that other processes have used so far on this process's CPUs, in steps of TICK for each CPU."""
    import psutil

    times = psutil.cpu_times(percpu=True)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    idle = ("idle", "iowait", "guest", "guest_nice")  # user time already includes guest time
    busy = sum(
        sum(times[cpu]) - sum(getattr(times[cpu], name, 0.0) for name in idle) for cpu in cpus if cpu < len(times)
    )
    return busy - time.process_time()


def die_with_parent(parent: str) -> None:
    """Ask Linux to kill this process when its parent, the process id `parent`, is gone. An empty text: do nothing."""
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def free_memory() -> int:
    """Return the bytes that this process may still allocate, within a container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    used = psutil.Process().memory_info().rss
    for path in CGROUP_LIMITS:
        if (limit := _read_text(path)).isdigit():
            free = min(free, int(limit) - used)
    return max(free, 0)


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory, or None if this system has no limit on it."""
    if not SHARED_MEMORY.is_dir():
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def _read_text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
