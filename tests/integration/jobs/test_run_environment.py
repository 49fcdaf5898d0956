"""With RUN=first, stages run by hand need only the image paths and write the same files as a submitted run."""

from pathlib import Path

import pytest

from fivefold.contract.stage_specs import METRICS, OOF, RECORD
from jobs.__main__ import main, run
from toy_data import SETTINGS as TINY
from toy_data import noise_in, write_test_table

SETTINGS = ["split.folds=2", *TINY]


@pytest.fixture
def image_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images of two classes and six test images with ground truth; runs are written beside them."""
    noise_in(tmp_path / "train", ["a", "b"], 6)
    noise_in(tmp_path / "eval", ["images"], 6, seed=1)
    write_test_table(tmp_path / "eval", 6, truth=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_submit_skips_stages_that_were_run_by_hand(image_folders: Path, capfd):
    channels = {"SM_CHANNEL_TRAIN": "train", "SM_CHANNEL_EVAL": "eval", "RUN": "first"}
    for stage, variables in [
        ("split", {}),
        ("train-fold", {"FOLD": "0"}),
        ("train-fold", {"JOB_COMPLETION_INDEX": "1"}),
        ("ensemble", {}),
        ("evaluate", {}),
        ("distill", {}),
    ]:
        assert run(stage, SETTINGS, {**channels, **variables}) == 0
    folder = image_folders / "runs" / "first"
    assert (folder / "fold-1" / "model" / OOF).is_file()
    assert '"accuracy"' in (folder / "evaluate" / "output" / METRICS).read_text(), "ground truth beside test.csv"
    records_before = {path: path.read_bytes() for path in folder.rglob(RECORD)}
    assert len(records_before) == 6

    stages = "stages=split,train-fold,ensemble,evaluate,distill"
    assert main(["submit", "train=train", "eval=eval", "run=first", stages, *SETTINGS]) == 0
    assert {path: path.read_bytes() for path in records_before} == records_before
    printed = capfd.readouterr()
    assert " runs: split" not in printed.out + printed.err
    assert (printed.out + printed.err).count("nothing to do") == 6
