"""Each stage on a full disk: exit code 75, no partial files, and the same command succeeds once there is space."""

from pathlib import Path

import pytest

from toy_data import LEARNS, failure, run_stage

pytestmark = pytest.mark.slow
STAGES = {
    "split": (["split.folds=3", "split.holdout=0.1"], "folds.parquet"),
    "prepare": ([], "*/pixels.u8"),
    "train-fold": (["FOLD=0", *LEARNS], "model.safetensors"),
    "ensemble": ([], "predictions.parquet"),
    "evaluate": ([], "metrics.json"),
    "distill": (LEARNS, "model.safetensors"),
    "predict": (["predict.file=answers.csv"], "answers.csv"),
    "export": (["export.format=pth", "FOLD=0"], "model.pth"),
}
"""The arguments of each stage, and a file that it writes."""


def run_in_folder(root: Path, name: str, folder: Path) -> int:
    """Run a stage on the toy run. It writes everything to one folder, except for the failure file."""
    channels = {
        "MODEL": root, "PREDICTIONS": root / "ensemble" / "output", "IMAGES": root / "eval" / "test",
        "SM_MODEL_DIR": folder, "SM_OUTPUT_DATA_DIR": folder, "SM_OUTPUT_DIR": folder.parent.parent / "failed",
    }  # fmt: skip
    if name in ("split", "predict"):
        channels["FOLDS"] = None
    return run_stage(root, name, folder, *STAGES[name][0], **channels)


@pytest.mark.parametrize("name", STAGES)
def test_full_disk_exits_with_75_and_leaves_no_partial_files(name, toy_run, small_disk, tmp_path):
    folder, reference = small_disk / "out", tmp_path / "elsewhere" / "out"
    assert run_in_folder(toy_run, name, reference) == 0
    for free_kib in (0, 4):
        (small_disk / "filler").write_bytes(bytes((8 * 1024 - free_kib) * 1024))
        assert run_in_folder(toy_run, name, folder) == 75
        assert "free some, then run the same command again" in failure(tmp_path / "failed")
        assert not (folder / "stage.json").exists()
        assert not list(small_disk.rglob(".*.tmp")), "temporary files remain"
        (small_disk / "filler").unlink()
    assert run_in_folder(toy_run, name, folder) == 0
    actual, expected = (next(root.glob(STAGES[name][1])) for root in (folder, reference))
    assert actual.read_bytes() == expected.read_bytes()
