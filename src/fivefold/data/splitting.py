"""Which rows go to which fold or part: stratified, with groups whole, the same for the same seed.

A bin is a fold or a part; `shares` [F] say how much of the rows each is to have. Groups of several
rows are placed one by one, those that weigh most in their classes first, where they least unbalance
the bins; the rows that stand alone then fill each class up to its shares.
"""

from collections.abc import Sequence

import numpy as np

from fivefold.errors import SettingsError

MOST_ATTEMPTS = 100
GROUPS_FOR_ATTEMPTS = 20_000
"""So many groups are placed at once; of fewer, several attempts are made in the same time."""
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
    num_classes = int(codes.max(initial=-1)) + 1
    num_groups = 0 if groups is None else np.count_nonzero(np.bincount(groups) > 1)
    attempts = min(MOST_ATTEMPTS, 1 + GROUPS_FOR_ATTEMPTS // num_groups) if num_groups else 1
    best, best_score = None, (np.inf, np.inf)
    for attempt in range(attempts):
        counts = np.zeros((num_classes, len(shares)), np.int64)
        bins = np.full(len(codes), -1, np.int16)
        if num_groups:
            _place_groups(codes, groups, np.array(shares), generator, float(attempt > 0), counts, bins)
        _fill(codes, np.array(shares), generator, keep_in_first, counts, bins)
        score = _unevenness(counts, np.array(shares))
        if score < best_score:
            best, best_score = bins, score
    return best


def _unevenness(counts: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """How far bins with `counts` [C, F] are from `shares`: of the classes in the mean, then of the rows in all."""
    sizes = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    of_classes = np.sqrt(((counts / sizes - shares) ** 2).sum(axis=1)).mean()
    return round(float(of_classes), 9), float(np.abs(counts.sum(axis=0) / counts.sum() - shares).max())


def _fill(
    codes: np.ndarray,
    shares: np.ndarray,
    generator: np.random.Generator,
    keep_in_first: bool,
    counts: np.ndarray,
    bins: np.ndarray,
) -> None:
    """Gives each row without a bin one: completes `bins` [N] and `counts` [C, F]."""
    alone = np.flatnonzero(bins < 0)
    quotas = _quotas(np.bincount(codes[alone], minlength=len(counts)), counts, shares, keep_in_first)
    alone = alone[generator.permutation(len(alone))]
    alone = alone[np.argsort(codes[alone], kind="stable")]
    bins[alone] = np.repeat(np.tile(np.arange(len(shares)), len(quotas)), quotas.ravel())
    counts += quotas


def _place_groups(
    codes: np.ndarray,
    groups: np.ndarray,
    shares: np.ndarray,
    generator: np.random.Generator,
    noise: float,
    counts: np.ndarray,
    bins: np.ndarray,
) -> None:
    """Places each group of several rows in a bin: fills `bins` [N] and adds its rows to `counts` [C, F].

    Least squares: a group goes where sum over classes of (share of the class in the bin)² / (share
    of the bin) grows least; the rows in all count as one class more. `noise` shakes the order.
    """
    members = np.bincount(groups)
    rows = np.flatnonzero(members[groups] > 1)
    if not len(rows):
        return
    num_classes = len(counts)
    cells, size = np.unique(groups[rows].astype(np.int64) * num_classes + codes[rows], return_counts=True)
    of_group, of_class = np.divmod(cells, num_classes)
    weight = size / np.bincount(codes, minlength=num_classes)[of_class]
    names, start = np.unique(of_group, return_index=True)
    stop = np.append(start[1:], len(cells))
    heaviness = np.add.reduceat(weight**2, start) * np.exp(noise * generator.uniform(-1, 1, len(names)))
    order = np.lexsort((generator.permutation(len(names)), -heaviness))
    chosen = _greedy(order, start, stop, of_class, weight, members[names] / len(codes), shares, num_classes)
    of_name = np.full(len(members), -1, np.int16)
    of_name[names] = chosen
    bins[rows] = of_name[groups[rows]]
    np.add.at(counts, (codes[rows], bins[rows]), 1)


def _greedy(
    order: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    of_class: np.ndarray,
    weight: np.ndarray,
    total: np.ndarray,
    shares: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """A bin for each group: int16 [G]. Group g has the cells start[g]:stop[g] of `of_class` and `weight`."""
    filled = np.zeros((num_classes + 1, len(shares)))
    own = (1 / shares - 1 / shares.max()) / 2
    chosen = np.empty(len(order), np.int16)
    starts, stops, totals = start.tolist(), stop.tolist(), total.tolist()
    for group in order.tolist():
        a, b = starts[group], stops[group]
        cells, amount, whole = of_class[a:b], weight[a:b], totals[group]
        cost = amount @ filled.take(cells, axis=0) + whole * filled[-1] + (amount @ amount + whole * whole) * own
        best = int(cost.argmin())
        chosen[group] = best
        filled[cells, best] += amount / shares[best]
        filled[-1, best] += whole / shares[best]
    return chosen


def _quotas(alone: np.ndarray, counts: np.ndarray, shares: np.ndarray, keep_in_first: bool) -> np.ndarray:
    """How many of the `alone` [C] rows of each class go to each bin: [C, F], given the `counts` there already.

    Of each class the bins get whole numbers next to their shares; which of the two is chosen so that
    the rows in all follow the shares too.
    """
    quotas = np.zeros_like(counts)
    carry = shares * counts.sum() - counts.sum(axis=0)
    for code in np.flatnonzero(alone):
        exact = _level(int(alone[code]), counts[code], shares)
        whole = np.floor(exact + 1e-9).astype(np.int64)
        spare = int(alone[code] - whole.sum())
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
