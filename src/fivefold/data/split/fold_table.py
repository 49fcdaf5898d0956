"""The fold table that `split` writes and every later stage reads: which row belongs to which fold.

One rule covers k folds and splits by ratio: the validation rows of fold f have `fold == f`; its training
rows have part "train" and another fold; rows of part "holdout" or "test" are set aside, so no
model is trained or selected on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fivefold.contract.files import atomic, read_json
from fivefold.contract.stage_specs import FOLDS
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.label_factors import LabelFactors, parse_factors
from fivefold.predictions import preview

PARTS = ("train", "valid", "test", "holdout")
HELD_OUT_PARTS = ("test", "holdout")
COLUMNS = {
    "id": pa.string(),
    "path": pa.string(),
    "label": pa.dictionary(pa.int32(), pa.string()),
    "group": pa.string(),
    "fold": pa.int16(),
    "part": pa.dictionary(pa.int32(), pa.string()),
    "sha256": pa.string(),
}
OPTIONAL_COLUMNS = ("group", "sha256")
ROW_GROUP_SIZE = 262_144


@dataclass(frozen=True, eq=False)
class FoldTable:
    """N rows of C classes.

    `ids` and `paths` [N] strings in Arrow (to avoid a Python object per row), paths relative to the train channel;
    `codes` [N] int32, the index into `classes`, which are sorted by name; `groups` [N] strings or nulls; `fold` [N] int16,
    -1 if no fold validates on the row; `part` [N] one of PARTS; `sha256` [N] of the files' bytes, or nulls if the split
    did not open the images; `factors` of the classes, if any; `known_factors`: those that `classes` cover, if not all.
    """

    ids: pa.Array
    paths: pa.Array
    codes: np.ndarray
    classes: tuple[str, ...]
    groups: pa.Array
    fold: np.ndarray
    part: np.ndarray
    sha256: pa.Array
    factors: LabelFactors | None = None
    known_factors: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def num_folds(self) -> int:
        return int(self.fold.max(initial=-1)) + 1

    def take(self, kept: np.ndarray) -> "FoldTable":
        """Return the rows where `kept` [N] bool is true, without the classes that have no row left."""
        used = np.unique(self.codes[kept])
        classes = tuple(self.classes[code] for code in used)
        arrow = {name: getattr(self, name).filter(pa.array(kept)) for name in ("ids", "paths", "groups", "sha256")}
        return replace(
            self,
            codes=np.searchsorted(used, self.codes[kept]).astype(np.int32),
            classes=classes,
            fold=self.fold[kept],
            part=self.part[kept],
            factors=None if self.factors is None else self.factors.restrict(classes),
            **arrow,
        )

    def train_rows(self, fold: int) -> np.ndarray:
        """Return the indices of the rows that fold `fold` trains on, ascending."""
        return np.flatnonzero((self.part == "train") & (self.fold != self._check_fold(fold)))

    def valid_rows(self, fold: int) -> np.ndarray:
        """Return the indices of the rows that fold `fold` validates on, ascending."""
        return np.flatnonzero(self.fold == self._check_fold(fold))

    def held_out_rows(self) -> np.ndarray:
        """Return the indices of the rows that no model trains or selects on, ascending."""
        return np.flatnonzero(np.isin(self.part, HELD_OUT_PARTS))

    def class_fractions(self) -> np.ndarray:
        """Return the fraction of each class [C] among the rows that are not set aside."""
        counts = np.bincount(self.codes[~np.isin(self.part, HELD_OUT_PARTS)], minlength=len(self.classes))
        return counts / max(1, counts.sum())

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of the rows with these indices as Python strings in an object array."""
        return self.ids.take(pa.array(rows)).to_numpy(zero_copy_only=False)

    def paths_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the paths of the rows with these indices as Python strings in an object array."""
        return self.paths.take(pa.array(rows)).to_numpy(zero_copy_only=False)

    def sha256_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the digests of the rows with these indices in an object array, as strings, or None if the image was not opened."""
        return self.sha256.take(pa.array(rows)).to_numpy(zero_copy_only=False)

    def project_factors(self, names: Sequence[str]) -> "FoldTable":
        """Return the same rows with classes that combine only the factors `names`; return self for no or all factors.

        Raise a SettingsError for factors that the split does not have.
        """
        if not names:
            return self
        if self.factors is None:
            raise SettingsError(
                f"model.label_factors={','.join(names)}, but the classes of this split have no factors; "
                "leave it empty, or split with a layout that has factors (data.layout=mask_profiles)"
            )
        knows = self.factors.select(names)
        if knows == self.factors.names:
            return self
        codes = self.factors.column_index(knows, self.classes)[self.codes].astype(np.int32)
        return replace(self, codes=codes, classes=self.factors.projected_classes(knows), known_factors=knows)

    def labels(self) -> np.ndarray:
        """Return the class names of all rows [N] as Python strings in an object array."""
        return np.array(self.classes, dtype=object)[self.codes]

    def _check_fold(self, fold: int) -> int:
        if not 0 <= fold < self.num_folds:
            raise SettingsError(f"fold={fold} is out of range: {FOLDS} has the folds 0 to {self.num_folds - 1}")
        return fold


