"""Each kind of stage on a full disk: exit code 75, no partial files, and the same command succeeds once there is space."""

from pathlib import Path

import pytest

from toy_data import LEARNS, failure, run_stage

STAGES = {
    "split": ["split.folds=3", "split.holdout=0.1"],
    "prepare": [],
    "train-fold": ["FOLD=0", *LEARNS, "train.epochs=1"],
    "ensemble": [],
    "evaluate": [],
}
"""The arguments of each stage."""


def run_in_folder(root: Path, name: str, folder: Path) -> int:
    """Run a stage on the toy run. It writes everything to one folder, except for the failure file."""
    channels = {
        "MODEL": root, "PREDICTIONS": root / "ensemble" / "output",
        "SM_MODEL_DIR": folder, "SM_OUTPUT_DATA_DIR": folder, "SM_OUTPUT_DIR": folder.parent.parent / "failed",
    }  # fmt: skip
    if name == "split":
        channels["FOLDS"] = None
    return run_stage(root, name, folder, *STAGES[name], **channels)


@pytest.mark.parametrize("name", STAGES)
def test_full_disk_exits_with_75_and_leaves_no_partial_files(name, toy_run, small_disk, tmp_path):
    folder = small_disk / "out"
    for free_kib in (0, 4):
        (small_disk / "filler").write_bytes(bytes((8 * 1024 - free_kib) * 1024))
        assert run_in_folder(toy_run, name, folder) == 75
        assert failure(tmp_path / "failed")
        assert not (folder / "stage.json").exists()
        assert not list(small_disk.rglob(".*.tmp")), "temporary files remain"
        (small_disk / "filler").unlink()
    assert run_in_folder(toy_run, name, folder) == 0
