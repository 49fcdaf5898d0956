"""The predict job (command line and container) and the API, on the run of the drawn products."""

import json
import logging
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold import ImageClassificationAPI, predictions
from fivefold.contract.files import read_json, write_json
from fivefold.data.split.fold_table import read_folds
from fivefold.errors import DataError, MissingInputError, SettingsError
from jobs.__main__ import run
from jobs.predict import write_results
from toy_data import LEARNS_PRODUCTS, REPOSITORY, copy_run, failure, read_rows, run_stage

HEADER = ["image_path", "predicted_class", "confidence", "true_class"]
IMAGE = "사진/P001/main_0.png"


def run_predict(root: Path, output: Path, *arguments: str, **channels: object) -> Path:
    """Run predict on the images and the split of a run; return the output folder."""
    environ = {"IMAGES": root / "train", "MODEL": root, "SM_OUTPUT_DATA_DIR": output, **channels}
    assert run_stage(root, "predict", output, *arguments, **environ) == 0
    return output


def predict_files(root: Path, images: Path, output: Path) -> list[dict[str, str]]:
    """Run predict on images outside any split; return its rows."""
    assert run("predict", [f"images={images}", f"model={root}", f"output={output}"], {}) == 0
    return read_rows(output / "predictions.csv")


def metrics(folder: Path) -> dict:
    return read_json(folder / "stage.json")["metrics"]


def test_command_line_prints_one_result_and_stores_it_in_its_own_folder(
    product_run, products, tmp_path, monkeypatch, capsys
):
    image = products.root / IMAGE
    monkeypatch.chdir(tmp_path)
    assert run("predict", [f"images={image}", f"model={product_run / 'fold-0/model'}"], {}) == 0
    (folder,) = (tmp_path / "test_result").iterdir()
    assert re.fullmatch(r"run_\d{8}_\d{6}_[0-9a-f]{8}", folder.name)
    (row,) = read_rows(folder / "predictions.csv")
    assert list(row) == HEADER
    printed = json.loads(capsys.readouterr().out)
    assert printed["image_path"] == row["image_path"] == str(image)
    assert printed["predicted_class"] == row["predicted_class"] == "full_shot"
    assert 0.25 < printed["confidence"] == pytest.approx(float(row["confidence"]), abs=1e-6)


def test_predicting_a_split_lists_the_errors_of_train_valid_and_test(product_run, tmp_path):
    table = read_folds(product_run / "split" / "output" / "folds.parquet")
    settings = ["predict.file=inference_results.csv", "predict.folder=test_result", "run=run_1"]
    model = product_run / "fold-1"
    folder = run_predict(product_run, tmp_path, *settings, MODEL=model) / "test_result" / "run_1"
    parts = np.select([table.part == "holdout", table.fold == 1], ["test", "valid"], "train")
    results = read_rows(folder / "inference_results.csv")
    assert [row["image_path"] for row in results] == table.paths.to_pylist()
    assert [row["true_class"] for row in results] == table.labels().tolist()
    for part in ("train", "valid", "test"):
        rows = [row for row, row_part in zip(results, parts, strict=True) if row_part == part]
        expected = {row["image_path"] for row in rows if row["predicted_class"] != row["true_class"]}
        error_rows = read_rows(folder / f"wrong_{part}.csv")
        assert {row["path"] for row in error_rows} == expected
        confidences = [float(row["confidence"]) for row in error_rows]
        assert confidences == sorted(confidences, reverse=True)
        scores = metrics(tmp_path)[part]
        assert scores["n"] == len(rows)
        assert scores["accuracy"] == pytest.approx(1 - len(expected) / len(rows), abs=1e-6)
    confidence = {row["image_path"]: float(row["confidence"]) for row in results}
    for name, part in (("oof", "valid"), ("holdout", "test")):  # predicted by the training stage, with the same views
        stored = predictions.read(model / "model" / f"{name}.parquet")
        assert sorted(stored.ids) == sorted(np.array(table.paths.to_pylist())[parts == part])
        np.testing.assert_allclose([confidence[n] for n in stored.ids], np.exp(stored.log_probs.max(axis=1)), atol=1e-5)
    run_predict(product_run, tmp_path, *settings, "predict.subsets=test", MODEL=model)
    assert len(read_rows(folder / "inference_results.csv")) == (parts == "test").sum()
    assert [path.name for path in folder.glob("wrong_*.csv")] == ["wrong_test.csv"]


