"""What a split came to: in numbers for `split_summary.json` and the log, and as tables of its parts for people and programs."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.contract.files import atomic, write_json
from fivefold.data.adapters import Rows
from fivefold.data.folds import FoldTable
from fivefold.data.inventory import in_words, log_left_out
from fivefold.data.splitting import Duplicates
from fivefold.predictions import sample

log = logging.getLogger("fivefold")
LISTED_SETS = 1000
"""Sets of duplicates that the summary lists; their number is always whole."""
SUMMARY = "data_split_summary.json"
FILES = {
    "train": "train_data.csv",
    "valid": "validation_data.csv",
    "test": "test_data.csv",
    "holdout": "test_data.csv",
}
"""The table of each part. Of k folds train_data.csv holds all, and none is for validation alone."""
HEADER = ["product_id", "image_path", "image_type"]


def summarise(
    table: FoldTable,
    rows: Rows,
    duplicates: Duplicates,
    skipped: Sequence[Mapping[str, str]],
    lost: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of a split of `rows`; `skipped` are paths and reasons of those that are not in the table, `lost` classes of these alone."""
    bins, per_class = class_counts(table)
    conflicting = duplicates.conflicting(table.codes)
    per_fold = per_class[:, : table.num_folds]
    trained = np.bincount(table.codes[table.part == "train"], minlength=len(table.classes))
    # In k folds a fold's own rows are of part train too, but it does not train on them.
    left = trained[:, None] - (per_fold if (table.fold[table.part == "train"] >= 0).any() else 0)
    small = np.flatnonzero(np.bincount(table.codes, minlength=len(table.classes)) < table.num_folds)
    return {
        "rows": len(table),
        "classes": len(table.classes),
        "source": rows.layout,
        "rows_per_bin": dict(zip(bins, per_class.sum(axis=0).tolist(), strict=True)),
        "fewer_rows_than_folds": {table.classes[code]: int(per_class[code].sum()) for code in small},
        "not_trained_on": {
            f"fold {fold}": [table.classes[code] for code in np.flatnonzero(left[:, fold] == 0)]
            for fold in range(table.num_folds)
            if (left[:, fold] == 0).any()
        },
        "duplicates": {
            "sets": len(duplicates.sets),
            "rows": int(sum(map(len, duplicates.sets))),
            "paths": [table.paths_of(rows).tolist() for rows in duplicates.sets[:LISTED_SETS]],
        },
        "conflicting_duplicates": {
            "sets": len(conflicting),
            "labels": [_labelled(table, rows) for rows in conflicting[:LISTED_SETS]],
        },
        "skipped": list(skipped),
        "left_out": dict(rows.left_out),
        "lost_classes": list(lost),
        "settings": dict(settings),
        "bins": bins,
        "rows_per_class": {name: per_class[code].tolist() for code, name in enumerate(table.classes)},
    }


def class_counts(table: FoldTable) -> tuple[list[str], np.ndarray]:
    """Names of the bins (each fold, then each part without a fold), and rows of each class in each: [C, bins]."""
    parts = sorted(set(np.unique(table.part[table.fold < 0]).tolist()))
    bins = table.fold.astype(np.int64)
    for position, part in enumerate(parts):
        bins[(table.fold < 0) & (table.part == part)] = table.num_folds + position
    names = [f"fold {fold}" for fold in range(table.num_folds)] + parts
    cells = np.bincount(table.codes * len(names) + bins, minlength=len(table.classes) * len(names))
    return names, cells.reshape(len(table.classes), len(names))


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as JSON, a line for each of its keys and for each class."""
    lines = [f"  {_json(key)}: {_json(value)}" for key, value in summary.items() if key != "rows_per_class"]
    per_class = [f"    {_json(name)}: {_json(counts)}" for name, counts in summary["rows_per_class"].items()]
    return "{\n" + ",\n".join([*lines, '  "rows_per_class": {\n' + ",\n".join(per_class) + "\n  }"]) + "\n}\n"


def describe_data(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of each count in the summary that a reader of the scores should know."""
    counts = [
        ("Rows", f"{summary['rows']:,} of {summary['classes']} classes"),
        ("Files left out", in_words(summary["left_out"])),
        ("Unreadable images left out", f"{len(summary['skipped']):,}"),
        ("Classes without a readable image", ", ".join(summary["lost_classes"])),
        ("Duplicate images", f"{summary['duplicates']['sets']:,} sets, {summary['duplicates']['rows']:,} rows"),
        ("Duplicates with different labels", f"{summary['conflicting_duplicates']['sets']:,} sets"),
    ]
    return [(name, value) for name, value in counts if value and not value.startswith("0")]


def log_summary(summary: Mapping[str, Any]) -> None:
    """The figures that matter, and a warning for each thing that somebody should look at."""
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["rows_per_bin"].items())
    log.info("split: %s rows of %d classes: %s", f"{summary['rows']:,}", summary["classes"], rows)
    log_left_out(summary["left_out"], "the split")
    for key, words in WARNINGS.items():
        if summary[key]:
            log.warning("split: %d %s", len(summary[key]), words)
    if summary["lost_classes"]:
        log.warning("split: none of the images of %s can be read: no classes any more", sample(summary["lost_classes"]))
    if summary["duplicates"]["sets"]:
        counts = summary["duplicates"]["sets"], summary["duplicates"]["rows"]
        log.warning("split: %d pictures occur more than once (%d rows); each stays on one side of every fold", *counts)
    if summary["conflicting_duplicates"]["sets"]:
        log.warning("split: %d of them have contradicting labels", summary["conflicting_duplicates"]["sets"])


def class_file(table: FoldTable) -> dict[str, Any]:
    """The content of `classes.json`."""
    counts = np.bincount(table.codes, minlength=len(table.classes)).tolist()
    content = {"classes": list(table.classes), "counts": dict(zip(table.classes, counts, strict=True))}
    return content if table.factors is None else content | {"factors": table.factors.as_json()}


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


def _labelled(table: FoldTable, rows: np.ndarray) -> dict[str, str]:
    labels = [table.classes[code] for code in table.codes[rows]]
    return dict(zip(table.paths.take(pa.array(rows)).to_pylist(), labels, strict=True))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _figures(rows: pd.DataFrame) -> dict[str, Any]:
    """Products and images of `rows`, images of each type, and products of each category where they have one."""
    figures = {
        "products": rows["product_id"].nunique(),
        "images": len(rows),
        "image_types": rows["image_type"].value_counts().sort_index().to_dict(),
    }
    categories = rows.drop_duplicates("product_id", keep="last")["category"].value_counts().sort_index().to_dict()
    return figures | ({"categories": categories} if categories else {})


WARNINGS = {
    "fewer_rows_than_folds": "classes have fewer rows than there are folds; some folds validate without them",
    "not_trained_on": "folds have a class that they do not train on, since all its rows are elsewhere",
    "skipped": "images cannot be read and are left out",
}
