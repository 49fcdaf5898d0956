"""Which rows go to which fold or part: stratified, with groups whole, the same for the same seed.

A bin is a fold or a part; `shares` [F] say how much of the rows each is to have. Groups of several
rows are placed one by one, those that weigh most in their classes first, where they least unbalance
the bins; the rows that stand alone then fill each class up to its shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fivefold.errors import SettingsError

MOST_ATTEMPTS = 100
WORK_FOR_ATTEMPTS = 20_000
"""So many groups and classes are placed once; of fewer, several attempts are made in about the same time."""
PART_NAMES = ("train", "valid", "test")


def divide(
    codes: np.ndarray,
    groups: np.ndarray | None,
    folds: int,
    holdout: float,
    parts: Sequence[float],
    seed: int,
    stratify: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(fold, part) of each row, int16 [N] and str [N], by the rule of `folds.py`.

    With `parts` the shares of train, valid and test; else `folds` folds of the rows that are left
    after a share of `holdout` is set aside.
    """
    if parts:
        part = assign_parts(codes, groups, parts, seed, stratify)
        return np.where(part == 1, 0, -1).astype(np.int16), np.array(PART_NAMES)[part]
    aside = np.zeros(len(codes), bool)
    if holdout > 0:
        aside = assign_parts(codes, groups, (1 - holdout, holdout), seed, stratify) == 1
    fold = np.full(len(codes), -1, np.int16)
    kept = ~aside
    fold[kept] = assign_folds(codes[kept], None if groups is None else groups[kept], folds, seed, stratify)
    return fold, np.where(aside, "holdout", "train")


