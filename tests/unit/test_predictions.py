from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fivefold.errors import DataError, MissingInputError
from fivefold.predictions import Predictions, mean_by_id, read, reorder_classes, write

CLASSES = ("cat", "fold", "id", "label", "")


def make_table(rows: int = 4, classes: tuple[str, ...] = CLASSES, seed: int = 0, labels: bool = True) -> Predictions:
    logits = np.random.default_rng(seed).normal(0, 20, (rows, len(classes)))
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return Predictions(
        ids=np.array([f"row-{n}" for n in range(rows)], dtype=object),
        fold=(np.arange(rows) % 3).astype(np.int16),
        system="a system",
        classes=classes,
        log_probs=log_probs.astype(np.float32),
        labels=np.array([classes[n % len(classes)] for n in range(rows)], dtype=object) if labels else None,
    )


def assert_same(actual: Predictions, expected: Predictions) -> None:
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(actual, name), value)


@pytest.mark.parametrize(
    "expected",
    [
        make_table(1),
        make_table(7, labels=False),
        replace(make_table(0), system=""),
        *(
            Predictions(np.array(["x"], object), np.array([0], np.int16), "s", ("a", "b"), np.array([row], np.float32))
            for row in ([-1e-20, -46.05], [0.0, -np.inf])
        ),
    ],
    ids=["labelled", "unlabelled", "empty", "almost certain", "certain"],
)
def test_written_table_is_read_unchanged_and_has_reproducible_bytes(expected: Predictions, tmp_path: Path):
    for name in ("a", "b"):
        write(tmp_path / name, expected)
    assert_same(read(tmp_path / "a"), expected)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_read_returns_null_labels_as_empty_and_integer_ids_as_text(tmp_path: Path):
    write(tmp_path / "t", make_table(2))
    table = replace_column("id", pa.array([7, 8]))(pq.read_table(tmp_path / "t"))
    pq.write_table(replace_column("label", pa.array(["cat", None]))(table), tmp_path / "t")
    assert (list(read(tmp_path / "t").labels), list(read(tmp_path / "t").ids)) == (["cat", ""], ["7", "8"])


def replace_column(name: str, column: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, column)


def replace_last(value: float) -> Callable[[pa.Table], pa.Table]:
    """Return a function that replaces the last value of the column `p/cat`."""
    return lambda table: replace_column("p/cat", pa.array([*table["p/cat"].to_pylist()[:-1], value]))(table)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.drop_columns(["system"]), "no column system"),
        (lambda t: t.select(["id", "fold", "system"]), "no column p/<class>"),
        (replace_column("p/cat", pa.array([1, 2, 3, 4])), "column p/cat holds int64, not log-probabilities"),
        (replace_last(float("nan")), "the row of id 'row-3' .* sum to nan"),
        (replace_last(3.5), r"the row of id 'row-3' .* logarithm is 3\.5"),
        (replace_column("id", pa.array(["a", "b", "a", "c"])), "ids.*: 'a'"),
        (replace_column("id", pa.array(["a", None, "b", "c"])), "1 rows have no id"),
        (replace_column("id", pa.array([["a"], ["b"], ["c"], ["d"]])), "column id holds list"),
        (replace_column("fold", pa.array([0, None, 1, 2])), "column fold holds int64, 1 of them null"),
        (replace_column("system", pa.array(["a", "a", "b", "a"])), "rows of several systems: 'a', 'b'"),
        (lambda t: t.append_column("p/cat", t.column("p/cat")), "columns.*: 'p/cat'"),
    ],
)
def test_read_rejects_an_invalid_table_with_its_path_and_fault(damage, message, tmp_path):
    path = tmp_path / "predictions.parquet"
    write(path, make_table(4))
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_read_rejects_a_missing_file_and_a_file_that_is_not_parquet(tmp_path: Path):
    with pytest.raises(MissingInputError, match="no predictions at"):
        read(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("id,fold\n")
    with pytest.raises(DataError, match="is not a Parquet table"):
        read(tmp_path / "text.parquet")


def test_reindex_selects_and_orders_rows_by_id():
    predictions = make_table(5)
    ordered = predictions.reindex(["row-3", "row-0"])
    assert_same(ordered, predictions.take(np.array([3, 0])))
    with pytest.raises(DataError, match="predictions of a system lack 2 ids: 'x', 'y'"):
        predictions.reindex(["row-1", "x", "y"])


def test_codes_map_labels_to_classes_by_name():
    predictions = make_table(4)
    np.testing.assert_array_equal(predictions.codes(), [0, 1, 2, 3])
    with pytest.raises(DataError, match="no labels"):
        make_table(2, labels=False).codes()
    with pytest.raises(DataError, match=r"labels .*: 'cat'"):
        replace(predictions, classes=("fold", "id", "label")).codes()


def test_class_columns_are_matched_by_name_and_not_by_position():
    predictions = make_table(3)
    reversed_columns = predictions.with_classes(CLASSES[::-1])
    np.testing.assert_array_equal(reversed_columns.log_probs, predictions.log_probs[:, ::-1])
    assert_same(reversed_columns.with_classes(CLASSES), predictions)
    with pytest.raises(DataError, match="classes differ: 'cat', 'dog'"):
        reorder_classes(predictions.log_probs[:, :1], ["cat"], ["dog"])


def test_mean_by_id_averages_rows_with_the_same_id():
    def make_predictions(ids: str, labels: str, probs: list[list[float]], fold: int, classes: str) -> Predictions:
        names, truth = (np.array([*texts], object) for texts in (ids, labels))
        log_probs = np.log(np.array(probs, np.float32))
        return Predictions(names, np.full(len(ids), fold), "s", tuple(classes), log_probs, truth)

    first = make_predictions("ba", "xy", [[0.2, 0.8], [0.5, 0.5]], 0, "xy")
    mean = mean_by_id([first, make_predictions("ac", "yx", [[0.9, 0.1], [0.6, 0.4]], 1, "yx")])
    assert (list(mean.ids), list(mean.fold), list(mean.labels)) == (list("bac"), [0, -1, 1], list("xyx"))
    np.testing.assert_allclose(np.exp(mean.log_probs), [[0.2, 0.8], [0.3, 0.7], [0.4, 0.6]], rtol=1e-6)
    assert mean.fold.dtype == np.int16
