"""Summary of a split: counts for `split_summary.json` and the log, and a CSV for each part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.contract.files import atomic, write_json
from fivefold.data.readers.stores import describe_counts, log_ignored
from fivefold.data.readers.training_rows import LabelledImages
from fivefold.data.split.assign import Duplicates
from fivefold.data.split.fold_table import FoldTable
from fivefold.log import log
from fivefold.predictions import preview

MAX_LISTED_SETS = 1000
"""Maximum number of duplicate sets that the summary lists; it always counts all of them."""
SUMMARY = "data_split_summary.json"
FILES = {"train": "train_data.csv", "valid": "validation_data.csv", "test": "test_data.csv", "holdout": "test_data.csv"}
"""The CSV of each part. With k folds, train_data.csv has the rows of all folds, and there is no validation CSV."""
HEADER = ["product_id", "image_path", "image_type"]


def summarise(
    table: FoldTable,
    rows: LabelledImages,
    duplicates: Duplicates,
    skipped: Sequence[Mapping[str, str]],
    lost: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the counts of a split of `rows`.

    `skipped`: paths and reasons of unreadable images, which are not in the table; `lost`: classes that had no other images.
    """
    parts = np.unique(table.part[table.fold < 0])
    # the bins are the folds, then the parts without folds
    bins = [*(f"fold {fold}" for fold in range(table.num_folds)), *parts.tolist()]
    bin_of_row = np.where(table.fold < 0, table.num_folds + np.searchsorted(parts, table.part), table.fold)
    per_class = np.zeros((len(table.classes), len(bins)), int)
    np.add.at(per_class, (table.codes, bin_of_row), 1)
    conflicting = [rows for rows in duplicates.sets if len(np.unique(table.codes[rows])) > 1]
    labels = table.labels()
    counts = dict(zip(table.classes, per_class.sum(axis=1).tolist(), strict=True))
    untrained = {
        f"fold {fold}": sorted(set(table.classes) - set(labels[table.train_rows(fold)]))
        for fold in range(table.num_folds)
    }
    return {
        "rows": len(table),
        "classes": len(table.classes),
        "source": rows.layout,
        "rows_per_bin": dict(zip(bins, per_class.sum(axis=0).tolist(), strict=True)),
        "fewer_rows_than_folds": {name: count for name, count in counts.items() if count < table.num_folds},
        "not_trained_on": {fold: names for fold, names in untrained.items() if names},
        "duplicates": {
            "sets": len(duplicates.sets),
            "rows": int(sum(map(len, duplicates.sets))),
            "paths": [table.paths_of(rows).tolist() for rows in duplicates.sets[:MAX_LISTED_SETS]],
        },
        "conflicting_duplicates": {
            "sets": len(conflicting),
            "labels": [
                dict(zip(table.paths_of(rows), labels[rows], strict=True)) for rows in conflicting[:MAX_LISTED_SETS]
            ],
        },
        "skipped": list(skipped),
        "left_out": dict(rows.ignored),
        "lost_classes": list(lost),
        "settings": dict(settings),
        "bins": bins,
        "rows_per_class": {name: per_class[code].tolist() for code, name in enumerate(table.classes)},
    }


