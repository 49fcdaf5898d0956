"""The parts of a split as tables that people and other programs open, and their figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.contract.files import atomic, write_json
from fivefold.data.folds import FoldTable

SUMMARY = "data_split_summary.json"
FILES = {
    "train": "train_data.csv",
    "valid": "validation_data.csv",
    "test": "test_data.csv",
    "holdout": "test_data.csv",
}
"""The table of each part. Of k folds train_data.csv holds all, and none is for validation alone."""
HEADER = ["product_id", "image_path", "image_type"]


def write_parts(
    folder: Path, table: FoldTable, strata: pa.Array | None, seed: int, shares: Sequence[float]
) -> list[Path]:
    """Writes the table of each part that has rows, and the summary; the files written.

    `strata` [N] categories; `seed` and `shares` are those of the split, for the summary. Paths count
    from the train channel. A row without a group stands for a product of its own.
    """
    columns = (pc.coalesce(table.groups, table.ids), table.paths, table.labels())
    frame = pd.DataFrame({name: np.asarray(column) for name, column in zip(HEADER, columns, strict=True)})
    frame["category"] = None if strata is None else np.asarray(strata)
    figures, written = {}, []
    for part in [name for name in FILES if (table.part == name).any()]:
        rows = frame[table.part == part]
        written.append(folder / FILES[part])
        with atomic(written[-1]) as temporary:
            rows.to_csv(temporary, columns=HEADER, index=False, lineterminator="\n")
        figures[part] = _figures(rows)
    everything = {
        "seed": seed,
        "shares": dict(zip(("train", "valid", "test"), shares, strict=False)),
        "total": _figures(frame),
        "parts": figures,
    }
    write_json(folder / SUMMARY, everything)
    return [*written, folder / SUMMARY]


def remove_parts(folder: Path) -> None:
    """Removes the tables of an earlier split, which may have had other parts."""
    for name in {*FILES.values(), SUMMARY}:
        (folder / name).unlink(missing_ok=True)


def _figures(rows: pd.DataFrame) -> dict[str, Any]:
    """Products and images of `rows`, images of each type, and products of each category where they have one."""
    figures = {
        "products": rows["product_id"].nunique(),
        "images": len(rows),
        "image_types": rows["image_type"].value_counts().sort_index().to_dict(),
    }
    categories = rows.drop_duplicates("product_id", keep="last")["category"].value_counts().sort_index().to_dict()
    return figures | ({"categories": categories} if categories else {})
