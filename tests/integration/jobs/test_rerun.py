"""After a change, exactly the affected stages rerun, each with its reason."""

import io
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from fivefold.launchers.plan import Inputs, make_plan
from jobs.__main__ import run
from toy_data import SETTINGS, call_jobs, copy_run, noise_in, write_test_table

pytestmark = pytest.mark.slow

FOLDS = {"fold-0", "fold-1"}
EVALUATIONS = {"evaluate", "evaluate-student"}
AFTER_FOLDS = {"ensemble", "distill", "ensemble-student", *EVALUATIONS}
EVERYTHING = {"split", *FOLDS, *AFTER_FOLDS}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run in which every stage has finished."""
    root = tmp_path_factory.mktemp("finished")
    noise_in(root, ("train/a", "train/b", "eval/images"), 6)
    write_test_table(root / "eval", 6, truth=True)
    assert set(run_plan(root)) == EVERYTHING
    return root


def run_plan(root: Path, *arguments: str) -> dict[str, str]:
    """Run the steps of a plan in this process, as `submit` does in processes; return the reason for each step that ran."""
    inputs = Inputs(str(root / "train"), str(root / "eval"), str(root / "eval" / "gt.csv"))
    plan = make_plan(inputs, ["split.folds=2", *SETTINGS, *arguments], "r", str(root / "runs"))
    reasons = {}
    for step in plan.steps:
        with redirect_stderr(io.StringIO()) as log:
            assert run(step.stage, step.command[1:], step.environment) == 0
        if match := re.search(r" runs: (.*)$", log.getvalue(), re.MULTILINE):
            reasons[step.name] = match[1]
    return reasons


def change_label(root: Path) -> None:
    shutil.move(root / "train" / "a" / "0.png", root / "train" / "b" / "6.png")


def change_ground_truth(root: Path) -> None:
    path = root / "eval" / "gt.csv"
    path.write_text(path.read_text("utf-8-sig").replace("5,b", "5,a"))


@pytest.mark.parametrize(
    ("change", "arguments", "expected", "reason"),
    [
        (change_label, [], EVERYTHING, "fold-0: inputs differ: folds"),
        (change_ground_truth, [], EVALUATIONS, "evaluate: inputs differ: ground_truth"),
        (None, ["train.lr=0.1"], {*FOLDS, *AFTER_FOLDS}, "fold-0: settings differ: train.lr 0.001 -> 0.1"),
        (None, ["distill.alpha=0.1"], {"distill", "ensemble-student", "evaluate-student"},
         "distill: settings differ: distill.alpha 0.7 -> 0.1"),
        (None, ["evaluate.top_k=1"], EVALUATIONS, "evaluate: settings differ: evaluate.top_k 5 -> 1"),
        (None, ["ensemble.submission=mine.csv"], {"ensemble", "ensemble-student", *EVALUATIONS},
         'ensemble: settings differ: ensemble.submission "submission.csv" -> "mine.csv"'),
        (None, ["train.num_workers=1", "train.checkpoint_minutes=1", "on_version_change=rerun"], set(), ""),
    ],
)  # fmt: skip
def test_a_change_reruns_exactly_the_affected_stages(
    change: Callable[[Path], None] | None, arguments, expected, reason, finished_run, tmp_path
):
    root = copy_run(finished_run, tmp_path / "run")
    if change:
        change(root)
    actual = run_plan(root, *arguments)
    assert set(actual) == expected, actual
    assert reason in [f"{step}: {step_reason}"[: len(reason)] for step, step_reason in actual.items()] or not reason
    if expected == EVALUATIONS:
        assert run_plan(root, *arguments) == {}, "a second submit runs nothing"


def test_missing_ground_truth_evaluates_only_the_ensemble_and_exits_0(finished_run, tmp_path):
    root = copy_run(finished_run, tmp_path / "run")
    (root / "eval" / "gt.csv").unlink()
    shutil.rmtree(root / "runs" / "r" / "evaluate-student")
    arguments = ["train=train", "eval=eval", "run=r", "check=false", "stages=evaluate,distill", "split.folds=2"]
    done = call_jobs("submit", *arguments, *SETTINGS, folder=root, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\[([\w-]+)\] .* runs: ", done.stdout + done.stderr, re.MULTILINE) == ["evaluate"]
    assert not (root / "runs" / "r" / "evaluate-student").exists()
