"""Each stage on a disk that fills up: exit 75, nothing half-written, and the same command goes on once there is room."""

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
"""Of each stage its arguments, and a file that it writes."""


def stage(root: Path, name: str, folder: Path) -> int:
    """Runs a stage over the toy run with one folder for all that it writes, but for the failure file."""
    channels = {
        "MODEL": root, "PREDICTIONS": root / "ensemble" / "output", "IMAGES": root / "eval" / "test",
        "SM_MODEL_DIR": folder, "SM_OUTPUT_DATA_DIR": folder, "SM_OUTPUT_DIR": folder.parent.parent / "failed",
    }  # fmt: skip
    if name in ("split", "predict"):
        channels["FOLDS"] = None
    return run_stage(root, name, folder, *STAGES[name][0], **channels)


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_75_and_nothing_is_half_written(name, toy_run, small_disk, tmp_path):
    folder, elsewhere = small_disk / "out", tmp_path / "elsewhere" / "out"
    assert stage(toy_run, name, elsewhere) == 0
    for left in (0, 4):
        (small_disk / "filler").write_bytes(bytes((8 * 1024 - left) * 1024))
        assert stage(toy_run, name, folder) == 75
        assert "free some, then run the same command again" in failure(tmp_path / "failed")
        assert not (folder / "stage.json").exists()
        assert not list(small_disk.rglob(".*.tmp")), "temporary files"
        (small_disk / "filler").unlink()
    assert stage(toy_run, name, folder) == 0
    made, expected = (next(root.glob(STAGES[name][1])) for root in (folder, elsewhere))
    assert made.read_bytes() == expected.read_bytes()