def divide_groups(
    strata: np.ndarray,
    groups: np.ndarray,
    whole: np.ndarray,
    folds: int,
    holdout: float,
    parts: Sequence[float],
    seed: int,
    stratify: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """As `divide`, but what is counted are groups, not rows: shares of 0.8, 0.1, 0.1 are shares of the products.

    `groups` [N] whole numbers from 0 up, none left out; `strata` [N] codes, equal within a group, take
    the classes' place; rows that share a number in `whole` [N] stay together even across groups.
    """
    first = np.unique(groups, return_index=True)[1]
    fold, part = divide(strata[first], whole[first], folds, holdout, parts, seed, stratify)
    return fold[groups], part[groups]


def assign_folds(codes: np.ndarray, groups: np.ndarray | None, folds: int, seed: int, stratify: bool) -> np.ndarray:
    """A fold 0..folds-1 for each row: int16 [N].

    `codes` [N] classes and `groups` [N] whole numbers from 0 up, or None where each row stands alone.
    Every class is spread evenly where its groups allow it, and so are the rows in all; a class with
    fewer rows than folds is in some folds only. Raises a SettingsError for more folds than groups.
    """
    units = len(codes) if groups is None else len(np.unique(groups))
    if folds > units:
        what = "rows" if groups is None else f"groups (of {len(codes)} rows)"
        raise SettingsError(
            f"split.folds={folds}, but there are only {units} {what} to spread over them; use fewer folds"
        )
    return spread(codes, groups, [1 / folds] * folds, seed, stratify)


def assign_parts(
    codes: np.ndarray, groups: np.ndarray | None, shares: Sequence[float], seed: int, stratify: bool
) -> np.ndarray:
    """A part 0..len(shares)-1 for each row, by shares that sum to 1: int16 [N].

    Part 0 is the one to train on: of a class whose rows stand alone it keeps at least one.
    A part with a share above 0 that gets no row is a SettingsError.
    """
    wanted = [part for part, share in enumerate(shares) if share > 0]
    bins = spread(codes, groups, [shares[part] for part in wanted], seed, stratify, keep_in_first=True)
    empty = sorted(set(range(len(wanted))) - set(np.unique(bins).tolist()))
    if empty:
        units = "rows" if groups is None else f"rows in {len(np.unique(groups))} groups"
        raise SettingsError(
            f"a part of {shares[wanted[empty[0]]]:g} of {len(codes)} {units} is empty; give it a larger share"
        )
    return np.array(wanted, np.int16)[bins]


def spread(
    codes: np.ndarray,
    groups: np.ndarray | None,
    shares: Sequence[float],
    seed: int,
    stratify: bool,
    keep_in_first: bool = False,
) -> np.ndarray:
    """A bin for each row, int16 [N]; with `keep_in_first` no class of lone rows goes without the first bin.

    Where there are few groups the most even of several attempts is taken, each in another order.
    """
    generator = np.random.default_rng(seed)
    codes = codes if stratify else np.zeros_like(codes)
    sizes = np.bincount(codes)
    sparse = _group_cells(codes, groups, sizes)
    lone = sizes - sparse.class_sizes
    attempts = min(MOST_ATTEMPTS, 1 + WORK_FOR_ATTEMPTS // (len(sparse) + len(sizes))) if len(sparse) else 1
    best_score = (np.inf, np.inf)
    for attempt in range(attempts):
        placed = _place(sparse, np.array(shares), generator, noise=0.5 * (attempt > 0))
        counts = sparse.counts(placed, len(shares))
        quotas = _quotas(lone, counts, np.array(shares), keep_in_first)
        score = _unevenness(counts + quotas, np.array(shares))
        if score < best_score:
            best_score, best = score, (placed, quotas)
    return _bins(codes, sparse, *best, generator)


@dataclass(frozen=True, eq=False)
class GroupCells:
    """The groups of several rows as a sparse matrix [G, C] of row counts.

    Group g has the cells start[g]:stop[g] of `of_class` and `size`; `weight` is size over the
    class's rows, `total` [G] the group's share of all rows. `of_row` [N] is each row's g, or -1.
    """

    start: np.ndarray
    stop: np.ndarray
    of_class: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    total: np.ndarray
    of_row: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.total)

    @property
    def class_sizes(self) -> np.ndarray:
        """Rows of each class that are in groups: [C]."""
        return np.bincount(self.of_class, self.size, self.num_classes).astype(np.int64)

    def counts(self, placed: np.ndarray, num_bins: int) -> np.ndarray:
        """Rows of each class in each bin [C, F], with group g in bin placed[g]."""
        cell_bins = np.repeat(placed.astype(np.int64), self.stop - self.start)
        flat = np.bincount(self.of_class * num_bins + cell_bins, self.size, self.num_classes * num_bins)
        return flat.reshape(self.num_classes, num_bins).astype(np.int64)


def _group_cells(codes: np.ndarray, groups: np.ndarray | None, sizes: np.ndarray) -> GroupCells:
    groups = np.arange(len(codes)) if groups is None else groups
    members = np.bincount(groups)
    names = np.flatnonzero(members > 1)
    position = np.full(len(members), -1, np.int64)
    position[names] = np.arange(len(names))
    of_row = position[groups]
    rows = np.flatnonzero(of_row >= 0)
    cells, size = np.unique(of_row[rows] * len(sizes) + codes[rows], return_counts=True)
    of_group, of_class = np.divmod(cells, len(sizes))
    borders = np.searchsorted(of_group, np.arange(len(names) + 1))
    weight, total = size / sizes[of_class], members[names] / len(codes)
    return GroupCells(borders[:-1], borders[1:], of_class, size, weight, total, of_row, len(sizes))


def _place(sparse: GroupCells, shares: np.ndarray, generator: np.random.Generator, noise: float) -> np.ndarray:
    """A bin for each group: int16 [G].

    Least squares: a group goes where sum over classes of (share of the class in the bin)² / (share
    of the bin) grows least; the rows in all count as one class more. `noise` shakes the order.
    """
    chosen = np.empty(len(sparse), np.int16)
    if not len(sparse):
        return chosen
    heaviness = np.add.reduceat(sparse.weight**2, sparse.start)
    heaviness *= np.exp(noise * generator.uniform(-1, 1, len(sparse)))
    order = np.lexsort((generator.permutation(len(sparse)), -heaviness))
    filled = np.zeros((sparse.num_classes + 1, len(shares)))
    own = (1 / shares - 1 / shares.max()) / 2
    starts, stops, totals = sparse.start.tolist(), sparse.stop.tolist(), sparse.total.tolist()
    for group in order.tolist():
        a, b, whole = starts[group], stops[group], totals[group]
        cells, amount = sparse.of_class[a:b], sparse.weight[a:b]
        cost = amount @ filled.take(cells, axis=0) + whole * filled[-1] + (amount @ amount + whole * whole) * own
        best = int(cost.argmin())
        chosen[group] = best
        filled[cells, best] += amount / shares[best]
        filled[-1, best] += whole / shares[best]
    return chosen


def _quotas(lone: np.ndarray, counts: np.ndarray, shares: np.ndarray, keep_in_first: bool) -> np.ndarray:
    """How many of the `lone` [C] rows of each class go to each bin: [C, F], given the `counts` there already.

    Of each class the bins get whole numbers next to their shares; which of the two is chosen so that
    the rows in all follow the shares too.
    """
    quotas = np.zeros_like(counts)
    carry = shares * counts.sum() - counts.sum(axis=0)
    for code in np.flatnonzero(lone):
        exact = _level(int(lone[code]), counts[code], shares)
        whole = np.floor(exact + 1e-9).astype(np.int64)
        spare = int(lone[code] - whole.sum())
        rest = exact - whole
        ranked = np.argsort(-np.where(rest > 1e-9, rest + carry, -np.inf), kind="stable")
        whole[ranked[:spare]] += 1
        if keep_in_first and counts[code, 0] + whole[0] == 0:
            whole[whole.argmax()] -= 1
            whole[0] = 1
        carry += exact - whole
        quotas[code] = whole
    return quotas


def _level(rows: int, there: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """`rows` poured over bins that hold `there` [F], so that they end as near to `shares` as they can: [F]."""
    open_bins = np.ones(len(shares), bool)
    while True:
        level = (rows + there[open_bins].sum()) / shares[open_bins].sum()
        full = open_bins & (there > level * shares)
        if not full.any():
            return np.where(open_bins, level * shares - there, 0.0)
        open_bins &= ~full


def _unevenness(counts: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """How far bins with `counts` [C, F] are from `shares`: of the classes in the mean, then of the rows in all."""
    sizes = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    of_classes = np.sqrt(((counts / sizes - shares) ** 2).sum(axis=1)).mean()
    return round(float(of_classes), 9), float(np.abs(counts.sum(axis=0) / counts.sum() - shares).max())


def _bins(
    codes: np.ndarray, sparse: GroupCells, placed: np.ndarray, quotas: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The bin of each row, int16 [N]: its group's, or for a lone row one by lot within its class's quotas [C, F]."""
    bins = np.append(placed, np.int16(-1))[sparse.of_row]
    lone = np.flatnonzero(bins < 0)
    lone = lone[generator.permutation(len(lone))]
    lone = lone[np.argsort(codes[lone], kind="stable")]
    bins[lone] = np.repeat(np.tile(np.arange(quotas.shape[1]), len(quotas)), quotas.ravel())
    return bins
