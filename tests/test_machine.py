"""A process of its own each: what is told to glibc holds for all of it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.machine import HUGE_PAGES, cpu_limit

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({}, None),
    ],
)
def test_the_limit_on_cpu_time_of_either_version_of_cgroups(files: dict[str, str], limit: float | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_limit(tmp_path) == limit


TOUCHED = """
import ctypes, resource, sys
from fivefold.machine import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = libc.malloc(size)
    libc.memset(taken, 1, size)
    libc.free(taken)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
print(kept, *(faults(int(sys.argv[2])) for _ in range(3)))
"""
PAGE = 4096


def faults(kept: str, size: int, *before: str) -> tuple[str, list[int]]:
    """What `keep_freed_memory` said, and the page faults of three times `size` bytes, each freed before the next."""
    command = [*before, sys.executable, "-c", TOUCHED, kept, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said, *counts = done.stdout.split()
    return said, [int(count) for count in counts]


def test_freed_memory_is_taken_again_without_the_kernel():
    size = 64 << 20
    _, usual = faults("usual", size)
    said, kept = faults("kept", size)
    assert said == "True"
    assert min(usual[1:]) > size // PAGE // 2
    assert max(kept[1:]) < size // PAGE // 100


@pytest.mark.slow
def test_more_than_two_gibibytes_stay_too():
    said, kept = faults("kept", 2200 << 20)
    assert said == "True"
    assert max(kept[1:]) < 1000


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="the kernel gives no huge pages on advice",
)
def test_the_heap_grows_in_huge_pages():
    size = 256 << 20
    _, kept = faults("kept", size)
    assert kept[0] < size // PAGE // 4


def test_a_limit_on_addresses_is_kept_to():
    said, kept = faults("kept", 64 << 20, "prlimit", "--data=8000000000")
    assert said == "True"
    assert max(kept[1:]) < 200
