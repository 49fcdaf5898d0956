"""The images to predict, as each stage finds them: checked by the split before a model trains, and what the unreadable ones get."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fivefold import predictions
from fivefold.contract import lineage
from fivefold.contract.files import read_json
from fivefold.contract.stage_specs import STAGES
from fivefold.data.split.fold_table import read_folds
from fivefold.launchers.plan import Inputs, make_plan
from jobs import submit
from toy_data import SETTINGS, failure, noise_in, read_rows, run_stage, write_csv, write_test_table

UNREADABLE = ("images/1.png", "images/3.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images to train on, of three of class a to two of class b, and five to predict with a sample submission of all ids."""
    noise_in(tmp_path / "train", ("a",), 12, seed=1)
    noise_in(tmp_path / "train", ("b",), 8, seed=2)
    noise_in(tmp_path / "eval", ("images",), 5, seed=3)
    write_test_table(tmp_path / "eval", 5)
    write_csv(tmp_path / "eval" / "sample_submission.csv", [["ID", "a", "b"], *([n, 0, 0] for n in range(5))], "utf-8")
    return tmp_path


def cut_off(root: Path, *names: str) -> None:
    for name in names:
        path = root / "eval" / name
        path.write_bytes(path.read_bytes()[:60])


def split(root: Path, *arguments: str) -> int:
    return run_stage(root, "split", "split", "split.folds=2", *arguments)


def test_the_split_names_all_test_images_that_cannot_be_read_at_once(data):
    cut_off(data, *UNREADABLE)
    assert split(data) == 65
    told = failure(data / "split")
    assert "2 of 5 test images" in told
    assert all(name in told for name in (*UNREADABLE, "ensemble.unreadable=prior"))
    assert not list((data / "split" / "output").glob("*"))


def test_all_of_many_unreadable_test_images_are_named(data):
    noise_in(data / "eval", ("images",), 12, seed=3)
    write_test_table(data / "eval", 12)
    (data / "eval" / "sample_submission.csv").unlink()
    names = [f"images/{number}.png" for number in range(1, 12)]
    cut_off(data, *names)
    assert split(data) == 65
    assert all(name in (data / "split" / "failure").read_text() for name in names)


def test_a_split_that_opens_no_image_opens_no_test_image(data):
    cut_off(data, *UNREADABLE)
    assert split(data, "split.verify_images=false") == 0


def test_test_images_of_which_none_can_be_read_are_an_error_under_any_setting(data):
    cut_off(data, *(f"images/{number}.png" for number in range(5)))
    assert split(data, "ensemble.unreadable=prior") == 65


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ([["ID", "a", "b"], *([n, 0, 0] for n in range(6))], "'5'"),
        ([["ID", "a", "b"], *([n, 0, 0] for n in range(4))], "'4'"),
        ([["ID", "a", "c"], *([n, 0, 0] for n in range(5))], "'c'"),
    ],
    ids=["an id without an image", "an image without an id", "a column that is no class"],
)
def test_a_sample_that_no_submission_could_fill_is_found_by_the_split(data, table, word):
    write_csv(data / "eval" / "sample_submission.csv", table)
    assert split(data) == 65
    assert word in failure(data / "split")


def test_the_folds_do_not_hang_on_the_test_images_and_new_ones_are_looked_at(data, capsys):
    assert split(data) == 0
    first = (data / "split" / "output" / "folds.parquet").read_bytes()
    assert read_json(data / "split" / "output" / "split_summary.json")["eval"] == {
        "images": 5,
        "unreadable": [],
        "in_split": 0,
    }
    write_csv(data / "eval" / "gt.csv", [["ID", "label"], *([n, "a"] for n in range(5))])
    capsys.readouterr()
    assert split(data) == 0
    assert "nothing to do" in capsys.readouterr().err, "a ground truth is not the split's"
    cut_off(data, UNREADABLE[0])
    assert split(data) == 65
    assert split(data, "ensemble.unreadable=prior") == 0
    assert (data / "split" / "output" / "folds.parquet").read_bytes() == first
    assert [
        row["path"] for row in read_json(data / "split" / "output" / "split_summary.json")["eval"]["unreadable"]
    ] == [UNREADABLE[0]]
    assert run_stage(data, "split", "split", "split.folds=2", EVAL=None) == 0
    assert "eval" not in read_json(data / "split" / "output" / "split_summary.json")


