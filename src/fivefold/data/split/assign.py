"""Assign rows to folds and parts.

scikit-learn splits ungrouped rows, so that folds equal those of a notebook with the same seed, row by row: StratifiedKFold
(KFold without split.stratify) on the rows that train_test_split leaves after a holdout, in the order in which it returns them.
Parts are set aside in the same way: `test` of all rows, then `valid` with test_size = valid / (train + valid). Duplicate
images follow the first of their rows. See docs/data.md.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.config.schema import Split
from fivefold.data.readers.training_rows import LabelledImages
from fivefold.errors import SettingsError
from fivefold.log import log

PART_NAMES = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Duplicates among N rows: `codes` [N] are equal for equal images; `sets` has the rows of each image that occurs more than once."""

    codes: np.ndarray
    sets: list[np.ndarray]


def find_duplicates(keys: np.ndarray | pa.Array) -> Duplicates:
    """Return the rows with equal keys (digests [N] as fixed bytes, or strings [N] in Arrow)."""
    if isinstance(keys, np.ndarray):
        codes = np.unique(keys, return_inverse=True)[1].astype(np.int32)
    else:
        codes = pc.dictionary_encode(keys).indices.to_numpy()
    repeated = np.flatnonzero(np.bincount(codes)[codes] > 1)
    repeated = repeated[np.argsort(codes[repeated], kind="stable")]
    borders = np.flatnonzero(np.diff(codes[repeated])) + 1
    return Duplicates(codes, np.split(repeated, borders) if len(repeated) else [])


def group_codes(groups: pa.Array) -> np.ndarray | None:
    """Return groups [N] as integers from 0 in order of occurrence, with a separate group for each null; None if no rows share a group."""
    encoded = pc.dictionary_encode(groups)
    codes = encoded.indices.fill_null(-1).to_numpy().copy()
    ungrouped = codes < 0
    if len(encoded.dictionary) + ungrouped.sum() == len(codes):
        return None
    codes[ungrouped] = len(encoded.dictionary) + np.arange(ungrouped.sum())
    return codes


def rank_labels(classes: Sequence[str]) -> np.ndarray:
    """Return the rank of each class [C] as pandas sorts the label column: by value if all are numbers, else by name."""
    try:
        return np.argsort(np.argsort(np.array(classes, float), kind="stable"))
    except ValueError:
        return np.argsort(np.argsort(np.array(classes, object)))