def describe_data(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of each count in the summary that a reader of the scores needs."""
    duplicates, conflicting = summary["duplicates"], summary["conflicting_duplicates"]
    counts = [
        ("Rows", summary["rows"], f"{summary['rows']:,} of {summary['classes']} classes"),
        ("Ignored files", summary["left_out"], describe_counts(summary["left_out"])),
        ("Unreadable images", summary["skipped"], f"{len(summary['skipped']):,}"),
        ("Classes without a readable image", summary["lost_classes"], ", ".join(summary["lost_classes"])),
        ("Duplicate images", duplicates["sets"], f"{duplicates['sets']:,} sets, {duplicates['rows']:,} rows"),
        ("Duplicates with different labels", conflicting["sets"], f"{conflicting['sets']:,} sets"),
        *((name, True, value) for name, value in _describe_corrections(summary)),
    ]
    return [(name, value) for name, is_shown, value in counts if is_shown]


def _describe_corrections(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of the counts of `data.labels` and `data.groups`, as far as they were set."""
    labels, groups = (summary.get("corrections", {}).get(name) for name in ("labels", "groups"))
    counts = []
    if groups:
        counts.append(("Proposed groups", f"{groups['groups']:,} of {groups['rows']:,} rows, kept in one fold each"))
    if labels:
        names = ("relabelled", "dropped", "confirmed", "undecided")
        counts.append(("Corrected labels", ", ".join(f"{labels[name]:,} {name}" for name in names)))
    if labels and labels["held_out"]:
        counts.append(
            ("Corrections not applied", f"{labels['held_out']:,} of holdout or test rows, which stay as they are")
        )
    return counts


def log_summary(summary: Mapping[str, Any]) -> None:
    """Log the main counts, and a warning for each problem in the data."""
    rows = ", ".join(f"{name} {count:,}" for name, count in summary["rows_per_bin"].items())
    log.info("split: %s rows of %d classes: %s", f"{summary['rows']:,}", summary["classes"], rows)
    log_ignored(summary["left_out"], "the split")
    lost, duplicates = summary["lost_classes"], summary["duplicates"]
    problems = {
        "classes have fewer rows than folds; some folds validate without them": len(summary["fewer_rows_than_folds"]),
        "folds have a class without rows to train on, because they are in other parts": len(summary["not_trained_on"]),
        "images cannot be read and are ignored": len(summary["skipped"]),
        f"classes without a readable image are dropped: {preview(lost)}": len(lost),
        f"images occur more than once ({duplicates['rows']} rows), always in the same fold": duplicates["sets"],
        "sets of duplicates have different labels": summary["conflicting_duplicates"]["sets"],
    }
    for problem, count in problems.items():
        if count:
            log.warning("split: %d %s", count, problem)
    for name, value in _describe_corrections(summary):
        log.info("split: %s: %s", name, value)


def class_file_content(table: FoldTable) -> dict[str, Any]:
    """Return the content of `classes.json`."""
    counts = np.bincount(table.codes, minlength=len(table.classes)).tolist()
    content = {"classes": list(table.classes), "counts": dict(zip(table.classes, counts, strict=True))}
    return content if table.factors is None else content | {"factors": table.factors.to_json()}


def write_parts(
    folder: Path, table: FoldTable, strata: pa.Array | None, seed: int, shares: Sequence[float]
) -> list[Path]:
    """Write a CSV of each part that has rows, and the summary; return the paths of the files.

    `strata` [N] categories; `seed` and `shares` are those of the split, for the summary. Paths are relative
    to the train channel. A row without a group counts as a separate product.
    """
    columns = (pc.coalesce(table.groups, table.ids), table.paths, table.labels())
    frame = pd.DataFrame(dict(zip(HEADER, map(np.asarray, columns), strict=True)))
    frame["category"] = None if strata is None else np.asarray(strata)
    counts, written = {}, []
    for part in [name for name in FILES if (table.part == name).any()]:
        rows = frame[table.part == part]
        written.append(folder / FILES[part])
        with atomic(written[-1]) as temporary:
            rows.to_csv(temporary, columns=HEADER, index=False, lineterminator="\n")
        counts[part] = _count(rows)
    of_parts = dict(zip(FILES, shares, strict=False))
    write_json(folder / SUMMARY, {"seed": seed, "shares": of_parts, "total": _count(frame), "parts": counts})
    return [*written, folder / SUMMARY]


def _count(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the number of products and images of `rows`, images per type, and products per category if they have one."""
    counts = {
        "products": rows["product_id"].nunique(),
        "images": len(rows),
        "image_types": rows["image_type"].value_counts().sort_index().to_dict(),
    }
    categories = rows.groupby("category")["product_id"].nunique().to_dict()
    return counts | ({"categories": categories} if categories else {})
