"""Which rows go to which fold or part.

scikit-learn divides rows that stand alone, so that folds equal those of a notebook at the same seed, row by row.
With `table` the rows in their order, without repeated pictures, and `label` as pandas reads it:

    StratifiedKFold(split.folds, shuffle=True, random_state=split.seed).split(table, table.label)

A holdout is set aside first, and the folds are made of `train` as it comes, in shuffled order:

    train, holdout = train_test_split(table, test_size=split.holdout, stratify=table.label, random_state=split.seed)

Parts are set aside in the same way: `test` of all rows, then `valid` with test_size = valid / (train + valid).
split.stratify=false: KFold, and train_test_split without `stratify`. Rows of a picture follow the first of them.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.errors import SettingsError
from fivefold.recipe import Split

log = logging.getLogger("fivefold")
PART_NAMES = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Which of N rows are the same picture: `codes` [N] equal for equal pictures, `sets` the rows of each that occurs again."""

    codes: np.ndarray
    sets: list[np.ndarray]

    def conflicting(self, labels: np.ndarray) -> list[np.ndarray]:
        """The sets whose rows do not all have the same of `labels` [N]."""
        return [rows for rows in self.sets if len(np.unique(labels[rows])) > 1]


def find_duplicates(keys: np.ndarray | pa.Array) -> Duplicates:
    """The rows with equal keys (digests [N] as fixed bytes, or strings [N] in Arrow)."""
    if isinstance(keys, np.ndarray):
        codes = np.unique(keys, return_inverse=True)[1].astype(np.int32)
    else:
        codes = pc.dictionary_encode(keys).indices.to_numpy()
    again = np.flatnonzero(np.bincount(codes)[codes] > 1) if len(codes) else codes
    again = again[np.argsort(codes[again], kind="stable")]
    borders = np.flatnonzero(np.diff(codes[again])) + 1
    return Duplicates(codes, np.split(again, borders) if len(again) else [])


def group_codes(groups: pa.Array) -> np.ndarray | None:
    """Groups [N] as whole numbers from 0 up in the order of rows, a null a group of its own; None if no two rows share one."""
    encoded = pc.dictionary_encode(groups)
    codes = encoded.indices.fill_null(-1).to_numpy().copy()
    alone = codes < 0
    if len(encoded.dictionary) + alone.sum() == len(codes):
        return None
    codes[alone] = len(encoded.dictionary) + np.arange(alone.sum())
    return codes


def rank_labels(classes: Sequence[str]) -> np.ndarray:
    """The place of each class in pandas' order of the label column: by value if all are numbers, else by name. [C]"""
    try:
        return np.argsort(np.argsort(np.array(classes, float), kind="stable"))
    except ValueError:
        return np.argsort(np.argsort(np.array(classes, object)))


def divide(
    codes: np.ndarray, groups: np.ndarray | None, pictures: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray]:
    """(fold, part) of each row, int16 [N] (-1 where no fold validates on it) and str [N], by the rule of `folds.py`.

    `codes` [N] are classes in pandas' order, `groups` [N] numbers of what stays together, or None; rows of equal
    `pictures` [N] stay together too. Raises a SettingsError if a fold or part would get no row.
    """
    if groups is not None:
        return _divide_groups(codes, _connect(groups, pictures), split)
    first = _first_rows(pictures)
    own = np.flatnonzero(first == np.arange(len(first)))
    fold, part = np.empty(len(first), np.int16), np.empty(len(first), "U7")
    fold[own], part[own] = _divide_rows(codes[own], split)
    return fold[first], part[first]


def divide_products(
    strata: np.ndarray, products: np.ndarray, pictures: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray]:
    """As `divide`, but products are divided like rows: shares of 0.8, 0.1, 0.1 are shares of the products.

    `products` [N] whole numbers from 0 up in the order of rows; `strata` [N] codes, equal within a product, take the
    classes' place. A product that shares a picture with an earlier one follows it.
    """
    first = np.unique(products, return_index=True)[1]
    fold, part = divide(strata[first], None, _connect(products, pictures)[first], split)
    return fold[products], part[products]


def _first_rows(codes: np.ndarray) -> np.ndarray:
    """The first row that has the code of each row: [N]."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return first[inverse]


def _connect(groups: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Groups [N] of which those that share a picture are one: connected components of the rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Groups and pictures are the nodes of one graph, and a row is an edge between its two.
    ends = groups, pictures.astype(np.int64) + groups.max() + 1
    nodes = int(ends[1].max()) + 1
    edges = coo_array((np.ones(len(groups), bool), ends), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][groups]


def _divide_rows(codes: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(fold, part) of rows that stand alone."""
    fold, part = np.full(len(codes), -1, np.int16), np.full(len(codes), "train", "U7")
    rows = np.arange(len(codes))
    if split.parts:
        train, valid, test = split.parts
        rows, aside = _set_aside(rows, codes, test, split)
        part[aside] = "test"
        _, chosen = _set_aside(rows, codes, valid / (train + valid), split)
        part[chosen], fold[chosen] = "valid", 0
        return fold, part
    rows, aside = _set_aside(rows, codes, split.holdout, split)
    part[aside] = "holdout"
    fold[rows] = _assign_folds(codes[rows], split)
    return fold, part


