"""What runs again after a change: exactly the stages that it concerns, each with its reason."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toy_data import SETTINGS, call_jobs, copy_run, noise_in, write_test_table

pytestmark = pytest.mark.slow
FOLDS = {"fold-0", "fold-1"}
ANSWERS = {"evaluate", "evaluate-student"}
AFTER_FOLDS = {"ensemble", "distill", "ensemble-student", *ANSWERS}
EVERYTHING = {"split", *FOLDS, *AFTER_FOLDS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that is done."""
    root = tmp_path_factory.mktemp("finished")
    noise_in(root, ("train/a", "train/b", "eval/images"), 6)
    write_test_table(root / "eval", 6, truth=True)
    assert set(reasons(root)) == EVERYTHING
    return root


def reasons(root: Path, *arguments: str) -> dict[str, str]:
    """Submits the run; why each step ran that did."""
    given = ["train=train", "eval=eval", "run=r", "check=false", "split.folds=2", *SETTINGS, *arguments]
    done = call_jobs("submit", *given, folder=root, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(re.findall(r"^\[([\w-]+)\] .* runs: (.*)$", done.stdout + done.stderr, re.MULTILINE))


def one_pixel(root: Path) -> None:
    path = root / "train" / "a" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def one_label(root: Path) -> None:
    shutil.move(root / "train" / "a" / "0.png", root / "train" / "b" / "6.png")


def one_answer(root: Path) -> None:
    path = root / "eval" / "gt.csv"
    path.write_text(path.read_text("utf-8-sig").replace("5,b", "5,a"))


def nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "arguments", "expected", "reason"),
    [
        (one_pixel, [], EVERYTHING, "split: inputs differ: train"),
        (one_label, [], EVERYTHING, "fold-0: inputs differ: folds"),
        (one_answer, [], ANSWERS, "evaluate: inputs differ: ground_truth"),
        (nothing, ["train.lr=0.1"], {*FOLDS, *AFTER_FOLDS}, "fold-0: settings differ: train.lr 0.001 -> 0.1"),
        (nothing, ["distill.alpha=0.1"], {"distill", "ensemble-student", "evaluate-student"},
         "distill: settings differ: distill.alpha 0.7 -> 0.1"),
        (nothing, ["evaluate.top_k=1"], ANSWERS, "evaluate: settings differ: evaluate.top_k 5 -> 1"),
        (nothing, ["ensemble.submission=mine.csv"], {"ensemble", "ensemble-student", *ANSWERS},
         'ensemble: settings differ: ensemble.submission "submission.csv" -> "mine.csv"'),
        (nothing, ["train.num_workers=1", "train.checkpoint_minutes=1", "on_version_change=rerun"], set(), ""),
    ],
)  # fmt: skip
def test_exactly_the_stages_that_a_change_concerns_run_again(
    change: Callable[[Path], None], arguments, expected, reason, finished, tmp_path
):
    root = copy_run(finished, tmp_path / "run")
    change(root)
    found = reasons(root, *arguments)
    assert set(found) == expected, found
    assert reason in [f"{step}: {why}"[: len(reason)] for step, why in found.items()] or not reason
    if expected == ANSWERS:
        assert reasons(root, *arguments) == {}, "then all is done again"


def test_a_run_without_a_truth_evaluates_what_has_one_and_ends_with_0(finished, tmp_path):
    root = copy_run(finished, tmp_path / "run")
    (root / "eval" / "gt.csv").unlink()
    shutil.rmtree(root / "runs" / "r" / "evaluate-student")
    assert set(reasons(root)) == {"evaluate"}
    assert not (root / "runs" / "r" / "evaluate-student").exists()
