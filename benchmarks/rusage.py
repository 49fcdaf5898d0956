"""Run a command and write its time and peak memory to a file as JSON: `python -I -S benchmarks/rusage.py FILE COMMAND…`.

This process is small on purpose: the kernel counts the memory of the parent at the start towards the peak of a new process.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    started = time.monotonic()
    process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
    _, status, usage = os.wait4(process, 0)
    result = {
        "seconds": time.monotonic() - started,
        "peak_bytes": usage.ru_maxrss * 1024,
        "started": started,
        "code": os.waitstatus_to_exitcode(status),
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)