def test_part_table_of_a_split_is_predicted_and_scored(product_run, products, tmp_path, capsys):
    batch = product_run / "split" / "output" / "test_data.csv"
    common = [f"images={batch}", f"model={product_run}", f"output={tmp_path}", f"data.image_root={products.root}"]
    for arguments in (["predict.batch_size=3"], []):  # never skipped, because the output is the result
        assert run("predict", [*common, *arguments], {}) == 0
        assert capsys.readouterr().out
    results, table_rows = read_rows(tmp_path / "predictions.csv"), read_rows(batch)
    assert [row["image_path"] for row in results] == [row["image_path"] for row in table_rows]
    assert [row["true_class"] for row in results] == [row["image_type"] for row in table_rows]
    assert (tmp_path / "wrong_test.csv").is_file()
    correct = [row["predicted_class"] == row["true_class"] for row in results]
    assert metrics(tmp_path)["test"]["accuracy"] == pytest.approx(np.mean(correct), abs=1e-6)


def test_unreadable_images_give_error_rows_and_the_stage_continues(product_run, products, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(products.root / IMAGE, folder / "좋다.png")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (1, 3000)).save(folder / "thin.png")
    (folder / "list.csv").write_text(
        "image_path,true_class\n좋다.png,full_shot\nbroken.png,\nempty.jpg,care_label\nabsent.png,\n../../x.png,\n"
        "tiny.png,\nthin.png,\n,\n좋다.png,\n",
        encoding="utf-8-sig",
    )
    results = predict_files(product_run, folder / "list.csv", tmp_path / "out")
    bad = ["broken.png", "empty.jpg", "absent.png", "../../x.png", ""]
    assert [row["image_path"] for row in results] == ["좋다.png", *bad[:4], "tiny.png", "thin.png", "", "좋다.png"]
    errors = [row for row in results if row["predicted_class"] == "ERROR"]
    assert ([row["image_path"] for row in errors], {row["confidence"] for row in errors}) == (bad, {"0.000000"})
    assert results[0]["predicted_class"] == results[-1]["predicted_class"] == "full_shot"
    assert (metrics(tmp_path / "out")["errors"], metrics(tmp_path / "out")["test"]["n"]) == (5, 1)
    (row,) = predict_files(product_run, folder / "broken.png", tmp_path / "none")
    assert row["predicted_class"] == "ERROR"


def test_unsupported_formats_give_error_rows_and_content_decides_the_format(product_run, products, tmp_path):
    folder = tmp_path / "images"
    (folder / "@eaDir").mkdir(parents=True)
    for name in ("a.png", "b", "@eaDir/a.png"):
        shutil.copy(products.root / IMAGE, folder / name)
    for name in ("c.dng", "d.HEIC", "notes.txt"):
        (folder / name).write_bytes(b"nothing")
    results = predict_files(product_run, folder, tmp_path / "out")
    assert [row["image_path"] for row in results] == ["a.png", "b", "c.dng", "d.HEIC"]
    assert [row["predicted_class"] for row in results] == ["full_shot", "full_shot", "ERROR", "ERROR"]


def test_formula_in_a_file_name_is_escaped_in_the_table(tmp_path):
    results = [
        {"image_path": "=HYPERLINK(1).png", "predicted": "a", "confidence": 0.5},
        {"image_path": "-5", "predicted": "b", "confidence": 1},
    ]
    rows = read_rows(write_results(tmp_path / "p.csv", results, ["", ""]))
    assert [row["image_path"] for row in rows] == ["'=HYPERLINK(1).png", "-5"]


def test_folders_named_after_classes_give_the_true_classes(product_run, tmp_path):
    for name in ("full_shot", "care_label"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name / "1.png")
    rows = predict_files(product_run, tmp_path / "images", tmp_path / "out")
    assert [row["true_class"] for row in rows] == ["care_label", "full_shot"]
    assert [row["true_class"] for row in read_rows(tmp_path / "out" / "wrong_test.csv")] == ["care_label"]


