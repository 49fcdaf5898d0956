import os

import pytest
import torch

from fivefold.errors import RetryableError
from fivefold.training.checkpoints import Checkpoints


def test_checkpoint_that_contains_code_is_not_loaded(tmp_path):
    """Others may write to the bucket of a checkpoint, so no code in its pickle may run."""

    class MaliciousObject:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "kept").mkdir()
    torch.save({"x": MaliciousObject()}, tmp_path / "kept" / "00000001.pt")
    assert Checkpoints(tmp_path / "kept").load() is None
    assert not (tmp_path / "run").exists()


def test_last_two_checkpoints_are_kept_and_survive_a_full_disk(tiny_disk):
    checkpoints = Checkpoints(tiny_disk / "kept")
    for number in range(4):
        checkpoints.save({"number": number, "weights": torch.zeros(1000)})
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["00000003.pt", "00000004.pt"]
    with pytest.raises(RetryableError, match="no space left"):
        checkpoints.save({"number": 4, "weights": torch.zeros(50_000)})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == names
    assert checkpoints.load()["number"] == 3


def test_checkpoints_are_due_after_the_set_minutes_or_steps(tmp_path):
    now, due_by_time = [0.0], []
    all_checkpoints = [Checkpoints(tmp_path, *limits, clock=lambda: now[0]) for limits in ((2, 0), (0, 3), (0, 0))]
    for now[0] in (60.0, 119.0, 120.0, 130.0):
        due_by_time.append([checkpoints.due() for checkpoints in all_checkpoints])
        for checkpoints, due in zip(all_checkpoints, due_by_time[-1], strict=True):
            if due:
                checkpoints.save({})
    assert due_by_time == [[False, False, False], [False, False, False], [True, True, False], [False, False, False]]