def test_a_run_gives_its_test_images_to_the_split_on_every_platform():
    step = make_plan(Inputs(train="t", eval="e"), ["ensemble.unreadable=prior"], run="r").step("split")
    assert step.environment["SM_CHANNEL_EVAL"] == "e"
    assert "ensemble.unreadable=prior" in step.arguments
    assert "SM_CHANNEL_EVAL" not in make_plan(Inputs(train="t"), run="r").step("split").environment


def test_changing_what_unreadable_images_get_trains_no_fold_again():
    having = {
        name
        for name, stage in STAGES.items()
        if "ensemble" in stage.sections or "ensemble.unreadable" in stage.sections
    }
    assert having == {"split", "ensemble", "inference"}


def test_a_run_of_unreadable_test_images_ends_before_a_fold_trains(data):
    cut_off(data, *UNREADABLE)
    given = [f"train={data / 'train'}", f"eval={data / 'eval'}", f"runs={data}", "run=r", "split.folds=2", *SETTINGS]
    assert submit.main(given) == 65
    assert sorted(path.name for path in (data / "r").iterdir()) == ["plan.json", "split"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two trained folds, whose classes have 12 and 8 rows."""
    root = tmp_path_factory.mktemp("trained")
    noise_in(root / "train", ("a",), 12, seed=1)
    noise_in(root / "train", ("b",), 8, seed=2)
    noise_in(root / "eval", ("images",), 5, seed=3)
    write_test_table(root / "eval", 5)
    write_csv(root / "eval" / "sample_submission.csv", [["ID", "a", "b"], *([n, 0, 0] for n in range(5))], "utf-8")
    assert split(root, "split.holdout=0.2") == 0
    for fold in range(2):
        assert run_stage(root, "train-fold", f"fold-{fold}", f"FOLD={fold}", *SETTINGS) == 0
    return root


@pytest.fixture
def spoilt(trained, tmp_path) -> Path:
    """A copy of the run with two test images cut off."""
    root = Path(shutil.copytree(trained, tmp_path / "run"))
    cut_off(root, *UNREADABLE)
    return root


@pytest.mark.parametrize(("stage", "file"), [("ensemble", "submission.csv"), ("inference", "output.csv")])
def test_models_name_all_unreadable_images_or_give_each_the_classes_shares(spoilt, trained, stage, file, capsys):
    assert run_stage(spoilt, stage, stage, MODEL=spoilt) == 65
    assert all(name in failure(spoilt / stage) for name in UNREADABLE)
    assert not (spoilt / stage / "output" / file).exists()
    capsys.readouterr()

    assert run_stage(spoilt, stage, stage, "ensemble.unreadable=prior", MODEL=spoilt) == 0
    (warned,) = [
        line for line in capsys.readouterr().err.splitlines() if " WARNING " in line and "cannot be read" in line
    ]
    assert all(name in warned for name in UNREADABLE)
    assert run_stage(trained, stage, spoilt / "whole", MODEL=trained) == 0
    rows, whole = (read_rows(folder / "output" / file) for folder in (spoilt / stage, spoilt / "whole"))
    table = read_folds(spoilt / "split" / "output" / "folds.parquet")
    counts = Counter(table.labels()[table.part == "train"])
    assert sum(counts.values()) == 16
    for row, expected in zip(rows, whole, strict=True):
        if f"images/{row['ID']}.png" in UNREADABLE:
            shares = [counts[name] / 16 for name in ("a", "b")]
            assert [float(row[name]) for name in ("a", "b")] == pytest.approx(shares, abs=1e-5)
        else:
            assert row == expected
    if stage == "ensemble":
        assert read_json(spoilt / stage / "output" / "ensemble.json")["unreadable"] == ["1", "3"]


COPIED = {"images/1.png": "a/3.png", "images/4.png": "b/0.png"}


def copied_as_bmp(root: Path) -> None:
    """Makes two test images pictures of the training images, in other files: equal by their pixels alone."""
    for name, source in COPIED.items():
        with Image.open(root / "train" / source) as image:
            image.save(root / "eval" / name, "BMP")


def test_test_images_equal_by_pixels_to_images_of_the_split_are_told_and_listed(data, capsys):
    copied_as_bmp(data)
    assert split(data, "split.holdout=0.2") == 0
    (warned,) = [line for line in capsys.readouterr().err.splitlines() if " WARNING " in line and "test images" in line]
    assert "2 of 5 test images" in warned
    assert all(name in warned for name in COPIED)
    output = data / "split" / "output"
    rows = read_rows(output / "test_overlap.csv")
    assert {row["path"]: row["split_path"] for row in rows} == COPIED
    assert {row["id"]: row["label"] for row in rows} == {"1": "a", "4": "b"}
    assert read_json(output / "split_summary.json")["eval"]["in_split"] == 2
    assert "output/test_overlap.csv" in read_json(output / "stage.json")["outputs"]
    noise_in(data / "eval", ("images",), 5, seed=3)
    assert split(data, "split.holdout=0.2") == 0
    assert not (output / "test_overlap.csv").exists()


def test_evaluate_scores_the_test_images_without_those_of_the_split_too(trained, tmp_path, capsys):
    root = Path(shutil.copytree(trained, tmp_path / "run"))
    truth = write_csv(root / "gt.csv", [["ID", "label"], *zip(range(5), "abbab", strict=True)])
    given = {"MODEL": root, "PREDICTIONS": root / "ensemble" / "output", "GROUND_TRUTH": truth}
    assert run_stage(root, "ensemble", "ensemble", MODEL=root) == 0
    assert run_stage(root, "evaluate", "evaluate", **given) == 0
    before = read_json(root / "evaluate" / "output" / "metrics.json")["test"]
    assert "not_in_split" not in before

    copied_as_bmp(root)
    assert split(root, "split.holdout=0.2") == 0
    assert run_stage(root, "train-fold", "fold-0", "FOLD=0", *SETTINGS) == 0
    assert "nothing to do" in capsys.readouterr().err.splitlines()[-1], "no fold trains again for other test images"
    assert run_stage(root, "evaluate", "evaluate", **given) == 0, (
        "of the same predictions: what is known of them is new"
    )
    found = read_json(root / "evaluate" / "output" / "metrics.json")["test"]
    table = predictions.read(root / "ensemble" / "output" / "predictions.parquet")
    hits = [table.classes[code] == label for code, label in zip(table.log_probs.argmax(axis=1), "abbab", strict=True)]
    assert (found["n"], found["in_split"], found["not_in_split"]["n"]) == (5, 2, 3)
    assert found["accuracy"] == before["accuracy"] == pytest.approx(sum(hits) / 5)
    assert found["not_in_split"]["accuracy"] == pytest.approx((hits[0] + hits[2] + hits[3]) / 3)
    assert "images not in the split" in (root / "evaluate" / "output" / "report.html").read_text()
    assert lineage.verify(lineage.trace(root / "evaluate" / "output" / "stage.json"), tmp_path) == []


def test_where_every_test_image_is_the_splits_there_is_no_other_score(trained, tmp_path):
    root = Path(shutil.copytree(trained, tmp_path / "run"))
    for number in range(5):
        shutil.copy(root / "train" / "a" / f"{number}.png", root / "eval" / "images")
    truth = write_csv(root / "gt.csv", [["ID", "label"], *((n, "a") for n in range(5))])
    assert split(root, "split.holdout=0.2") == 0
    assert run_stage(root, "ensemble", "ensemble", MODEL=root) == 0
    given = {"MODEL": root, "PREDICTIONS": root / "ensemble" / "output", "GROUND_TRUTH": truth}
    assert run_stage(root, "evaluate", "evaluate", **given) == 0
    found = read_json(root / "evaluate" / "output" / "metrics.json")["test"]
    assert (found["in_split"], "not_in_split" in found) == (5, False)