def assign_rows(rows: LabelledImages, duplicates: Duplicates, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return (fold, part) of each row: rows are divided by class, or whole products by stratum if there are strata."""
    groups = group_codes(rows.groups)
    units = duplicates.codes if groups is None else merge_groups(groups, duplicates.codes)
    if rows.strata is not None:
        strata = pc.dictionary_encode(rows.strata)
        return split_rows(rank_labels(strata.dictionary.to_pylist())[strata.indices.to_numpy()], units, split)
    return (split_rows if groups is None else split_groups)(rank_labels(rows.classes)[rows.codes], units, split)


def split_rows(codes: np.ndarray, units: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return (fold, part) of each row by the rule of `fold_table.py`: int16 [N] (-1 if no fold validates on the row) and str [N].

    `codes` [N] are classes in pandas' order. Rows of equal `units` [N], such as duplicates of an image or images of a product,
    go where the first of them goes; shares are fractions of the units. Raise a SettingsError if a fold or part would get no row.
    """
    first, unit = np.unique(units, return_index=True, return_inverse=True)[1:]
    order = np.argsort(first)
    fold, part = np.empty(len(first), np.int16), np.empty(len(first), "U7")
    fold[order], part[order] = _split_units(codes[first[order]], split)
    return fold[unit], part[unit]


def merge_groups(groups: np.ndarray, image_codes: np.ndarray) -> np.ndarray:
    """Return groups [N] with groups that share an image merged: the connected components of the rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Groups and images are the nodes of a graph; each row is an edge between its group and its image.
    ends = groups, image_codes.astype(np.int64) + groups.max() + 1
    nodes = int(ends[1].max()) + 1
    edges = coo_array((np.ones(len(groups), bool), ends), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][groups]


def _split_units(codes: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return (fold, part) of units of these classes, in the order of their first rows."""
    fold, part = np.full(len(codes), -1, np.int16), np.full(len(codes), "train", "U7")
    rows = np.arange(len(codes))
    if split.ratios:
        train, valid, test = split.ratios
        rows, aside = _set_aside(rows, codes, test, split)
        part[aside] = "test"
        _, valid_rows = _set_aside(rows, codes, valid / (train + valid), split)
        part[valid_rows], fold[valid_rows] = "valid", 0
        return fold, part
    rows, aside = _set_aside(rows, codes, split.holdout, split)
    part[aside] = "holdout"
    fold[rows] = _assign_folds(codes[rows], split)
    return fold, part


def _set_aside(rows: np.ndarray, codes: np.ndarray, share: float, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the remaining rows and those set aside, both in scikit-learn's order.

    A stratified draw never sets aside a class of one row. If either side has fewer rows than there are classes, draw without strata.
    """
    if not share:
        return rows, rows[:0]
    size = math.ceil(share * len(rows))
    if size >= len(rows):
        raise SettingsError(f"a share of {share:g} of {len(rows)} rows leaves none to train on; set a smaller share")
    from sklearn.model_selection import train_test_split

    labels = codes[rows]
    counts = np.bincount(labels)
    drawn = counts[labels] > 1
    stratify = split.stratify and min(size, drawn.sum() - size) >= (counts > 1).sum()
    if not stratify:
        drawn[:] = True
        if split.stratify:
            log.warning("split: %d of %d rows are set aside without stratification: too few rows", size, len(rows))
    strata = labels[drawn] if stratify else None
    remaining, aside = train_test_split(rows[drawn], test_size=size, stratify=strata, random_state=split.seed)
    return np.concatenate([rows[~drawn], remaining]), aside


def _assign_folds(codes: np.ndarray, split: Split) -> np.ndarray:
    """Return a fold for each row: int16 [N]. Classes with fewer rows than folds are in some folds only."""
    if split.folds > len(codes):
        raise SettingsError(
            f"split.folds={split.folds}, but there are only {len(codes)} rows of different images; use fewer folds"
        )
    from sklearn.model_selection import KFold, StratifiedKFold

    fold = np.empty(len(codes), np.int16)
    if split.stratify and np.bincount(codes).max() < split.folds:
        # StratifiedKFold rejects this case: assign the rows, class by class, to the folds in turn.
        shuffled = np.random.default_rng(split.seed).permutation(len(codes))
        fold[np.lexsort((shuffled, codes))] = np.arange(len(codes)) % split.folds
        return fold
    splitter = (StratifiedKFold if split.stratify else KFold)(split.folds, shuffle=True, random_state=split.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # `log_summary` reports them
        for number, (_, valid) in enumerate(splitter.split(codes, codes)):
            fold[valid] = number
    return fold


def split_groups(codes: np.ndarray, groups: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return (fold, part) as `split_rows` does, with shares of the rows of each class; rows of equal `groups` [N] stay together."""
    codes = codes if split.stratify else np.zeros_like(codes)
    if split.ratios:
        part = _assign_bins(codes, groups, split.ratios, split.seed)
        return np.where(part == 1, 0, -1).astype(np.int16), np.array(PART_NAMES)[part]
    aside = np.zeros(len(codes), bool)
    if split.holdout:
        aside = _assign_bins(codes, groups, (1 - split.holdout, split.holdout), split.seed) == 1
    fold = np.full(len(codes), -1, np.int16)
    fold[~aside] = _assign_bins(codes[~aside], groups[~aside], [1 / split.folds] * split.folds, split.seed)
    return fold, np.where(aside, "holdout", "train")


def _assign_bins(codes: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Return a bin for each row, int16 [N], so that every class has about its `shares` [F] in the bins; keep groups together.

    Greedy, like StratifiedGroupKFold: start with the groups that weigh most in their classes, and put each into the bin
    where the sum over classes of (fraction of the class in the bin)² / (share of the bin) grows least; all rows count as
    one more class. Only the classes of a group are updated, so a million rows take seconds, and bins can have any shares.
    """
    from scipy.sparse import coo_array

    groups = np.unique(groups, return_inverse=True)[1]
    bins = np.flatnonzero(shares)
    sizes = np.append(np.bincount(codes), len(codes))
    classes = np.concatenate([codes, np.full(len(codes), len(sizes) - 1)])
    weights = coo_array((1 / sizes[classes], (np.tile(groups, 2), classes))).tocsr()
    generator = np.random.default_rng(seed)
    order = np.lexsort((generator.permutation(weights.shape[0]), -weights.power(2).sum(axis=1)))
    bin_of_group = np.empty(weights.shape[0], np.int16)
    shares = np.array(shares)[bins]
    filled = np.zeros((len(sizes), len(bins)))
    for group in order.tolist():
        cells = slice(weights.indptr[group], weights.indptr[group + 1])
        group_classes, weight = weights.indices[cells], weights.data[cells]
        best = (weight @ filled[group_classes] + weight @ weight / (2 * shares)).argmin()
        bin_of_group[group] = bins[best]
        filled[group_classes, best] += weight / shares[best]
    if len(empty := np.setdiff1d(bins, bin_of_group)):
        raise SettingsError(
            f"{len(bin_of_group)} groups (of {len(codes)} rows) leave {len(empty)} of {len(bins)} folds or parts empty; "
            "use fewer folds, or a larger share"
        )
    return bin_of_group[groups]
