"""What runs again after a change: exactly the stages that it concerns, each with its reason."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
SETTINGS = [
    "split.folds=2", "model.backbone=fivefold/small_net", 'model.options={"widths": [8, 8], "stem": 8}', "model.image_size=12",
    "train.epochs=1", "train.batch_size=8", "train.precision=fp32", "train.trackers=[]",
]  # fmt: skip
FOLDS = {"fold-0", "fold-1"}
AFTER_FOLDS = {"ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student"}
EVERYTHING = {"split", *FOLDS, *AFTER_FOLDS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that is done."""
    root = tmp_path_factory.mktemp("finished")
    random = np.random.default_rng(0)
    for name in ("train/a", "train/b", "eval/images"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    rows = "".join(f"{n},images/{n}.png\n" for n in range(6))
    (root / "eval" / "test.csv").write_text(f"ID,img_path\n{rows}")
    (root / "eval" / "gt.csv").write_text("ID,label\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(6)))
    assert set(reasons(root)) == EVERYTHING
    return root


def reasons(root: Path, *arguments: str) -> dict[str, str]:
    """Submits the run; why each step ran that did."""
    command = [sys.executable, "-m", "jobs", "submit", "train=train", "eval=eval", "run=r", *SETTINGS, *arguments]
    environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(re.findall(r"^\[([\w-]+)\] .* runs: (.*)$", done.stdout + done.stderr, re.MULTILINE))


def one_pixel(root: Path) -> None:
    path = root / "train" / "a" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def one_label(root: Path) -> None:
    (root / "train" / "a" / "0.png").rename(root / "train" / "b" / "6.png")


def one_answer(root: Path) -> None:
    path = root / "eval" / "gt.csv"
    path.write_text(path.read_text().replace("5,b", "5,a"))


def nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "arguments", "expected", "reason"),
    [
        (nothing, [], set(), ""),
        (one_pixel, [], EVERYTHING, "split: inputs differ: train"),
        (one_label, [], EVERYTHING, "fold-0: inputs differ: folds"),
        (one_answer, [], {"evaluate", "evaluate-student"}, "evaluate: inputs differ: ground_truth"),
        (nothing, ["train.lr=0.1"], {*FOLDS, *AFTER_FOLDS}, "fold-0: settings differ: train.lr 0.001 -> 0.1"),
        (nothing, ["distill.alpha=0.1"], {"distill", "ensemble-student", "evaluate-student"},
         "distill: settings differ: distill.alpha 0.7 -> 0.1"),
        (nothing, ["evaluate.top_k=1"], {"evaluate", "evaluate-student"}, "evaluate: settings differ: evaluate.top_k 5 -> 1"),
        (nothing, ["ensemble.submission=mine.csv"], {"ensemble", "evaluate", "ensemble-student", "evaluate-student"},
         'ensemble: settings differ: ensemble.submission "submission.csv" -> "mine.csv"'),
        (nothing, ["train.workers=1", "train.checkpoint_minutes=1", "reuse=strict"], set(), ""),
    ],
)  # fmt: skip
def test_exactly_the_stages_that_a_change_concerns_run_again(
    change: Callable[[Path], None], arguments, expected, reason, finished, tmp_path
):
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    change(root)
    found = reasons(root, *arguments)
    assert set(found) == expected, found
    assert reason in [f"{step}: {why}"[: len(reason)] for step, why in found.items()] or not reason
    assert reasons(root, *arguments) == {}, "then all is done again"
