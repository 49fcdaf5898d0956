"""Settings of the memory allocator, in fresh processes."""

import platform
import subprocess
import sys

import pytest

from fivefold.system import GLIBC_TUNABLES

FAULTS = """
import resource
for size in (64 << 20, 64 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused_without_page_faults():
    """Count the page faults of the second of two equal allocations."""
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS], env=environ, capture_output=True, check=True).stdout)
        for environ in ({}, {"GLIBC_TUNABLES": GLIBC_TUNABLES})
    ]
    assert faults[0] > 8000
    assert faults[1] < 100
