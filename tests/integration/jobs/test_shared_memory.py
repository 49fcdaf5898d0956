"""Loader processes pass batches on in shared memory, which a container has little of: too little ends a stage with a hint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fivefold import build, system
from fivefold.distributed.ranks import Rank
from toy_data import LEARNS, environment, failure, run_stage

BATCH = 32 * 3 * 12 * 12
"""Bytes of the largest batch of the toy recipe: two training batches of 16 images are predicted at once."""


@pytest.fixture
def shared_memory(small_disk: Path, monkeypatch) -> Path:
    """A small file system in the place of /dev/shm."""
    monkeypatch.setattr(system, "SHARED_MEMORY", small_disk)
    return small_disk


def leave(folder: Path, free: int) -> None:
    """Fill the file system until about this many bytes are free."""
    (folder / "filler").write_bytes(bytes(system.free_shared_memory() - free))


def test_a_stage_ends_with_64_at_once_and_names_the_option_and_the_number_that_fits(toy_run, shared_memory, tmp_path):
    leave(shared_memory, 7 * BATCH)
    assert run_stage(toy_run, "train-fold", tmp_path, "FOLD=0", *LEARNS, "train.num_workers=2") == 64
    assert "--shm-size" in failure(tmp_path)
    assert "train.num_workers=1" in failure(tmp_path)
    assert run_stage(toy_run, "train-fold", tmp_path, "FOLD=0", *LEARNS, "train.num_workers=1") == 0


def test_without_a_number_fewer_processes_are_started_with_a_warning(shared_memory, monkeypatch, caplog):
    runtime = type("Gpu", (), {"device": torch.device("cuda"), "process_group": type("One", (), {"rank": Rank()})})
    monkeypatch.setattr(build, "count_cores", lambda: 4)
    assert build.choose_workers(-1, runtime, BATCH) == 4
    leave(shared_memory, 11 * BATCH)
    assert not caplog.records
    assert build.choose_workers(-1, runtime, BATCH) == 2
    assert "--shm-size" in caplog.text


LOADED = """
import torch
from torch.utils.data import Dataset
from fivefold.contract.failure import to_known_error
from fivefold.data.pipeline import dataset

dataset.LOADER_TIMEOUT_S = 3

class Large(Dataset):
    def __getitems__(self, samples):
        return torch.zeros(4 << 20, dtype=torch.uint8)

try:
    list(dataset.load_batches(Large(), [[(0, 0)]] * 8, workers=2))
except RuntimeError as error:
    raise SystemExit(to_known_error(error).exit_code)
"""


def test_batches_that_are_lost_for_lack_of_shared_memory_end_the_stage_with_75():
    mounted = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    isolated = ["unshare", "--mount", "sh", "-c", mounted, "sh"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount file systems")
    ended = subprocess.run(
        [*isolated, sys.executable, "-c", LOADED], env=environment(), capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == 75, ended.stderr.decode()
