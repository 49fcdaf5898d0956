"""Runs a command and writes what it used as JSON to a file: `python -I -S benchmarks/meter.py FILE COMMAND…`.

A process of little memory of its own, because the kernel counts to a new process's peak what its parent held when it was
started; and with few imports, because it stands between every two processes that are measured.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    begun = time.monotonic()
    process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
    _, status, used = os.wait4(process, 0)
    told = {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "begun": begun,
        "code": os.waitstatus_to_exitcode(status),
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(told, file)
