"""A product classifier end to end: split by product, one fold, the predict job by hand and as a container, and the API."""

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold import ImageClassificationAPI, predictions
from fivefold.api import tell
from fivefold.committee import Verdict
from fivefold.data.folds import FoldTable, read_folds
from fivefold.errors import DataError, MissingInputError, SettingsError
from jobs.__main__ import run

REPOSITORY = Path(__file__).parents[2]
TRAINING = [
    "model.backbone=fivefold/small_net", 'model.options={"widths": [8, 16], "stem": 8}', "model.image_size=16", "train.epochs=4",
    "train.batch_size=16", "train.lr=0.02", "train.precision=fp32", "predict.views=plain,flip", "augment.train=horizontal_flip",
    "train.device=cpu",
]  # fmt: skip
HEADER = ["image_path", "predicted_class", "confidence", "true_class"]


def stage(name: str, *arguments: str, **environment: Path) -> int:
    return run(name, arguments, {key: str(value) for key, value in environment.items()})


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def trained(root: Path, train: Path, folds: int, *split: str) -> Path:
    """A run of `folds` small models on the split that the arguments describe, with no ensemble yet."""
    assert stage("split", *split, SM_CHANNEL_TRAIN=train, SM_OUTPUT_DATA_DIR=root / "split") == 0
    for fold in range(folds):
        where = {"SM_MODEL_DIR": root / f"fold-{fold}/model", "SM_OUTPUT_DATA_DIR": root / f"fold-{fold}/output"}
        channels = {"SM_CHANNEL_TRAIN": train, "SM_CHANNEL_FOLDS": root / "split"}
        assert stage("train-fold", f"FOLD={fold}", *TRAINING, **channels, **where) == 0
    return root


@pytest.fixture(scope="module")
def shop(products, tmp_path_factory) -> Path:
    """The product system's split by parts, and its one model."""
    parts = ("data.layout=products", "split.parts=0.6,0.2,0.2", "split.seed=2025")
    return trained(tmp_path_factory.mktemp("shop"), products.root, 1, *parts)


@pytest.fixture(scope="module")
def ensemble(products, tmp_path_factory) -> Path:
    """Two folds with a holdout, and the ensemble stage's word on all images."""
    parts = ("data.layout=products", "split.folds=2", "split.holdout=0.5")
    root = trained(tmp_path_factory.mktemp("ensemble"), products.root, 2, *parts)
    (root / "eval").symlink_to(products.root / "사진")
    where = {"SM_CHANNEL_MODEL": root, "SM_CHANNEL_EVAL": root / "eval", "SM_OUTPUT_DATA_DIR": root / "ensemble"}
    assert stage("ensemble", **where) == 0
    return root


@pytest.fixture
def table(shop: Path) -> FoldTable:
    return read_folds(shop / "split" / "folds.parquet")


