"""The images to predict: the split checks them before training, and later stages handle unreadable ones."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fivefold import predictions
from fivefold.contract.files import read_json
from fivefold.data.split.fold_table import read_folds
from jobs import submit
from toy_data import SETTINGS, failure, noise_in, read_rows, run_stage, write_csv, write_test_table

UNREADABLE = ("images/1.png", "images/3.png")
PARTS = "split.ratios=0.6,0.2,0.2"


def draw_inputs(root: Path) -> Path:
    """Draw 12 training images of class a, 8 of class b, and 5 test images with a sample submission of all ids."""
    noise_in(root / "train", ("a",), 12, seed=1)
    noise_in(root / "train", ("b",), 8, seed=2)
    noise_in(root / "eval", ("images",), 5, seed=3)
    write_test_table(root / "eval", 5)
    write_csv(root / "eval" / "sample_submission.csv", [["ID", "a", "b"], *([n, 0, 0] for n in range(5))], "utf-8")
    return root


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return draw_inputs(tmp_path)


def truncate(root: Path, *names: str) -> None:
    for name in names:
        path = root / "eval" / name
        path.write_bytes(path.read_bytes()[:60])


def warnings_about(text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if " WARNING " in line and text in line]


def run_split(root: Path, *arguments: str) -> int:
    return run_stage(root, "split", "split", "split.folds=2", *arguments)


def test_split_names_all_unreadable_test_images_at_once(workspace):
    noise_in(workspace / "eval", ("images",), 12, seed=3)
    write_test_table(workspace / "eval", 12)
    (workspace / "eval" / "sample_submission.csv").unlink()
    names = [f"images/{number}.png" for number in range(1, 12)]
    truncate(workspace, *names)
    assert run_split(workspace) == 65
    message = (workspace / "split" / "failure").read_text()
    assert all(text in message for text in ("11 of 12 test images", "ensemble.unreadable=prior", *names))
    assert not list((workspace / "split" / "output").glob("*"))


@pytest.mark.parametrize(("argument", "code"), [("split.verify_images=false", 0), ("ensemble.unreadable=prior", 65)])
def test_split_fails_if_no_test_image_is_readable_unless_it_opens_none(workspace, argument, code):
    truncate(workspace, *(f"images/{number}.png" for number in range(5)))
    assert run_split(workspace, argument) == code


@pytest.mark.parametrize(("last", "rows", "word"), [("b", 6, "'5'"), ("b", 4, "'4'"), ("c", 5, "'c'")])
def test_split_rejects_sample_submission_with_other_ids_or_classes(workspace, last, rows, word):
    write_csv(workspace / "eval" / "sample_submission.csv", [["ID", "a", last], *([n, 0, 0] for n in range(rows))])
    assert run_split(workspace) == 65
    assert word in failure(workspace / "split")


def test_folds_do_not_depend_on_test_images_and_changed_ones_are_checked(workspace, capsys):
    assert run_split(workspace) == 0
    first = (workspace / "split" / "output" / "folds.parquet").read_bytes()
    summary = workspace / "split" / "output" / "split_summary.json"
    assert read_json(summary)["eval"] == {"images": 5, "unreadable": [], "in_split": 0}
    write_csv(workspace / "eval" / "gt.csv", [["ID", "label"], *([n, "a"] for n in range(5))])
    capsys.readouterr()
    assert run_split(workspace) == 0
    assert "nothing to do" in capsys.readouterr().err, "the split does not use the ground truth"
    truncate(workspace, UNREADABLE[0])
    assert run_split(workspace) == 65
    assert run_split(workspace, "ensemble.unreadable=prior") == 0
    assert (workspace / "split" / "output" / "folds.parquet").read_bytes() == first
    assert [row["path"] for row in read_json(summary)["eval"]["unreadable"]] == [UNREADABLE[0]]
    assert run_stage(workspace, "split", "split", "split.folds=2", EVAL=None) == 0
    assert "eval" not in read_json(summary)


def test_run_with_unreadable_test_images_fails_before_training(workspace):
    truncate(workspace, *UNREADABLE)
    folders = (f"train={workspace / 'train'}", f"eval={workspace / 'eval'}", f"runs={workspace}")
    assert submit.main([*folders, "run=r", "split.folds=2", *SETTINGS]) == 65
    assert sorted(path.name for path in (workspace / "r").iterdir()) == ["plan.json", "split"]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    """A run of one model and its ensemble."""
    root = draw_inputs(tmp_path_factory.mktemp("trained"))
    assert run_split(root, PARTS) == 0
    assert run_stage(root, "train-fold", "fold-0", "FOLD=0", *SETTINGS) == 0
    assert run_stage(root, "ensemble", "ensemble", MODEL=root) == 0
    return root


@pytest.fixture
def corrupt_run(trained_run, tmp_path) -> Path:
    """A copy of the trained run with two truncated test images."""
    root = Path(shutil.copytree(trained_run, tmp_path / "run"))
    truncate(root, *UNREADABLE)
    return root


@pytest.mark.parametrize(("stage", "file"), [("ensemble", "submission.csv"), ("inference", "output.csv")])
def test_prediction_names_unreadable_images_or_uses_class_shares(corrupt_run, trained_run, stage, file, capsys):
    output = corrupt_run / "corrupt" / "output"
    assert run_stage(corrupt_run, stage, "corrupt", MODEL=corrupt_run) == 65
    assert all(name in failure(output.parent) for name in UNREADABLE)
    assert not (output / file).exists()
    capsys.readouterr()

    assert run_stage(corrupt_run, stage, "corrupt", "ensemble.unreadable=prior", MODEL=corrupt_run) == 0
    (warning,) = warnings_about("cannot be read", capsys)
    assert all(name in warning for name in UNREADABLE)
    assert run_stage(trained_run, stage, corrupt_run / "whole", MODEL=trained_run) == 0
    rows, expected_rows = read_rows(output / file), read_rows(corrupt_run / "whole" / "output" / file)
    table = read_folds(corrupt_run / "split" / "output" / "folds.parquet")
    counts = Counter(table.labels()[table.part != "test"])
    assert sum(counts.values()) == 16
    for row, expected in zip(rows, expected_rows, strict=True):
        if f"images/{row['ID']}.png" in UNREADABLE:
            shares = [counts[name] / 16 for name in ("a", "b")]
            assert [float(row[name]) for name in ("a", "b")] == pytest.approx(shares, abs=1e-5)
        else:
            assert row == expected
    if stage == "ensemble":
        assert read_json(output / "ensemble.json")["unreadable"] == ["1", "3"]


COPIES = {"images/1.png": "a/3.png", "images/4.png": "b/0.png"}


def copy_as_bmp(root: Path) -> None:
    """Replace two test images with BMP copies of training images: equal pixels, different bytes."""
    for name, source in COPIES.items():
        with Image.open(root / "train" / source) as image:
            image.save(root / "eval" / name, "BMP")


def test_split_warns_about_and_lists_test_images_equal_to_its_own(workspace, capsys):
    copy_as_bmp(workspace)
    assert run_split(workspace, "split.holdout=0.2") == 0
    (warning,) = warnings_about("test images", capsys)
    assert "2 of 5 test images" in warning
    assert all(name in warning for name in COPIES)
    output = workspace / "split" / "output"
    rows = read_rows(output / "test_overlap.csv")
    assert {row["path"]: row["split_path"] for row in rows} == COPIES
    assert {row["id"]: row["label"] for row in rows} == {"1": "a", "4": "b"}
    assert read_json(output / "split_summary.json")["eval"]["in_split"] == 2
    assert "output/test_overlap.csv" in read_json(output / "stage.json")["outputs"]
    noise_in(workspace / "eval", ("images",), 5, seed=3)
    assert run_split(workspace, "split.holdout=0.2") == 0
    assert not (output / "test_overlap.csv").exists()


def test_evaluate_also_scores_test_images_that_are_not_in_the_split(trained_run, tmp_path, capsys):
    root = Path(shutil.copytree(trained_run, tmp_path / "run"))
    truth = write_csv(root / "gt.csv", [["ID", "label"], *zip(range(5), "abbab", strict=True)])
    channels = {"PREDICTIONS": root / "ensemble" / "output", "GROUND_TRUTH": truth}
    copy_as_bmp(root)
    assert run_split(root, PARTS) == 0
    assert run_stage(root, "train-fold", "fold-0", "FOLD=0", *SETTINGS) == 0
    assert "nothing to do" in capsys.readouterr().err.splitlines()[-1], "changed test images must not retrain a fold"
    assert run_stage(root, "evaluate", "evaluate", **channels) == 0
    metrics = read_json(root / "evaluate" / "output" / "metrics.json")["test"]
    table = predictions.read(root / "ensemble" / "output" / "predictions.parquet")
    hits = [table.classes[code] == label for code, label in zip(table.log_probs.argmax(axis=1), "abbab", strict=True)]
    assert (metrics["n"], metrics["in_split"], metrics["not_in_split"]["n"]) == (5, 2, 3)
    assert metrics["accuracy"] == pytest.approx(sum(hits) / 5)
    assert metrics["not_in_split"]["accuracy"] == pytest.approx((hits[0] + hits[2] + hits[3]) / 3)
    assert "images not in the split" in (root / "evaluate" / "output" / "report.html").read_text()


def test_evaluate_has_no_second_score_if_all_test_images_are_in_the_split(trained_run, tmp_path):
    root = Path(shutil.copytree(trained_run, tmp_path / "run"))
    for number in range(5):
        shutil.copy(root / "train" / "a" / f"{number}.png", root / "eval" / "images")
    truth = write_csv(root / "gt.csv", [["ID", "label"], *((n, "a") for n in range(5))])
    assert run_split(root, PARTS) == 0
    channels = {"PREDICTIONS": root / "ensemble" / "output", "GROUND_TRUTH": truth}
    assert run_stage(root, "evaluate", "evaluate", **channels) == 0
    metrics = read_json(root / "evaluate" / "output" / "metrics.json")["test"]
    assert (metrics["in_split"], "not_in_split" in metrics) == (5, False)
