from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fivefold.contract.files import write_json
from fivefold.data.split.fold_table import COLUMNS, FoldTable, read_folds, write_folds
from fivefold.errors import DataError, MissingInputError, SettingsError

CLASSES = ("a, b", "fold", "id", "고양이")
ROWS = 24


@pytest.fixture
def table() -> FoldTable:
    """Three folds over 20 rows, and 4 holdout rows."""
    rows = np.arange(ROWS)
    return FoldTable(
        ids=pa.array([f"{row:03d}" for row in rows]),
        paths=pa.array([f"train/{row}.png" for row in rows]),
        codes=(rows % 4).astype(np.int32),
        classes=CLASSES,
        groups=pa.array([None if row % 3 else f"g{row // 6}" for row in rows], pa.string()),
        fold=np.where(rows < 20, rows % 3, -1).astype(np.int16),
        part=np.where(rows < 20, "train", "holdout"),
        sha256=pa.array(["ab" * 32] * ROWS),
    )


def test_fold_table_survives_writing_and_reading(table: FoldTable, tmp_path: Path) -> None:
    write_folds(tmp_path / "folds.parquet", table)
    write_json(tmp_path / "classes.json", {"classes": list(CLASSES)})
    for classes in (None, tmp_path / "classes.json"):
        loaded = read_folds(tmp_path / "folds.parquet", classes)
        assert loaded.classes == CLASSES
        for name in ("ids", "paths", "groups", "sha256"):
            assert getattr(loaded, name).equals(getattr(table, name))
        for name in ("codes", "fold", "part"):
            assert (getattr(loaded, name) == getattr(table, name)).all()
    stored = pq.read_table(tmp_path / "folds.parquet")
    assert stored.schema.equals(pa.schema(COLUMNS))
    assert stored.column("label").to_pylist()[:4] == list(CLASSES)
    write_folds(tmp_path / "again", read_folds(tmp_path / "folds.parquet"))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "folds.parquet").read_bytes()
    write_json(tmp_path / "classes.json", {"classes": [*CLASSES[:1], "extra", *CLASSES[1:]]})
    loaded = read_folds(tmp_path / "folds.parquet", tmp_path / "classes.json")
    assert (loaded.labels() == table.labels()).all(), "a class without rows must remain a class"


def test_fold_table_returns_the_rows_of_folds_and_parts(table: FoldTable) -> None:
    assert table.num_folds == 3
    assert table.held_out_rows().tolist() == [20, 21, 22, 23]
    assert sorted(np.concatenate([table.valid_rows(fold) for fold in range(3)]).tolist()) == list(range(20))
    for fold in range(3):
        assert sorted([*table.train_rows(fold), *table.valid_rows(fold)]) == list(range(20))
    for fold in (-1, 3):
        with pytest.raises(SettingsError, match="folds 0 to 2"):
            table.train_rows(fold)
    rows = np.array([23, 1])
    assert table.ids_of(rows).tolist() == ["023", "001"]
    assert table.paths_of(rows).tolist() == ["train/23.png", "train/1.png"]
    assert table.labels()[rows].tolist() == ["고양이", "fold"]
    part = np.where(np.arange(ROWS) < 12, "train", np.where(np.arange(ROWS) < 18, "valid", "test"))
    parts = replace(table, part=part, fold=np.where(part == "valid", 0, -1).astype(np.int16))
    selected = (parts.train_rows(0), parts.valid_rows(0), parts.held_out_rows())
    assert [rows.tolist() for rows in selected] == [[*range(12)], [*range(12, 18)], [*range(18, 24)]]
    assert parts.num_folds == 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("id", ["000"] * 2 + [f"{row:03d}" for row in range(2, ROWS)], "duplicate ids"),
        ("id", [None] + [str(row) for row in range(1, ROWS)], "empty values"),
        ("path", [], "path"),
        ("fold", ["x"] * ROWS, "not a table"),
        ("fold", [-1] * ROWS, r"folds \[\]"),
        ("fold", [0] * 10 + [2] * 10 + [-1] * 4, r"folds \[0, 2\]"),
        ("fold", [0] * ROWS, "rows of part test or holdout"),
        ("part", ["eval"] * ROWS, "parts besides"),
        ("label", ["other"] * ROWS, "'other'"),
    ],
)
def test_invalid_table_is_rejected(table: FoldTable, tmp_path: Path, column: str, value: list, message: str) -> None:
    path = tmp_path / "folds.parquet"
    write_folds(path, table)
    stored = pq.read_table(path)
    broken = stored.drop_columns([column])
    pq.write_table(broken.append_column(column, pa.array(value)) if value else broken, path)
    write_json(tmp_path / "classes.json", {"classes": list(CLASSES)})
    with pytest.raises(DataError, match=message):
        read_folds(path, tmp_path / "classes.json")


def test_missing_unreadable_or_empty_files_are_rejected(table: FoldTable, tmp_path: Path) -> None:
    path, empty = tmp_path / "folds.parquet", tmp_path / "empty.parquet"
    with pytest.raises(MissingInputError, match="run the split stage"):
        read_folds(path)
    write_folds(path, table)
    pq.write_table(pq.read_table(path).slice(0, 0), empty)
    with pytest.raises(DataError, match="no rows"):
        read_folds(empty)
    empty.write_text("no table")
    with pytest.raises(DataError, match="not a table"):
        read_folds(empty)
    for content in ({"classes": ["b", "a"]}, ["a"], {}):
        write_json(tmp_path / "classes.json", content)
        with pytest.raises(DataError, match="does not hold classes"):
            read_folds(path, tmp_path / "classes.json")
