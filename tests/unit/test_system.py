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
