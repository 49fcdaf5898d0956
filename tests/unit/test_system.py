import os
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.system import GLIBC_TUNABLES, cpu_limit


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
def test_cpu_limit_reads_both_versions_of_cgroups(files: dict[str, str], limit: float | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_limit(tmp_path) == limit


def test_dockerfile_sets_the_same_malloc_tunables():
    dockerfile = (Path(__file__).parents[2] / "docker" / "Dockerfile").read_text()
    assert f"GLIBC_TUNABLES={GLIBC_TUNABLES} " in dockerfile


def test_end_process_runs_exit_functions_and_writes_buffered_output():
    ending = "atexit.register(print, 'last'); print('first'); end_process(66)"
    command = [sys.executable, "-c", f"import atexit; from fivefold.system import end_process; {ending}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (66, ["first", "last"], "")


def test_end_process_without_a_reader_gives_the_code_of_sigpipe():
    program = "import time; from fivefold.system import end_process; print('x'); time.sleep(0.5); end_process(0)"
    environ = {**os.environ, "PYTHONUNBUFFERED": ""}  # the flush at the end fails, not the print
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 141