def write_folds(path: Path, table: FoldTable) -> None:
    """Write the table to `path` as Parquet, atomically."""
    names = pa.array(table.classes, pa.string())
    columns = {
        "id": table.ids,
        "path": table.paths,
        "label": pa.DictionaryArray.from_arrays(pa.array(table.codes, pa.int32()), names),
        "group": table.groups,
        "fold": pa.array(table.fold, pa.int16()),
        "part": pa.array(table.part, pa.string()).dictionary_encode(),
        "sha256": table.sha256,
    }
    content = pa.table(columns, schema=pa.schema(COLUMNS))
    options = {"compression": "zstd", "use_dictionary": ["label", "group", "part"]}
    with atomic(path) as temporary:
        pq.write_table(content, temporary, row_group_size=ROW_GROUP_SIZE, **options)


def read_folds(path: Path, classes_path: Path | None = None) -> FoldTable:
    """Read and check the table at `path`; classes come from `classes_path`, if set, else from the labels in the table.

    Raise MissingInputError if there is no file, and a DataError that names the invalid column.
    """
    if not path.is_file():
        raise MissingInputError(f"no {FOLDS} at {path}; run the split stage first")
    try:
        table = pq.ParquetFile(path).read().select(list(COLUMNS)).cast(pa.schema(COLUMNS))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(f"{path} is not a table with the columns {', '.join(COLUMNS)}: {error}") from error
    if not table.num_rows or any(table.column(name).null_count for name in COLUMNS.keys() - OPTIONAL_COLUMNS):
        raise DataError(f"{path} holds no rows, or empty values in a column besides {' and '.join(OPTIONAL_COLUMNS)}")
    table = table.unify_dictionaries().combine_chunks()
    ids, paths, labels, groups, sha256 = (table[name].chunk(0) for name in ("id", "path", "label", "group", "sha256"))
    names = labels.dictionary
    classes, factors = _read_classes(classes_path) if classes_path else (tuple(sorted(set(names.to_pylist()))), None)
    codes = pc.index_in(names, pa.array(classes, pa.string()))
    if codes.null_count:
        raise DataError(f"{path} has labels that are not classes: {preview(names.filter(codes.is_null()).to_pylist())}")
    codes = codes.to_numpy()[labels.indices.to_numpy()]
    part = table["part"].cast(pa.string()).to_numpy().astype("U7")
    folds = FoldTable(ids, paths, codes, classes, groups, table["fold"].to_numpy(), part, sha256, factors)
    _check_values(folds, path)
    return folds


def _read_classes(path: Path) -> tuple[tuple[str, ...], LabelFactors | None]:
    """Return the classes of `classes.json`, and their factors, if they have any."""
    if not path.is_file():
        raise MissingInputError(f"no classes at {path}")
    content = read_json(path)
    names = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(names, list) or names != sorted({str(name) for name in names}):
        raise DataError(f"{path} does not hold classes: a sorted list of unique names is needed")
    factored = content.get("factors")
    return tuple(names), None if factored is None else parse_factors(factored, names, str(path))


def _check_values(table: FoldTable, path: Path) -> None:
    folds = np.unique(table.fold[table.fold != -1]).tolist()
    held_out = np.isin(table.part, HELD_OUT_PARTS)
    problems = {
        "duplicate ids": len(pc.unique(table.ids)) < len(table),
        f"parts besides {', '.join(PARTS)}": not np.isin(table.part, PARTS).all(),
        f"folds {folds}, but they must count up from 0": not folds or folds != list(range(len(folds))),
        f"rows of part {' or '.join(HELD_OUT_PARTS)} whose fold is not -1": (table.fold[held_out] != -1).any(),
    }
    if present := [problem for problem, is_present in problems.items() if is_present]:
        raise DataError(f"{path} has {', '.join(present)}; run the split again")
