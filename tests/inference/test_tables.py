"""Tables joined a block of rows at a time, against the same tables joined as a whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fivefold.errors import DataError, RetryableError
from fivefold.inference.blends import arithmetic, equal
from fivefold.inference.tables import joined, save_predictions
from fivefold.predictions import ROWS_A_GROUP, Predictions, open_table, read

CLASSES = ("cat", "dog", "eel", "fox")
EQUAL = np.full(3, 1 / 3)


def table(seed: int, rows: int, spread: float = 3.0, classes: tuple[str, ...] = CLASSES) -> Predictions:
    logits = np.random.default_rng(seed).normal(0, spread, (rows, len(classes)))
    log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    ids = np.array([f"row-{n}" for n in range(rows)], object)
    return Predictions(ids, np.full(rows, -1, np.int16), f"s{seed}", classes, log_probs)


def whole(tables: list[Predictions], weights: np.ndarray) -> np.ndarray:
    """The join in memory, in double precision, each row brought to sum 1."""
    found = arithmetic([t.with_classes(CLASSES).in_order(tables[0].ids).log_probs for t in tables], weights)
    return found - np.logaddexp.reduce(found.astype(np.float64), axis=1, keepdims=True)


def streamed(folder: Path, tables: list[Predictions], weights: np.ndarray) -> np.ndarray:
    paths = [save_predictions(folder / f"{n}.parquet", each) for n, each in enumerate(tables)]
    return joined_of(folder, paths, weights)


def joined_of(folder: Path, paths: list[Path], weights: np.ndarray) -> np.ndarray:
    files = [open_table(path) for path in paths]
    blocks = list(joined(files, weights, files[0].ids(), folder))
    assert [block.start for block in blocks] == list(range(0, files[0].rows, ROWS_A_GROUP))
    assert pa.concat_arrays([block.ids for block in blocks]).equals(files[0].ids())
    return np.concatenate([np.stack(block.log_probs, axis=1) for block in blocks])


@pytest.mark.parametrize("weights", [EQUAL, np.array([0.7, 0.1, 0.2]), np.array([0.0, 0.5, 0.5])])
@pytest.mark.parametrize("spread", [3.0, 60.0])
def test_the_same_as_in_memory_within_rounding(tmp_path, weights, spread):
    tables = [table(seed, 1000, spread) for seed in range(3)]
    tables[1] = tables[1].with_classes(CLASSES[::-1])
    np.testing.assert_allclose(streamed(tmp_path, tables, weights), whole(tables, weights), rtol=3e-7, atol=3e-7)


def test_several_blocks_of_files_with_other_row_groups(tmp_path):
    rows = 2 * ROWS_A_GROUP + 77
    tables = [table(seed, rows) for seed in range(3)]
    paths = [save_predictions(tmp_path / f"{n}.parquet", each) for n, each in enumerate(tables)]
    pq.write_table(pq.read_table(paths[1]), paths[1], row_group_size=10_000)
    pq.write_table(pq.read_table(paths[2]), paths[2], row_group_size=rows)
    np.testing.assert_allclose(joined_of(tmp_path, paths, EQUAL), whole(tables, EQUAL), rtol=3e-7, atol=3e-7)
    assert len(read(paths[2])) == rows


def test_rows_in_another_order_are_matched_by_id(tmp_path):
    rows = ROWS_A_GROUP + 5
    tables = [table(seed, rows) for seed in range(3)]
    turned = tables[2].take(np.random.default_rng(0).permutation(rows))
    straight = streamed(tmp_path, tables, EQUAL)
    np.testing.assert_array_equal(streamed(tmp_path, [*tables[:2], turned], EQUAL), straight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]


def test_a_disk_without_room_to_sort_in_says_so(tmp_path, tiny_disk):
    tables = [table(0, 9000), table(1, 9000).take(np.arange(9000)[::-1])]
    files = [open_table(save_predictions(tmp_path / f"{n}.parquet", each)) for n, each in enumerate(tables)]
    with pytest.raises(RetryableError, match=r"1\.parquet has its rows in another order .* no room"):
        list(joined(files, equal(2), files[0].ids(), tiny_disk))


def test_a_probability_of_nothing_stays_next_to_nothing(tmp_path):
    certain = Predictions(
        np.array(["x"], object), np.array([0]), "s", CLASSES[:2], np.array([[0.0, -np.inf]], np.float32)
    )
    found = streamed(tmp_path, [certain, certain], equal(2))
    assert found[0, 0] == 0
    assert found[0, 1] < -700
    np.testing.assert_allclose(found, arithmetic([certain.log_probs] * 2, equal(2)), rtol=2e-3)


def spoilt(rows: int, row: int, column: int, value: float) -> Predictions:
    found = table(1, rows)
    found.log_probs[row, column] = value
    return found


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (spoilt(ROWS_A_GROUP + 9, ROWS_A_GROUP + 2, 1, np.nan), rf"1\.parquet: the row of id 'row-{ROWS_A_GROUP + 2}' holds NaN"),
        (spoilt(ROWS_A_GROUP + 9, 7, 0, 3.5), r"1\.parquet: the row of id 'row-7' holds 3\.5, above 0"),
        (spoilt(ROWS_A_GROUP + 9, 7, 0, np.inf), r"1\.parquet: the row of id 'row-7' holds inf, above 0"),
        (table(1, ROWS_A_GROUP + 9, classes=("cat", "dog", "eel", "gnu")), "different classes: 'fox', 'gnu' on one side alone"),
        (table(1, ROWS_A_GROUP + 8), rf"1\.parquet speaks of other rows: 1 ids are not in it \('row-{ROWS_A_GROUP + 8}'\)"),
        (table(1, ROWS_A_GROUP + 10), "1 of its ids are not among them"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_named(tmp_path, second, message):
    with pytest.raises(DataError, match=message):
        streamed(tmp_path, [table(0, ROWS_A_GROUP + 9), second], equal(2))


def test_ids_that_stand_twice_are_named(tmp_path):
    twice = table(0, 9)
    pq.write_table(pq.read_table(save_predictions(tmp_path / "a.parquet", twice)).slice(0, 9), tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(pa.concat_tables([found, found.slice(3, 1)]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: ids stand twice: 'row-3'"):
        open_table(tmp_path / "a.parquet").ids()
