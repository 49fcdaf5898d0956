from dataclasses import replace
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fivefold.contract.artifacts import ModelDir
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import FoldTable
from fivefold.distillation import DistillRows, best_model, exclude_split_images, out_of_fold_targets
from fivefold.ensemble import row_roles
from fivefold.errors import DataError, SettingsError
from fivefold.predictions import Predictions
from fivefold.training.objectives import soften
from toy_data import draw

CLASSES = ("a", "b", "c")
FOLD = np.array([0, 1, 2, 0, 1, 2, -1], np.int16)


@pytest.fixture
def folds() -> FoldTable:
    ids = pa.array([f"r{n}" for n in range(7)])
    part = np.array(["train"] * 6 + ["holdout"], dtype="U7")
    nulls = pa.nulls(7, pa.string())
    return FoldTable(ids, ids, np.arange(7, dtype=np.int32) % 3, CLASSES, nulls, FOLD, part, nulls)


def make_out_of_fold(fold: int, seed: int = 0) -> Predictions:
    rows = np.flatnonzero(fold == FOLD)
    probs = np.random.default_rng([fold, seed]).dirichlet(np.ones(3), len(rows))
    ids = np.array([f"r{row}" for row in rows], dtype=object)
    return Predictions(ids, FOLD[rows], "s", CLASSES, np.log(probs).astype(np.float32))


def test_targets_of_each_row_come_from_the_model_of_its_fold(folds):
    tables = [make_out_of_fold(fold) for fold in (2, 0, 1)]
    rows = np.array([5, 0, 1, 2, 3, 4])
    targets = out_of_fold_targets(tables, folds, rows)
    for target, row in zip(targets, rows, strict=True):
        predictions = next(table for table in tables if table.fold[0] == FOLD[row])
        np.testing.assert_allclose(target, predictions.log_probs[list(predictions.ids).index(f"r{row}")], atol=1e-6)


def test_targets_average_seeds_and_match_columns_by_name(folds):
    tables = [make_out_of_fold(fold, seed) for fold in range(3) for seed in (0, 1)]
    reordered = [table.with_classes(("c", "a", "b")) if n % 2 else table for n, table in enumerate(tables)]
    rows = np.arange(6)
    expected = np.mean([np.exp(out_of_fold_targets(tables[s::2], folds, rows)) for s in (0, 1)], axis=0)
    np.testing.assert_allclose(np.exp(out_of_fold_targets(reordered, folds, rows)), expected, atol=1e-6)


def test_missing_predictions_and_those_of_a_wrong_fold_are_rejected(folds):
    tables = [make_out_of_fold(0), make_out_of_fold(1)]
    with pytest.raises(SettingsError, match="2 of 6 training rows"):
        out_of_fold_targets(tables, folds, np.arange(6))
    tables[0].fold[:] = 1
    with pytest.raises(DataError, match="another fold"):
        out_of_fold_targets([*tables, make_out_of_fold(2)], folds, np.arange(6))


def test_soften_keeps_probabilities_at_temperature_1_and_flattens_them_at_2():
    log_probs = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    np.testing.assert_allclose(soften(log_probs, 1.0), [[0.7, 0.2, 0.1]], atol=1e-6)
    root = np.sqrt([0.7, 0.2, 0.1])
    np.testing.assert_allclose(soften(log_probs, 2.0), [root / root.sum()], atol=1e-6)


def test_defect_car_b5_best_model_has_the_lowest_logloss_and_need_not_be_the_first(tmp_path):
    models = [ModelDir(tmp_path / str(n), {"best": {"logloss": loss}}) for n, loss in enumerate((0.5, 0.3, 0.4))]
    assert best_model(models).path.name == "1"


@pytest.mark.parametrize("digests", [False, True])
def test_unlabelled_images_with_the_pixels_of_a_split_image_are_excluded(folds, tmp_path, digests, caplog):
    """With and without digests in the split; training and holdout images, re-encoded under another name."""
    for number in range(9):
        draw(tmp_path / f"r{number}.png", np.random.default_rng(number))
    folds = replace(folds, paths=pa.array([f"{name}.png" for name in folds.ids.to_pylist()]))
    (tmp_path / "given").mkdir()
    for name, row in {"fold.png": 2, "holdout.png": 6, "new.png": 7, "other.png": 8}.items():
        with Image.open(tmp_path / f"r{row}.png") as image:
            image.save(tmp_path / "given" / name, compress_level=1)
    if digests:
        checksums = [sha256((tmp_path / name).read_bytes()).hexdigest() for name in folds.paths.to_pylist()]
        folds = replace(folds, sha256=pa.array(checksums))
    distill_rows = DistillRows(folds, np.arange(6), open_store(tmp_path))
    (tmp_path / "given" / "broken.png").write_bytes((tmp_path / "given" / "new.png").read_bytes()[:60])
    unlabelled = ["broken.png", "fold.png", "holdout.png", "new.png", "other.png"]
    assert exclude_split_images(open_store(tmp_path / "given"), unlabelled, distill_rows) == ["new.png", "other.png"]
    unreadable, duplicates = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "broken.png" in unreadable
    assert "2 of 5" in duplicates


def test_rows_that_selected_the_epoch_of_a_student_count_as_validation(folds, tmp_path):
    student = ModelDir(tmp_path, {"fold": None, "selected_on": None})
    assert row_roles([student], folds).tolist() == ["train"] * 6 + ["test"]
    selected = ModelDir(tmp_path, {"fold": None, "selected_on": "holdout"})
    assert row_roles([selected], folds).tolist() == ["train"] * 6 + ["valid"]
    assert row_roles([student, selected], folds)[-1] == "valid"