def _set_aside(rows: np.ndarray, codes: np.ndarray, share: float, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are kept and those that are set aside, both in scikit-learn's order.

    A class of one row is kept. If either side has fewer rows than there are classes, it is drawn without strata.
    """
    if not share:
        return rows, rows[:0]
    size = math.ceil(share * len(rows))
    if size >= len(rows):
        raise SettingsError(f"a share of {share:g} of {len(rows)} rows leaves none to train on; give it a smaller one")
    from sklearn.model_selection import train_test_split

    labels = codes[rows]
    counts = np.bincount(labels)
    single = counts[labels] == 1
    if split.stratify and min(size, len(rows) - single.sum() - size) >= (counts > 1).sum():
        several = ~single
        kept, aside = train_test_split(rows[several], test_size=size, stratify=labels[several], random_state=split.seed)
        return np.concatenate([rows[single], kept]), aside
    if split.stratify:
        log.warning(
            "split: %d of %d rows are set aside without regard to the classes: too few for all", size, len(rows)
        )
    kept, aside = train_test_split(rows, test_size=size, random_state=split.seed)
    return kept, aside


def _assign_folds(codes: np.ndarray, split: Split) -> np.ndarray:
    """A fold for each row: int16 [N]. Classes with fewer rows than folds are in some folds only."""
    if split.folds > len(codes):
        raise SettingsError(
            f"split.folds={split.folds}, but there are only {len(codes)} rows of different pictures; use fewer folds"
        )
    from sklearn.model_selection import KFold, StratifiedKFold

    fold = np.empty(len(codes), np.int16)
    if split.stratify and np.bincount(codes).max() < split.folds:
        # StratifiedKFold refuses this: the rows of one class after the other are dealt out in turn.
        shuffled = np.random.default_rng(split.seed).permutation(len(codes))
        fold[np.lexsort((shuffled, codes))] = np.arange(len(codes)) % split.folds
        return fold
    splitter = (StratifiedKFold if split.stratify else KFold)(split.folds, shuffle=True, random_state=split.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # `log_summary` reports them
        for number, (_, valid) in enumerate(splitter.split(codes, codes)):
            fold[valid] = number
    return fold


def _divide_groups(codes: np.ndarray, groups: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(fold, part) of rows whose groups stay whole."""
    codes = codes if split.stratify else np.zeros_like(codes)
    if split.parts:
        part = _spread_groups(codes, groups, split.parts, split.seed)
        return np.where(part == 1, 0, -1).astype(np.int16), np.array(PART_NAMES)[part]
    aside = np.zeros(len(codes), bool)
    if split.holdout:
        aside = _spread_groups(codes, groups, (1 - split.holdout, split.holdout), split.seed) == 1
    fold = np.full(len(codes), -1, np.int16)
    fold[~aside] = _spread_groups(codes[~aside], groups[~aside], [1 / split.folds] * split.folds, split.seed)
    return fold, np.where(aside, "holdout", "train")


def _spread_groups(codes: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """A bin for each row, int16 [N], so that every class has its `shares` [F] in the bins, and groups stay whole.

    Greedy, as StratifiedGroupKFold: groups that weigh most in their classes first, each to the bin where the sum
    over classes of (share of the class in the bin)² / (share of the bin) grows least; all rows count as one class
    more. It looks at the classes of a group alone, so a million rows take seconds, and bins have any shares.
    """
    from scipy.sparse import coo_array

    groups = np.unique(groups, return_inverse=True)[1]
    bins = np.flatnonzero(shares)
    sizes = np.append(np.bincount(codes), len(codes))
    classes = np.concatenate([codes, np.full(len(codes), len(sizes) - 1)])
    weights = coo_array((1 / sizes[classes], (np.tile(groups, 2), classes))).tocsr()
    generator = np.random.default_rng(seed)
    order = np.lexsort((generator.permutation(weights.shape[0]), -weights.power(2).sum(axis=1)))
    chosen = np.empty(weights.shape[0], np.int16)
    shares = np.array(shares)[bins]
    filled = np.zeros((len(sizes), len(bins)))
    for group in order.tolist():
        cells = slice(weights.indptr[group], weights.indptr[group + 1])
        own, weight = weights.indices[cells], weights.data[cells]
        best = (weight @ filled[own] + weight @ weight / (2 * shares)).argmin()
        chosen[group] = bins[best]
        filled[own, best] += weight / shares[best]
    if len(empty := np.setdiff1d(bins, chosen)):
        raise SettingsError(
            f"{len(chosen)} groups (of {len(codes)} rows) leave {len(empty)} of {len(bins)} folds or parts empty; "
            "use fewer folds, or a larger share"
        )
    return chosen[groups]