def by_hand(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m jobs predict …` in a folder, with no variable of the contract."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    command = [sys.executable, "-W", "error", "-m", "jobs", "predict", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**environ, "PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}"}, capture_output=True, text=True
    )  # fmt: skip


def test_parts_train_on_train_validate_on_valid_and_hold_test_out(shop: Path, table: FoldTable) -> None:
    oof = predictions.read(shop / "fold-0/model/oof.parquet")
    held = predictions.read(shop / "fold-0/model/holdout.parquet")
    part = dict(zip(table.ids.to_pylist(), table.part.tolist(), strict=True))
    assert {part[name] for name in oof.ids} == {"valid"}
    assert {part[name] for name in held.ids} == {"test"}
    assert len(oof) + len(held) + len(table.train_rows(0)) == len(table)


def test_one_image_from_the_command_line_is_told_and_kept_in_a_folder_of_its_run(shop, products, tmp_path) -> None:
    image = products.root / "사진/P001/main_0.png"
    done = by_hand(tmp_path, f"images={image}", f"model={shop / 'fold-0/model'}")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {"image_path": str(image), "predicted_class": "full_shot", "confidence": told["confidence"]}
    assert 0.25 < told["confidence"] <= 1
    (folder,) = (tmp_path / "test_result").iterdir()
    assert re.fullmatch(r"run_\d{8}_\d{6}_[0-9a-f]{8}", folder.name)
    (row,) = rows_of(folder / "predictions.csv")
    assert list(row) == HEADER
    assert row["image_path"] == str(image)
    assert float(row["confidence"]) == pytest.approx(told["confidence"], abs=1e-6)
    assert json.loads((folder / "stage.json").read_text())["metrics"]["ms_per_image"] > 0
    assert "ms an image): 1 successes, 0 failures" in done.stderr


def test_the_split_gives_the_mistakes_of_train_valid_and_test(shop, products, table, tmp_path) -> None:
    settings = ["predict.file=inference_results.csv", "predict.folder=test_result", "run=run_1"]
    channels = {"SM_CHANNEL_IMAGES": products.root, "SM_CHANNEL_FOLDS": shop / "split", "SM_CHANNEL_MODEL": shop}
    assert stage("predict", *settings, **channels, SM_OUTPUT_DATA_DIR=tmp_path) == 0
    folder = tmp_path / "test_result" / "run_1"
    found = rows_of(folder / "inference_results.csv")
    assert [row["image_path"] for row in found] == table.paths.to_pylist()
    assert [row["true_class"] for row in found] == table.labels().tolist()
    metrics = json.loads((tmp_path / "stage.json").read_text())["metrics"]
    for part in ("train", "valid", "test"):
        wrong = rows_of(folder / f"wrong_{part}.csv")
        expected = {
            row["image_path"]
            for row, own in zip(found, table.part, strict=True)
            if own == part and row["predicted_class"] != row["true_class"]
        }
        assert {row["path"] for row in wrong} == expected
        confidences = [float(row["confidence"]) for row in wrong]
        assert confidences == sorted(confidences, reverse=True)
        count = int((table.part == part).sum())
        assert metrics[part]["n"] == count
        assert metrics[part]["accuracy"] == pytest.approx(1 - len(expected) / count, abs=1e-6)
    # the rows that the training stage predicted itself, by the same views
    oof = predictions.read(shop / "fold-0/model/oof.parquet")
    sure = {row["image_path"]: float(row["confidence"]) for row in found}
    np.testing.assert_allclose([sure[name] for name in oof.ids], np.exp(oof.log_probs.max(axis=1)), atol=1e-5)


def test_only_the_rows_that_are_wanted_are_predicted(shop, products, table, tmp_path) -> None:
    channels = {"SM_CHANNEL_IMAGES": products.root, "SM_CHANNEL_FOLDS": shop / "split", "SM_CHANNEL_MODEL": shop}
    assert stage("predict", **channels, SM_OUTPUT_DATA_DIR=tmp_path) == 0
    assert stage("predict", "predict.rows=test", **channels, SM_OUTPUT_DATA_DIR=tmp_path) == 0
    assert len(rows_of(tmp_path / "predictions.csv")) == (table.part == "test").sum()
    assert [path.name for path in tmp_path.glob("wrong_*.csv")] == ["wrong_test.csv"]


def test_a_row_that_any_model_trained_on_is_no_validation_of_the_ensemble(ensemble, products, tmp_path) -> None:
    channels = {
        "SM_CHANNEL_IMAGES": products.root,
        "SM_CHANNEL_FOLDS": ensemble / "split",
        "SM_CHANNEL_MODEL": ensemble,
    }
    assert stage("predict", **channels, SM_OUTPUT_DATA_DIR=tmp_path / "all") == 0
    assert sorted(path.name for path in (tmp_path / "all").glob("wrong_*")) == ["wrong_test.csv", "wrong_train.csv"]
    channels["SM_CHANNEL_MODEL"] = ensemble / "fold-1"
    assert stage("predict", **channels, SM_OUTPUT_DATA_DIR=tmp_path / "one") == 0
    metrics = json.loads((tmp_path / "one" / "stage.json").read_text())["metrics"]
    table = read_folds(ensemble / "split" / "folds.parquet")
    assert metrics["valid"]["n"] == (table.fold == 1).sum()
    assert metrics["train"]["n"] == (table.fold == 0).sum()


def test_a_table_of_the_split_is_a_batch_with_its_truth(shop, products, tmp_path) -> None:
    batch = shop / "split" / "test_data.csv"
    done = by_hand(
        tmp_path, f"images={batch}", f"model={shop}", "output=out", f"data.base_path={products.root}", "predict.batch_size=3"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, asked = rows_of(tmp_path / "out" / "predictions.csv"), rows_of(batch)
    assert [row["image_path"] for row in found] == [row["image_path"] for row in asked]
    assert [row["true_class"] for row in found] == [row["image_type"] for row in asked]
    assert (tmp_path / "out" / "wrong_test.csv").is_file()
    right = [row["predicted_class"] == row["true_class"] for row in found]
    assert json.loads(done.stdout)["test"]["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    again = by_hand(tmp_path, f"images={batch}", f"model={shop}", "output=out", f"data.base_path={products.root}")
    assert again.stdout  # never skipped: what it prints is its result, and a table's images may lie anywhere


def test_unreadable_images_are_rows_with_error_and_the_stage_goes_on(shop, products, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(products.root / "사진/P001/main_0.png", folder / "좋다.png")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (1, 3000)).save(folder / "thin.png")
    (folder / "list.csv").write_text(
        "image_path,true_class\n좋다.png,full_shot\nbroken.png,\nempty.jpg,care_label\nabsent.png,\n../../x.png,\n"
        "tiny.png,\nthin.png,\n,\n좋다.png,\n",
        encoding="utf-8-sig",
    )
    done = by_hand(tmp_path, "images=images/list.csv", f"model={shop}", "output=out")
    assert done.returncode == 0, done.stderr
    found = rows_of(tmp_path / "out" / "predictions.csv")
    wrong = ["broken.png", "empty.jpg", "absent.png", "../../x.png", ""]
    assert [row["image_path"] for row in found] == ["좋다.png", *wrong[:4], "tiny.png", "thin.png", "", "좋다.png"]
    assert {row["image_path"] for row in found if row["predicted_class"] == "ERROR"} == set(wrong)
    assert {row["confidence"] for row in found if row["predicted_class"] == "ERROR"} == {"0.000000"}
    assert found[0]["predicted_class"] == found[-1]["predicted_class"] == "full_shot"
    assert "4 successes, 5 failures" in done.stderr
    assert "5 images cannot be read: " in done.stderr
    assert json.loads(done.stdout)["errors"] == 5
    assert json.loads(done.stdout)["test"]["n"] == 1


def test_the_reason_of_every_unreadable_image_is_in_the_log(caplog) -> None:
    reasons = {row: f"{row}.png cannot be decoded" for row in range(7)}
    caplog.set_level("INFO", "fivefold")
    tell(Verdict(np.empty(0, np.int64), np.empty((0, 2), np.float32), reasons), [*reasons.values()], [], 1.0)
    assert [reason for reason in reasons.values() if reason not in caplog.text] == []


def test_nothing_but_unreadable_images_is_a_table_of_errors(shop, tmp_path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    assert stage("predict", f"images={tmp_path}", f"model={shop}", f"output={tmp_path / 'out'}") == 0
    assert [row["predicted_class"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["ERROR"]


def test_a_folder_and_a_zip_of_it_give_the_same(shop, products, tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((products.root / "사진").rglob("*.png")):
            archive.write(path, path.relative_to(products.root / "사진"))
    for name, images in (("folder", products.root / "사진"), ("zip", tmp_path / "images.zip")):
        assert stage("predict", f"images={images}", f"model={shop}", f"output={tmp_path / name}") == 0
    first, second = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("folder", "zip"))
    assert first == second
    assert len(first.splitlines()) == 1 + len(list(products.root.rglob("*.png")))
    assert not list((tmp_path / "zip").glob("wrong_*"))


def test_folders_called_like_classes_are_the_truth(shop, tmp_path) -> None:
    for name in ("full_shot", "care_label"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name / "1.png")
    assert stage("predict", f"images={tmp_path / 'images'}", f"model={shop}", f"output={tmp_path / 'out'}") == 0
    assert [row["true_class"] for row in rows_of(tmp_path / "out/predictions.csv")] == ["care_label", "full_shot"]
    (row,) = rows_of(tmp_path / "out" / "wrong_test.csv")
    assert row["true_class"] == "care_label"


@pytest.mark.parametrize(
    ("images", "model", "arguments", "code", "message"),
    [
        ("absent.jpg", "shop", [], 66, "absent.jpg does not exist"),
        ("empty", "shop", [], 65, "no images below"),
        ("a.png", "empty", [], 66, "no model below"),
        ("strange.csv", "shop", [], 65, "true classes that the model does not know: 'shoe'"),
        ("paths.csv", "shop", [], 65, "has no column image_path, img_path, path or the like"),
        ("a.png", "shop", ["predict.device=cuda"], 64, "predict.device=cuda, but this machine has no such device"),
        ("a.png", "shop", ["predict.file=../x.csv"], 64, "file='../x.csv' is not a name alone"),
        ("a.png", "shop", ["predict.rows=all"], 64, "are not some of train, valid and test"),
        ("a.png", "shop", ["image=b.png"], 64, "unknown key 'image'"),
        ("strange.csv", "shop", ["data.base_path=/nowhere"], 66, "data.base_path=/nowhere: there is no such folder"),
    ],
)
def test_bad_input_gets_one_clear_error(shop, tmp_path, images, model, arguments, code, message, caplog) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange.csv").write_text("image_path,true_class\na.png,shoe\n")
    (tmp_path / "paths.csv").write_text("where\na.png\n")
    where = {"shop": shop, "empty": tmp_path / "empty"}[model]
    told = ["predict", f"images={tmp_path / images}", f"model={where}", f"output={tmp_path / 'out'}", *arguments]
    assert stage(*told, SM_OUTPUT_DIR=tmp_path / "told") == code
    assert message in (tmp_path / "told" / "failure").read_text()[:1024]
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.fixture
def api(shop: Path) -> ImageClassificationAPI:
    return ImageClassificationAPI(shop / "fold-0" / "model")


def test_the_api_answers_in_order_and_never_fails_for_a_bad_image(api, products, tmp_path, caplog) -> None:
    (tmp_path / "broken.jpg").write_bytes((products.root / "사진/P001/main_0.png").read_bytes()[:60])
    good = sorted(map(str, (products.root / "사진").rglob("main_*.png")))[:40]
    asked = [good[0], str(tmp_path / "broken.jpg"), *good, str(tmp_path / "absent.jpg"), str(tmp_path), "a\0b", good[0]]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with caplog.at_level(logging.INFO, "fivefold"):
        found = api.predict(asked)
    assert [row["image_path"] for row in found] == asked
    assert all(list(row) == ["image_path", "predicted_class", "confidence"] for row in found)
    bad = [row for row in found if row["predicted_class"] == "ERROR"]
    assert [(row["image_path"], row["confidence"]) for row in bad] == [(asked[at], 0.0) for at in (1, 42, 43, 44)]
    assert all(
        0.25 < row["confidence"] <= 1 and row["predicted_class"] in api.classes for row in found if row not in bad
    )
    assert found[0] == found[2]
    assert found[-1] == found[0] | {"confidence": pytest.approx(found[0]["confidence"], abs=1e-5)}
    assert "predicted 46 images in" in caplog.text
    assert "42 successes, 4 failures" in caplog.text
    assert "classes: full_shot" in caplog.text
    assert "4 images cannot be read: " in caplog.text
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert api.predict([]) == []


def test_defect_product_a_bad_image_is_no_black_image_with_a_confident_class(api, tmp_path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    black, broken = api.predict([tmp_path / "black.png", tmp_path / "broken.png"])
    assert black["predicted_class"] in api.classes
    assert (broken["predicted_class"], broken["confidence"]) == ("ERROR", 0.0)


def test_the_api_takes_paths_bytes_and_pillows_images_alike(api, products) -> None:
    path = products.root / "사진/P004/main_0.png"
    turned, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(path).rotate(90, expand=True).save(turned, "PNG", exif=exif)
    things = [str(path), path, path.read_bytes(), Image.open(path), Image.open(path).convert("HSV"), turned.getvalue()]
    found = api.predict([*things, Image.open(BytesIO(turned.getvalue())), None, 7])
    assert len({(row["predicted_class"], round(row["confidence"], 2)) for row in found[:7]}) == 1
    assert [row["image_path"] for row in found[:4]] == [str(path), str(path), "image 2", str(path)]
    assert [row["predicted_class"] for row in found[7:]] == ["ERROR", "ERROR"]
    (alone,) = api.predict(path)
    assert alone == found[1] | {"confidence": pytest.approx(found[1]["confidence"], abs=1e-5)}


def test_the_api_agrees_with_the_ensemble_stage_and_takes_its_weights_and_temperature(ensemble, tmp_path) -> None:
    stored = predictions.read(ensemble / "ensemble" / "predictions.parquet")
    paths = [ensemble / "eval" / name for name in stored.ids]
    facts = json.loads((ensemble / "ensemble" / "ensemble.json").read_text())
    assert facts["temperature"] != 1  # fitted on the holdout: an answer without it would differ
    found = ImageClassificationAPI(ensemble).predict(paths)
    classes = np.array(stored.classes, object)[stored.log_probs.argmax(axis=1)]
    assert [row["predicted_class"] for row in found] == classes.tolist()
    expected = np.exp(stored.log_probs.max(axis=1))
    np.testing.assert_allclose([row["confidence"] for row in found], expected, atol=1e-5)

    shutil.copytree(ensemble, tmp_path / "bare", ignore=shutil.ignore_patterns("ensemble", "eval"))
    bare = ImageClassificationAPI(tmp_path / "bare").predict(paths)
    single = [ImageClassificationAPI(ensemble / f"fold-{fold}").predict(paths) for fold in (0, 1)]
    same = [at for at in range(len(paths)) if len({rows[at]["predicted_class"] for rows in [*single, bare]}) == 1]
    assert len(same) > len(paths) / 2
    mean = [(single[0][at]["confidence"] + single[1][at]["confidence"]) / 2 for at in same]
    np.testing.assert_allclose([bare[at]["confidence"] for at in same], mean, atol=1e-5)
    assert np.abs(expected - [row["confidence"] for row in bare]).max() > 1e-3


@pytest.mark.parametrize("blend", ["geometric", "vote"])
def test_the_api_blends_as_the_ensemble_did(ensemble, tmp_path, blend) -> None:
    shutil.copytree(ensemble, tmp_path / "run", ignore=shutil.ignore_patterns("ensemble"), symlinks=True)
    where = {
        "SM_CHANNEL_MODEL": ensemble,
        "SM_CHANNEL_EVAL": ensemble / "eval",
        "SM_OUTPUT_DATA_DIR": tmp_path / "run/e",
    }
    assert stage("ensemble", f"ensemble.within={blend}", **where) == 0
    stored = predictions.read(tmp_path / "run/e/predictions.parquet")
    found = ImageClassificationAPI(tmp_path / "run").predict([ensemble / "eval" / name for name in stored.ids])
    np.testing.assert_allclose([row["confidence"] for row in found], np.exp(stored.log_probs.max(axis=1)), atol=1e-4)


def test_the_api_reads_a_students_folder_and_a_tarball(shop, products, tmp_path) -> None:
    channels = {"SM_CHANNEL_TRAIN": products.root, "SM_CHANNEL_FOLDS": shop / "split", "SM_CHANNEL_MODEL": shop}
    where = {"SM_MODEL_DIR": tmp_path / "student", "SM_OUTPUT_DATA_DIR": tmp_path / "output"}
    assert stage("distill", "distill.teacher=best_fold", *TRAINING, "train.epochs=1", **channels, **where) == 0
    path = products.root / "사진/P004/main_0.png"
    assert ImageClassificationAPI(tmp_path / "student").predict([path])[0]["confidence"] > 0.25
    packed = Path(shutil.make_archive(str(tmp_path / "model"), "gztar", shop / "fold-0" / "model"))
    from_tarball = ImageClassificationAPI(packed).predict([path])
    assert from_tarball == ImageClassificationAPI(shop / "fold-0").predict([path])


def test_the_api_says_what_is_wrong_with_a_model(shop, ensemble, tmp_path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        ImageClassificationAPI(tmp_path / "absent")
    with pytest.raises(MissingInputError, match="no model below"):
        ImageClassificationAPI(tmp_path)
    with pytest.raises(SettingsError, match=r"unknown device 'gpu'"):
        ImageClassificationAPI(shop, device="gpu")
    shutil.copytree(ensemble / "fold-0", tmp_path / "both" / "a")
    shutil.copytree(shop / "fold-0", tmp_path / "both" / "b")
    with pytest.raises(DataError, match="differ"):
        ImageClassificationAPI(tmp_path / "both")
    shutil.copytree(ensemble, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    description = tmp_path / "run" / "ensemble" / "ensemble.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"within": "rank"}))
    with pytest.raises(DataError, match="blends by rank, which says nothing of an image alone"):
        ImageClassificationAPI(tmp_path / "run")
    description.write_text('{"members": [{"x": 1}]}')
    with pytest.raises(DataError, match="does not describe an ensemble"):
        ImageClassificationAPI(tmp_path / "run")


def test_importing_the_package_stays_light_and_the_api_comes_when_asked_for() -> None:
    code = (
        "import sys, fivefold\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from fivefold import ImageClassificationAPI\nassert 'torch' in sys.modules\n"
        "print(sorted(fivefold.__all__))\nfivefold.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "['ImageClassificationAPI', '__version__']\n"
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'fivefold' has no attribute 'nothing'"


def test_images_that_changed_since_the_split_are_no_truth(shop, products, tmp_path) -> None:
    shutil.copytree(products.root, tmp_path / "data")
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "사진/P000/main_0.png")
    channels = {"SM_CHANNEL_IMAGES": tmp_path / "data", "SM_CHANNEL_FOLDS": shop / "split", "SM_CHANNEL_MODEL": shop}
    assert stage("predict", **channels, SM_OUTPUT_DATA_DIR=tmp_path / "out") == 0
    counts = Counter(row["predicted_class"] == "ERROR" for row in rows_of(tmp_path / "out" / "predictions.csv"))
    assert counts[True] == 1


def test_a_disk_too_small_for_the_model_is_told_before_training(shop, products, tiny_disk) -> None:
    channels = {"SM_CHANNEL_TRAIN": products.root, "SM_CHANNEL_FOLDS": shop / "split"}
    where = {"SM_MODEL_DIR": tiny_disk / "model", "SM_OUTPUT_DATA_DIR": tiny_disk / "out", "SM_OUTPUT_DIR": tiny_disk}
    assert stage("train-fold", "FOLD=0", *TRAINING, "train.epochs=1000000", **channels, **where) == 75
    message = (tiny_disk / "failure").read_text().split("\n")[0]
    assert re.search(r"has 0\.\d MiB free, and what this stage writes takes about 4\.\d MiB: free some", message)
    assert not list((tiny_disk / "model").iterdir())