@pytest.mark.parametrize(
    ("images", "arguments", "code", "message"),
    [
        ("absent.jpg", [], 66, "absent.jpg does not exist"),
        ("empty", [], 65, "no images below"),
        ("a.png", ["model={}/empty"], 66, "no model below"),
        ("strange.csv", [], 65, "'shoe'"),
        ("paths.csv", [], 65, "has no column image_path, img_path, path or the like"),
        ("a.png", ["predict.device=cuda"], 64, "predict.device=cuda, but this machine has no such device"),
        ("a.png", ["predict.file=../x.csv"], 64, "predict.file: '../x.csv'"),
        ("a.png", ["predict.subsets=all"], 64, "predict.subsets='all'"),
        ("a.png", ["image=b.png"], 64, "unknown key 'image'"),
        ("strange.csv", ["data.image_root=/nowhere"], 66, "data.image_root=/nowhere: "),
    ],
)
def test_bad_input_gives_one_clear_error(product_run, tmp_path, images, arguments, code, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange.csv").write_text("image_path,true_class\na.png,shoe\n")
    (tmp_path / "paths.csv").write_text("where\nnowhere.png\n")
    common = [f"images={tmp_path / images}", f"model={product_run / 'fold-0'}", f"output={tmp_path / 'out'}"]
    formatted = [argument.format(tmp_path) for argument in arguments]
    assert run("predict", [*common, *formatted], {"SM_OUTPUT_DIR": str(tmp_path / "failed")}) == code
    assert message in failure(tmp_path / "failed")
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.fixture
def api(product_run) -> ImageClassificationAPI:
    return ImageClassificationAPI(product_run / "fold-0" / "model")


def test_api_keeps_the_order_and_gives_error_rows_for_bad_images(api, products, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes((products.root / IMAGE).read_bytes()[:60])
    paths = sorted(map(str, (products.root / "사진").rglob("main_*.png")))[:40]
    bad = [str(tmp_path / "absent.jpg"), str(tmp_path), "a\0b"]
    names = [paths[0], str(tmp_path / "broken.jpg"), *paths, *bad, paths[0]]
    with caplog.at_level(logging.INFO, "fivefold"):
        results = api.predict(names)
    assert [row["image_path"] for row in results] == names
    assert all(list(row) == HEADER[:3] for row in results)
    errors = [row for row in results if row["predicted_class"] == "ERROR"]
    assert [(row["image_path"], row["confidence"]) for row in errors] == [(names[at], 0.0) for at in (1, 42, 43, 44)]
    valid_rows = [row for row in results if row not in errors]
    assert all(0.25 < row["confidence"] <= 1 and row["predicted_class"] in api.classes for row in valid_rows)
    assert results[0] == results[2]
    assert results[-1] == results[0] | {"confidence": pytest.approx(results[0]["confidence"], abs=1e-5)}
    assert "42 successes, 4 failures" in caplog.text
    assert [path.name for path in tmp_path.rglob("*")] == ["broken.jpg"]
    assert api.predict([]) == []


def test_api_gives_equal_results_for_paths_bytes_and_pillow_images(api, products):
    path = products.root / "사진/P004/main_0.png"
    turned, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(path).rotate(90, expand=True).save(turned, "PNG", exif=exif)
    inputs = [str(path), path, path.read_bytes(), Image.open(path), Image.open(path).convert("HSV"), turned.getvalue()]
    results = api.predict([*inputs, Image.open(BytesIO(turned.getvalue())), None, 7])
    assert len({(row["predicted_class"], round(row["confidence"], 2)) for row in results[:7]}) == 1
    assert [row["image_path"] for row in results[:4]] == [str(path), str(path), "image 2", str(path)]
    assert [row["predicted_class"] for row in results[7:]] == ["ERROR", "ERROR"]
    (single,) = api.predict(path)
    assert single == results[1] | {"confidence": pytest.approx(results[1]["confidence"], abs=1e-5)}


def test_images_folder_rejects_paths_outside_it(product_run, products, tmp_path):
    folder = tmp_path / "uploads"
    shutil.copytree(products.root / "사진/P004", folder / "P004")
    (tmp_path / "secret.png").write_bytes((folder / "P004/main_0.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    good = ["P004/main_0.png", str(folder / "P004/main_0.png"), "P004/../P004/main_0.png"]
    bad = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "/dev/zero", "~/secret.png", "a\0b", "P004"]
    api = ImageClassificationAPI(product_run / "fold-0" / "model", images_folder=folder)
    read = [row["predicted_class"] != "ERROR" for row in api.predict([*good, *bad, Path("../secret.png")])]
    assert read == [True] * len(good) + [False] * (len(bad) + 1)
    with pytest.raises(MissingInputError):
        ImageClassificationAPI(product_run / "fold-0" / "model", images_folder=tmp_path / "absent")


def get_confidences(rows: list[dict]) -> np.ndarray:
    return np.array([row["confidence"] for row in rows])


def test_api_agrees_with_the_ensemble_stage_including_weights_and_temperature(product_run, tmp_path):
    output = product_run / "ensemble" / "output"
    stored = predictions.read(output / "predictions.parquet")
    paths = [product_run / "eval" / name for name in stored.ids]
    assert read_json(output / "ensemble.json")["temperature"] != 1  # predictions without it would differ
    results = ImageClassificationAPI(product_run).predict(paths)
    classes = np.array(stored.classes, object)[stored.log_probs.argmax(axis=1)]
    assert [row["predicted_class"] for row in results] == classes.tolist()
    expected = np.exp(stored.log_probs.max(axis=1))
    np.testing.assert_allclose(get_confidences(results), expected, atol=1e-5)

    unweighted = ImageClassificationAPI(copy_run(product_run, tmp_path / "bare", "ensemble", "eval")).predict(paths)
    single = [ImageClassificationAPI(product_run / f"fold-{fold}").predict(paths) for fold in (0, 1)]
    same = [at for at in range(len(paths)) if len({rows[at]["predicted_class"] for rows in [*single, unweighted]}) == 1]
    assert len(same) > len(paths) / 2
    np.testing.assert_allclose(
        get_confidences(unweighted)[same], np.mean([get_confidences(rows)[same] for rows in single], axis=0), atol=1e-5
    )
    assert np.abs(expected - get_confidences(unweighted)).max() > 1e-3


def test_api_reads_a_student_folder_and_a_tarball(product_run, products, tmp_path):
    path = products.root / "사진/P004/main_0.png"
    assert ImageClassificationAPI(product_run / "distill" / "model").predict([path])[0]["confidence"] > 0.25
    tarball = Path(shutil.make_archive(str(tmp_path / "model"), "gztar", product_run / "fold-0" / "model"))
    expected = ImageClassificationAPI(product_run / "fold-0").predict([path])
    assert ImageClassificationAPI(tarball).predict([path]) == expected


def test_api_reports_what_is_wrong_with_a_model(product_run, tmp_path):
    root = copy_run(product_run, tmp_path / "run", "eval")
    description = root / "ensemble" / "output" / "ensemble.json"
    write_json(description, read_json(description) | {"within": "rank"})
    (tmp_path / "empty").mkdir()
    for folder, error, message in (
        (tmp_path / "absent", MissingInputError, "does not exist"),
        (tmp_path / "empty", MissingInputError, "no model below"),
        (root, DataError, "blends by rank"),
    ):
        with pytest.raises(error, match=message):
            ImageClassificationAPI(folder)
    with pytest.raises(SettingsError, match=r"unknown device 'gpu'"):
        ImageClassificationAPI(product_run, device="gpu")
    description.write_text('{"members": [{"x": 1}]}')
    with pytest.raises(DataError, match="does not describe an ensemble"):
        ImageClassificationAPI(root)


def test_package_import_is_light():
    code = (
        "import sys, fivefold\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(sorted(fivefold.__all__))\nfivefold.nothing"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout == "['ImageClassificationAPI', '__version__']\n"
    assert result.stderr.splitlines()[-1] == "AttributeError: module 'fivefold' has no attribute 'nothing'"


def test_changed_images_give_error_rows_and_an_ensemble_has_no_validation_rows(product_run, products, tmp_path):
    shutil.copytree(products.root, tmp_path / "data")
    Image.new("RGB", (16, 16)).save(tmp_path / "data" / "사진/P000/main_0.png")
    folder = run_predict(product_run, tmp_path / "out", IMAGES=tmp_path / "data")
    rows = read_rows(folder / "predictions.csv")
    assert [row["predicted_class"] for row in rows].count("ERROR") == 1
    assert sorted(path.name for path in folder.glob("wrong_*")) == ["wrong_test.csv", "wrong_train.csv"]


def test_disk_too_small_for_the_model_is_reported_before_training(product_run, tiny_disk):
    assert run_stage(product_run, "train-fold", tiny_disk, "FOLD=0", *LEARNS_PRODUCTS, "train.epochs=1000000") == 75
    assert re.search(r"has 0\.\d MiB free, .* 4\.\d MiB: free some", failure(tiny_disk))
    assert not list((tiny_disk / "model").iterdir())
