"""Loader processes pass batches through shared memory; if a container has too little, the stage exits with a hint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fivefold import build, system
from fivefold.distributed.ranks import Rank
from toy_data import LEARNS, environment, failure, run_stage

BATCH_BYTES = 32 * 3 * 12 * 12
"""Largest batch of the toy recipe: prediction takes two training batches of 16 images at once."""


@pytest.fixture
def shared_memory(small_disk: Path, monkeypatch) -> Path:
    """Replace /dev/shm with a small file system."""
    monkeypatch.setattr(system, "SHARED_MEMORY", small_disk)
    return small_disk


def fill_until_free(folder: Path, free: int) -> None:
    """Fill the file system until about this many bytes are free."""
    (folder / "filler").write_bytes(bytes(system.free_shared_memory() - free))


def test_too_many_workers_exit_64_and_name_the_option_and_a_number_that_fits(toy_run, shared_memory, tmp_path):
    fill_until_free(shared_memory, 7 * BATCH_BYTES)
    assert run_stage(toy_run, "train-fold", tmp_path, "FOLD=0", *LEARNS, "train.num_workers=2") == 64
    assert "--shm-size" in failure(tmp_path)
    assert "train.num_workers=1" in failure(tmp_path)
    assert run_stage(toy_run, "train-fold", tmp_path, "FOLD=0", *LEARNS, "train.num_workers=1") == 0


def test_automatic_worker_count_is_reduced_with_a_warning(shared_memory, monkeypatch, caplog):
    runtime = type("Gpu", (), {"device": torch.device("cuda"), "process_group": type("One", (), {"rank": Rank()})})
    monkeypatch.setattr(build, "count_cores", lambda: 4)
    assert build.choose_workers(-1, runtime, BATCH_BYTES) == 4
    fill_until_free(shared_memory, 11 * BATCH_BYTES)
    assert not caplog.records
    assert build.choose_workers(-1, runtime, BATCH_BYTES) == 2
    assert "--shm-size" in caplog.text


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


def test_batches_lost_for_lack_of_shared_memory_exit_75():
    mount_command = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    isolated = ["unshare", "--mount", "sh", "-c", mount_command, "sh"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount file systems")
    command = [*isolated, sys.executable, "-c", LOADER_PROGRAM]
    result = subprocess.run(command, env=environment(), capture_output=True, timeout=60, check=False)
    assert result.returncode == 75, result.stderr.decode()
