"""RUN=first: stages by hand, with no path but those of the images, write what a submitted run would."""

from pathlib import Path

import pytest

from fivefold.contract.stage_specs import METRICS, OOF, RECORD
from jobs.__main__ import main, run
from toy_data import SETTINGS as TINY
from toy_data import noise_in, write_test_table

SETTINGS = ["split.folds=2", *TINY]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images of two classes, and six to predict with their truth; runs lie beside them."""
    noise_in(tmp_path / "train", ["a", "b"], 6)
    noise_in(tmp_path / "eval", ["images"], 6, seed=1)
    write_test_table(tmp_path / "eval", 6, truth=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_stages_by_hand_are_a_run_that_submit_finds_done(data: Path, capfd):
    given = {"SM_CHANNEL_TRAIN": "train", "SM_CHANNEL_EVAL": "eval", "RUN": "first"}
    for stage, more in [
        ("split", {}),
        ("train-fold", {"FOLD": "0"}),
        ("train-fold", {"JOB_COMPLETION_INDEX": "1"}),
        ("ensemble", {}),
        ("evaluate", {}),
        ("distill", {}),
    ]:
        assert run(stage, SETTINGS, {**given, **more}) == 0
    folder = data / "runs" / "first"
    assert (folder / "fold-1" / "model" / OOF).is_file()
    assert '"accuracy"' in (folder / "evaluate" / "output" / METRICS).read_text(), "the truth beside test.csv was found"
    before = {path: path.read_bytes() for path in folder.rglob(RECORD)}
    assert len(before) == 6

    stages = "stages=split,train-fold,ensemble,evaluate,distill"
    assert main(["submit", "train=train", "eval=eval", "run=first", stages, *SETTINGS]) == 0
    assert {path: path.read_bytes() for path in before} == before
    said = capfd.readouterr()
    assert " runs: split" not in said.out + said.err
    assert (said.out + said.err).count("nothing to do") == 6
