"""What a teacher may say: leak-freedom, row by row."""

import numpy as np
import pyarrow as pa
import pytest

from fivefold.contract.artifacts import ModelDir
from fivefold.data.folds import FoldTable
from fivefold.distillation import best_model, out_of_fold_targets
from fivefold.errors import DataError, SettingsError
from fivefold.predictions import Predictions
from fivefold.training.teaching import soften

CLASSES = ("a", "b", "c")
FOLD = np.array([0, 1, 2, 0, 1, 2, -1], np.int16)


@pytest.fixture
def folds() -> FoldTable:
    ids = pa.array([f"r{n}" for n in range(7)])
    part = np.array(["train"] * 6 + ["holdout"], dtype="U7")
    nulls = pa.nulls(7, pa.string())
    return FoldTable(ids, ids, np.arange(7, dtype=np.int32) % 3, CLASSES, nulls, FOLD, part, nulls)


def out_of_fold(fold: int, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Predictions:
    rows = np.flatnonzero(fold == FOLD)
    probs = np.random.default_rng([fold, seed]).dirichlet(np.ones(3), len(rows))
    ids = np.array([f"r{row}" for row in rows], dtype=object)
    return Predictions(ids, FOLD[rows], "s", classes, np.log(probs).astype(np.float32))


def test_each_row_is_taught_by_the_model_that_never_saw_it(folds):
    tables = [out_of_fold(fold) for fold in (2, 0, 1)]
    rows = np.array([5, 0, 1, 2, 3, 4])
    targets = out_of_fold_targets(tables, folds, rows)
    for target, row in zip(targets, rows, strict=True):
        own = next(table for table in tables if table.fold[0] == FOLD[row])
        np.testing.assert_allclose(target, own.log_probs[list(own.ids).index(f"r{row}")], atol=1e-6)


def test_several_seeds_are_averaged_and_columns_matched_by_name(folds):
    tables = [out_of_fold(fold, seed) for fold in range(3) for seed in (0, 1)]
    turned = [table.with_classes(("c", "a", "b")) if n % 2 else table for n, table in enumerate(tables)]
    rows = np.arange(6)
    expected = np.mean([np.exp(out_of_fold_targets(tables[s::2], folds, rows)) for s in (0, 1)], axis=0)
    np.testing.assert_allclose(np.exp(out_of_fold_targets(turned, folds, rows)), expected, atol=1e-6)


def test_a_prediction_from_another_fold_than_the_rows_own_is_refused(folds):
    swapped = out_of_fold(0)
    swapped.fold[:] = 1
    with pytest.raises(DataError, match="another fold than the split's"):
        out_of_fold_targets([swapped, out_of_fold(1), out_of_fold(2)], folds, np.arange(6))


def test_rows_without_a_prediction_say_what_to_do(folds):
    with pytest.raises(SettingsError, match="2 of 6 training rows have no out-of-fold prediction"):
        out_of_fold_targets([out_of_fold(0), out_of_fold(1)], folds, np.arange(6))


def test_softening_at_one_is_the_identity_and_heat_flattens():
    log_probs = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    np.testing.assert_allclose(soften(log_probs, 1.0), [[0.7, 0.2, 0.1]], atol=1e-6)
    root = np.sqrt([0.7, 0.2, 0.1])
    np.testing.assert_allclose(soften(log_probs, 2.0), [root / root.sum()], atol=1e-6)


def test_defect_car_b5_the_best_fold_is_that_of_the_least_logloss_and_not_the_first(tmp_path):
    models = [ModelDir(tmp_path / str(n), {"best": {"logloss": loss}}) for n, loss in enumerate((0.5, 0.3, 0.4))]
    assert best_model(models).path.name == "1"
