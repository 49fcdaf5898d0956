"""The parts of a split as tables that people and other programs open, and their figures."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
HEADER = ("product_id", "image_path", "image_type")


def write_parts(
    folder: Path, table: FoldTable, strata: pa.Array | None, seed: int, shares: Sequence[float]
) -> list[Path]:
    """Writes the table of each part that has rows, and the summary; the files written.

    `strata` [N] categories; `seed` and `shares` are those of the split, for the summary. Paths count
    from the train channel. A row without a group stands for a product of its own.
    """
    products = pc.coalesce(table.groups, table.ids).to_numpy(zero_copy_only=False)
    labels, figures, written = table.labels(), {}, []
    for part in [name for name in FILES if (table.part == name).any()]:
        rows = np.flatnonzero(table.part == part)
        written.append(folder / FILES[part])
        with atomic(written[-1]) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows(zip(products[rows], table.paths_of(rows), labels[rows], strict=True))
        figures[part] = _figures(rows, products, labels, strata)
    everything = {
        "seed": seed,
        "shares": dict(zip(("train", "valid", "test"), shares, strict=False)),
        "total": _figures(np.arange(len(table)), products, labels, strata),
        "parts": figures,
    }
    write_json(folder / SUMMARY, everything)
    return [*written, folder / SUMMARY]


def remove_parts(folder: Path) -> None:
    """Removes the tables of an earlier split, which may have had other parts."""
    for name in {*FILES.values(), SUMMARY}:
        (folder / name).unlink(missing_ok=True)


def _figures(rows: np.ndarray, products: np.ndarray, labels: np.ndarray, strata: pa.Array | None) -> dict[str, Any]:
    """Products and images of `rows`, images of each type, and products of each category where they have one."""
    found = {
        "products": len(set(products[rows])),
        "images": len(rows),
        "image_types": dict(sorted(Counter(labels[rows].tolist()).items())),
    }
    if strata is None:
        return found
    category = dict(zip(products[rows], strata.take(pa.array(rows)).to_pylist(), strict=True))
    return found | {"categories": dict(sorted(Counter(category.values()).items()))}
