"""The table that crosses stages: what is written is read, and what is broken is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fivefold.errors import DataError, MissingInputError
from fivefold.predictions import ROW_GROUP_SIZE, Predictions, check, mean_by_id, read, reorder_classes, write

CLASSES = ("cat", "fold", "id", "label", "")


def table(rows: int = 4, classes: tuple[str, ...] = CLASSES, seed: int = 0, labels: bool = True) -> Predictions:
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


def assert_same(found: Predictions, expected: Predictions) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.fold, expected.fold)
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    assert (found.system, found.classes) == (expected.system, expected.classes)
    if expected.labels is None:
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    "expected",
    [
        table(1),
        table(7, labels=False),
        *(
            Predictions(np.array(["x"], object), np.array([0], np.int16), "s", ("a", "b"), np.array([row], np.float32))
            for row in ([-1e-20, -46.05], [0.0, -np.inf])
        ),
    ],
    ids=["labelled", "unlabelled", "nearly sure", "sure"],
)
def test_what_is_written_is_read_and_the_same_table_gives_the_same_bytes(expected: Predictions, tmp_path: Path):
    for name in ("a", "b"):
        write(tmp_path / name, expected)
    assert_same(read(tmp_path / "a"), expected)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_table_without_rows_keeps_its_classes(tmp_path: Path):
    write(tmp_path / "t", table(0))
    assert (len(read(tmp_path / "t")), read(tmp_path / "t").classes) == (0, CLASSES)


def test_unknown_labels_are_empty_and_whole_number_ids_texts(tmp_path: Path):
    write(tmp_path / "t", table(2))
    changed = replaced("label", pa.array(["cat", None]))(
        replaced("id", pa.array([7, 8]))(pq.read_table(tmp_path / "t"))
    )
    pq.write_table(changed, tmp_path / "t")
    assert (list(read(tmp_path / "t").labels), list(read(tmp_path / "t").ids)) == (["cat", ""], ["7", "8"])


def replaced(name: str, column: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda found: found.set_column(found.column_names.index(name), name, column)


def with_value(row: int, value: float | None) -> Callable[[pa.Table], pa.Table]:
    """Has another value in one row of the column of cats."""

    def change(found: pa.Table) -> pa.Table:
        values = found.column("p/cat").to_pylist()
        values[row] = value
        return replaced("p/cat", pa.array(values, pa.float32()))(found)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.drop_columns(["system"]), "no column system"),
        (lambda t: t.select(["id", "fold", "system"]), "no column p/<class>"),
        (replaced("p/cat", pa.array([1, 2, 3, 4])), "column p/cat holds int64, not log-probabilities"),
        (with_value(1, None), "the row of id 'row-1' holds NaN"),
        (with_value(2, float("nan")), "the row of id 'row-2' holds NaN"),
        (with_value(3, 3.5), r"the row of id 'row-3' holds 3\.5, above 0"),
        (replaced("id", pa.array(["a", "b", "a", "c"])), "ids.*: 'a'"),
        (replaced("id", pa.array(["a", None, "b", "c"])), "1 rows have no id"),
        (replaced("id", pa.array([["a"], ["b"], ["c"], ["d"]])), "column id holds list"),
        (replaced("fold", pa.array([0, None, 1, 2])), "column fold holds int64, 1 of them null"),
        (replaced("system", pa.array(["a", "a", "b", "a"])), "rows of several systems: 'a', 'b'"),
        (lambda t: t.append_column("p/cat", t.column("p/cat")), "columns.*: 'p/cat'"),
    ],
)
def test_a_broken_table_is_named(damage: Callable[[pa.Table], pa.Table], message: str, tmp_path: Path):
    path = tmp_path / "predictions.parquet"
    write(path, table(4))
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_row_that_does_not_sum_to_one_is_named_in_a_later_block_too():
    good = np.log(np.full((ROW_GROUP_SIZE + 3, 2), 0.5, np.float32))
    good[ROW_GROUP_SIZE + 1] = np.log([0.5, 0.4])
    ids = np.array([f"{n}" for n in range(len(good))], object)
    with pytest.raises(DataError, match=rf"id '{ROW_GROUP_SIZE + 1}': its probabilities sum to 0\.9000, not 1"):
        check(Predictions(ids, np.zeros(len(good)), "s", ("a", "b"), good), "here")


def test_no_file_and_no_table(tmp_path: Path):
    with pytest.raises(MissingInputError, match="no predictions at"):
        read(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("id,fold\n")
    with pytest.raises(DataError, match="is not a Parquet table"):
        read(tmp_path / "text.parquet")


def test_rows_are_taken_and_ordered_by_id():
    whole = table(5)
    ordered = whole.reindex(["row-3", "row-0"])
    assert_same(ordered, whole.take(np.array([3, 0])))
    with pytest.raises(DataError, match="predictions of a system lack 2 ids: 'x', 'y'"):
        whole.reindex(["row-1", "x", "y"])


def test_labels_become_codes_by_name():
    whole = table(4)
    np.testing.assert_array_equal(whole.codes(), [0, 1, 2, 3])
    with pytest.raises(DataError, match="no labels"):
        table(2, labels=False).codes()
    with pytest.raises(DataError, match=r"labels .*: 'cat'"):
        Predictions(whole.ids, whole.fold, "s", ("a", "b"), whole.log_probs[:, :2], np.array(["cat"] * 4)).codes()


def test_columns_are_matched_by_name_never_by_position():
    whole = table(3)
    turned = whole.with_classes(CLASSES[::-1])
    np.testing.assert_array_equal(turned.log_probs, whole.log_probs[:, ::-1])
    assert_same(turned.with_classes(CLASSES), whole)
    with pytest.raises(DataError, match="classes differ: 'cat', 'dog'"):
        reorder_classes(whole.log_probs[:, :1], ["cat"], ["dog"])


def test_the_mean_of_tables_by_hand():
    def one(ids: str, labels: str, probs: list[list[float]], fold: int, classes: tuple[str, ...]) -> Predictions:
        log_probs, folds = np.log(np.array(probs, np.float32)), np.full(len(ids), fold)
        return Predictions(np.array(list(ids), object), folds, "s", classes, log_probs, np.array(list(labels), object))

    first = one("ba", "xy", [[0.2, 0.8], [0.5, 0.5]], 0, ("x", "y"))
    found = mean_by_id([first, one("ac", "yx", [[0.9, 0.1], [0.6, 0.4]], 1, ("y", "x"))])
    assert (list(found.ids), list(found.fold), list(found.labels)) == (list("bac"), [0, -1, 1], list("xyx"))
    np.testing.assert_allclose(np.exp(found.log_probs), [[0.2, 0.8], [0.3, 0.7], [0.4, 0.6]], rtol=1e-6)
    assert found.fold.dtype == np.int16
