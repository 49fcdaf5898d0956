"""Loader processes pass batches through shared memory; if a container has too little, the stage exits with a hint."""

import subprocess
import sys

import pytest
import torch

from fivefold import build, system
from fivefold.distributed.ranks import Rank
from fivefold.errors import SettingsError
from toy_data import environment

BATCH_BYTES = 32 * 3 * 12 * 12


def test_workers_that_do_not_fit_are_an_error_or_fewer_with_a_warning(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(system, "SHARED_MEMORY", small_disk)
    runtime = type("Gpu", (), {"device": torch.device("cuda"), "process_group": type("One", (), {"rank": Rank()})})
    monkeypatch.setattr(build, "count_cores", lambda: 4)
    assert build.choose_workers(-1, runtime, BATCH_BYTES) == 4
    (small_disk / "filler").write_bytes(bytes(system.free_shared_memory() - 11 * BATCH_BYTES))
    assert not caplog.records
    assert build.choose_workers(-1, runtime, BATCH_BYTES) == build.choose_workers(2, runtime, BATCH_BYTES) == 2
    assert "--shm-size" in caplog.text
    with pytest.raises(SettingsError, match=r"--shm-size.*train\.num_workers=2"):
        build.choose_workers(3, runtime, BATCH_BYTES)


LOADER_PROGRAM = """
import torch
from torch.utils.data import Dataset
from fivefold.contract.failure import to_known_error
from fivefold.data.pipeline import dataset

dataset.LOADER_TIMEOUT_S = 1

class Large(Dataset):
    def __getitems__(self, samples):
        return torch.zeros(4 << 20, dtype=torch.uint8)

try:
    list(dataset.load_batches(Large(), [[(0, 0)]] * 8, workers=2))
except RuntimeError as error:
    raise SystemExit(to_known_error(error).exit_code)
"""


@pytest.mark.slow
def test_batches_lost_for_lack_of_shared_memory_exit_75():
    mount_command = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    isolated = ["unshare", "--mount", "sh", "-c", mount_command, "sh"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount file systems")
    command = [*isolated, sys.executable, "-c", LOADER_PROGRAM]
    result = subprocess.run(command, env=environment(), capture_output=True, timeout=60, check=False)
    assert result.returncode == 75, result.stderr.decode()
