"""Corrections of the training rows in two CSVs, of a person or of an audit: wrong labels, and images that belong together.

`data.labels` has the columns id, decision and label: `keep` confirms the label of the row, `relabel` replaces it by `label`, and
`drop` leaves the row out. A row without a decision stays as it is. `data.groups` has the columns id and group: rows of a group
stay in one fold. Both are names of files in the train channel, or paths. The images and their table stay untouched.

Labels are corrected after the folds are assigned, so that scores with and without them are of the same folds. Rows of the holdout and
of the test part keep their labels: a correction changes what models learn, never what they are measured on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.contract.filenames import normalize_class_name
from fivefold.csv_tables import CsvFile, check_not_empty, check_unique, normalize_names, open_csv
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.layout_detection import open_table
from fivefold.data.readers.stores import ImageStore
from fivefold.data.readers.training_rows import LabelledImages
from fivefold.data.split.assign import merge_groups
from fivefold.data.split.fold_table import HELD_OUT_PARTS, FoldTable
from fivefold.errors import DataError, MissingInputError
from fivefold.lookup import did_you_mean
from fivefold.predictions import preview

DECISIONS = ("", "keep", "relabel", "drop")
"""The decisions on a row; none of them means that it is open."""


@dataclass(frozen=True, eq=False)
class LabelDecisions:
    """The decisions on N training rows: an index into DECISIONS [N], and the new class of `relabel` [N], otherwise ""."""

    decided: np.ndarray
    labels: np.ndarray
    undecided: int

    def take(self, kept: np.ndarray) -> "LabelDecisions":
        """Return the decisions on the rows where `kept` [N] bool is true."""
        return replace(self, decided=self.decided[kept], labels=self.labels[kept])

    def apply(self, table: FoldTable) -> tuple[FoldTable, np.ndarray, dict[str, int]]:
        """Return the corrected table, which of the rows [N] are left, and the number of rows by decision.

        Raise a DataError if a fold loses all rows, if one class is left, or if no row of the split has a new class.
        """
        held_out = np.isin(table.part, HELD_OUT_PARTS)
        relabel = (self.labels != "") & (self.labels != table.labels())
        drop = self.decided == DECISIONS.index("drop")
        kept = ~drop | held_out
        counts = {
            "confirmed": int(((self.decided > 0) & ~relabel & ~drop).sum()),
            "relabelled": int((relabel & ~held_out).sum()),
            "dropped": int((~kept).sum()),
            "held_out": int(((relabel | drop) & held_out).sum()),
            "undecided": self.undecided,
        }
        codes, changed = table.codes.copy(), relabel & ~held_out
        if absent := sorted({*self.labels[changed]} - {*table.classes}):
            raise DataError(f"data.labels: no image of the class {absent[0]!r} can be read")
        codes[changed] = [table.classes.index(name) for name in self.labels[changed]]
        corrected = replace(table, codes=codes).take(kept)
        if len(corrected.classes) < 2:
            raise DataError("data.labels leaves only 1 class; at least two are needed")
        if lost := sorted({*table.fold.tolist()} - {*corrected.fold.tolist()}):
            raise DataError(f"data.labels drops all rows of fold {lost[0]}; drop fewer rows")
        return corrected, kept, counts


def read_decisions(store: ImageStore, name: str, rows: LabelledImages, same: ClassAliases) -> LabelDecisions:
    """Read the decisions on the rows from `data.labels`.

    Raise a DataError for an id that no row has, a class that does not exist, an unknown decision, and different decisions on one row.
    """
    table = _open(store, name)
    frame = _read(table, rows, ("decision", "label"))
    frame["decision"] = frame["decision"].str.strip().str.lower()
    for row in frame[~frame["decision"].isin(DECISIONS)].itertuples():
        words = ", ".join(DECISIONS[1:])
        raise DataError(
            f"{table}: the decision {row.decision!r} of {row.id} is none of {words}; leave an open one empty"
        )
    frame["label"] = frame["label"].map(normalize_class_name).where(frame["decision"] == "relabel", "")
    frame["label"] = same.merge_labels(frame["label"])
    frame = frame.drop_duplicates()
    for identifier, twice in frame[frame["id"].duplicated(keep=False)].groupby("id", sort=False):
        decisions = " and ".join(f"{row.decision or 'no decision'} {row.label}".strip() for row in twice.itertuples())
        raise DataError(f"{table}: {identifier} has different decisions: {decisions}")
    relabelled = frame[frame["decision"] == "relabel"]
    for row in relabelled[~relabelled["label"].isin(rows.classes)].itertuples():
        hint = did_you_mean(row.label, rows.classes)
        raise DataError(f"{table}: the label {row.label!r} of {row.id} is not a class of the training rows{hint}")
    decided, labels = np.zeros(len(rows), np.int8), np.full(len(rows), "", object)
    decided[frame["row"]] = frame["decision"].map(DECISIONS.index)
    labels[frame["row"]] = frame["label"]
    return LabelDecisions(decided, labels, int((frame["decision"] == "").sum()))


def join_groups(store: ImageStore, name: str, rows: LabelledImages) -> tuple[LabelledImages, dict[str, int]]:
    """Return the rows with larger groups, and the number of groups and rows of `data.groups`.

    Rows that share a group of the training data or of `data.groups` belong together.

    Raise a DataError for an id that no row has or that occurs twice, and for groups that join all rows.
    """
    table = _open(store, name)
    frame = _read(table, rows, ("group",))
    check_unique(frame["id"], table)
    check_not_empty(frame["group"], "group", table)
    given, proposed = pd.Series(rows.groups.to_pylist(), dtype=object), pd.Series(None, range(len(rows)), dtype=object)
    # a group of the table is another one than a group of the training data with its name
    proposed[frame["row"]] = (f"{Path(name).name}: " + normalize_names(frame["group"])).to_numpy(object)
    joined = pd.Series(merge_groups(_codes(given), _codes(proposed)))
    if joined.nunique() < 2:
        raise DataError(f"{table}: with these groups all {len(rows)} rows are one group, which no folds can divide")
    names = given.fillna(proposed).dropna()
    first = names.groupby(joined[names.index]).min()
    counts = {"groups": int(frame["group"].nunique()), "rows": len(frame)}
    return replace(rows, groups=pa.array(joined.map(first), pa.string(), from_pandas=True)), counts


def _open(store: ImageStore, name: str) -> CsvFile:
    if Path(name).is_file():
        return open_csv(Path(name))
    if Path(name).is_absolute():
        raise MissingInputError(f"no file {name}")
    return open_table(store, name)


def _read(table: CsvFile, rows: LabelledImages, columns: Sequence[str]) -> pd.DataFrame:
    """Return the columns, and in the column `row` the index of the training row of each id."""
    found = {name: table.column(name) for name in ("id", *columns)}
    if missing := [name for name, column in found.items() if column is None]:
        raise DataError(f"{table} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    frame = table.read([*found.values()]).set_axis([*found], axis="columns").drop_duplicates(ignore_index=True)
    index = pc.index_in(pa.array(frame["id"], pa.string()), value_set=rows.ids)
    if index.null_count:  # a table that this project wrote quotes cells that a spreadsheet would run as a formula
        plain = pa.array(frame["id"].str.removeprefix("'"), pa.string())
        index = pc.coalesce(index, pc.index_in(plain, value_set=rows.ids))
    if index.null_count:
        unknown = frame["id"][np.asarray(pc.is_null(index))]
        raise DataError(f"{table}: {len(unknown)} ids are not ids of training rows: {preview(unknown)}")
    return frame.assign(row=index.to_numpy())


def _codes(groups: pd.Series) -> np.ndarray:
    """Return the groups as integers; each missing one is a group of its own."""
    codes, names = pd.factorize(groups)
    missing = codes < 0
    codes[missing] = len(names) + np.arange(missing.sum())
    return codes
