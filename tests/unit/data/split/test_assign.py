"""Splitting against scikit-learn's, and what must hold of every split."""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedGroupKFold

from fivefold.config.schema import Split
from fivefold.data.split.assign import find_duplicates, group_codes, rank_labels, split_products, split_rows
from fivefold.errors import SettingsError


def divided(codes: Sequence[int], groups: np.ndarray | None = None, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """(fold, part) of rows that show different pictures."""
    return split_rows(np.asarray(codes), groups, np.arange(len(codes)), Split(**options))


def random_codes(generator: np.random.Generator, rows: int, classes: int, least: int = 1) -> np.ndarray:
    """Classes of very different sizes, each of `least` rows at least."""
    codes = generator.choice(classes, rows, p=generator.dirichlet(np.ones(classes)))
    codes[: classes * least] = np.tile(np.arange(classes), least)
    return codes


def are_whole(groups: np.ndarray, bins: np.ndarray) -> bool:
    return len(np.unique(groups)) == np.unique(np.stack([groups, bins]), axis=1).shape[1]


def largest_deviation(codes: np.ndarray, fold: np.ndarray) -> float:
    """By how much the share of a class in a fold differs from an equal one, at most."""
    counts = confusion_matrix(codes, fold)[: codes.max() + 1, : fold.max() + 1]
    return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - 1 / (fold.max() + 1)).max())


def test_folds_of_groups_are_as_even_as_scikit_learns() -> None:
    ours, theirs = [], []
    for case in range(10):
        generator = np.random.default_rng(case)
        rows, classes = int(generator.integers(500, 3000)), int(generator.integers(2, 20))
        groups = generator.choice(rows // 6, rows, p=generator.dirichlet(np.full(rows // 6, 0.7)))
        codes = random_codes(generator, rows, classes, least=5)
        fold, _ = divided(codes, groups, seed=case)
        reference = np.empty_like(fold)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=case)
        for number, (_, valid) in enumerate(splitter.split(codes, codes, groups)):
            reference[valid] = number
        assert are_whole(groups, fold)
        ours.append(largest_deviation(codes, fold))
        theirs.append(largest_deviation(codes, reference))
    assert np.mean(ours) <= 1.02 * np.mean(theirs)


@pytest.mark.slow
def test_a_million_rows_in_groups_are_divided_in_seconds() -> None:
    """StratifiedGroupKFold takes 90 seconds for these, on the machine where this takes 3."""
    generator = np.random.default_rng(0)
    codes, groups = generator.integers(0, 400, 1_000_000), generator.integers(0, 200_000, 1_000_000)
    start = time.process_time()
    fold, _ = divided(codes, groups)
    assert time.process_time() - start < 30
    assert are_whole(groups, fold)
    assert largest_deviation(codes, fold) < 0.0005


@pytest.mark.parametrize("parts", [(0.8, 0.1, 0.1), (0.7, 0.3, 0.0), (0.5, 0.35, 0.15)])
def test_parts_of_groups_have_any_shares(parts: tuple[float, ...]) -> None:
    generator = np.random.default_rng(8)
    groups = generator.integers(0, 1500, 9000)
    codes = random_codes(generator, 1500, 8)[groups]
    fold, part = divided(codes, groups, ratios=list(parts))
    assert are_whole(groups, fold)
    names = ["train", "valid", "test"][: np.count_nonzero(parts)]
    shares = np.stack([np.bincount(codes[part == name], minlength=8) for name in names], axis=1) / 9000
    big = np.bincount(codes) > 500
    wanted = np.bincount(codes)[:, None] / 9000 * parts[: len(names)]
    assert np.abs(shares - wanted)[big].max() < 0.01
    assert {name: set(fold[part == name]) for name in names} == {name: {0 if name == "valid" else -1} for name in names}


def test_groups_with_a_holdout_and_without_strata_are_evenly_heavy() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 100, 2000)
    fold, part = divided(generator.integers(0, 3, 2000), groups, folds=4, holdout=0.2, stratify=False)
    assert are_whole(groups, fold)
    assert ((part == "holdout") == (fold == -1)).all()
    assert np.ptp(np.bincount(fold + 1)) <= 6


@pytest.mark.parametrize("case", range(6))
def test_no_fold_is_empty_when_there_are_groups_enough(case: int) -> None:
    generator = np.random.default_rng(case)
    groups = np.concatenate([np.zeros(50, int), 1 + np.arange(generator.integers(4, 9)).repeat(case % 3 + 1)])
    folds = len(np.unique(groups))
    codes = generator.integers(0, 3, len(groups))
    fold, _ = divided(codes, groups, folds=folds, stratify=bool(case % 2))
    assert set(fold) == set(range(folds))


@pytest.mark.parametrize(
    "options", [{}, {"holdout": 0.2}, {"ratios": [0.6, 0.2, 0.2]}, {"stratify": False}, {"stratify": False, "folds": 7}]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_split_depends_on_its_seed_alone(options: dict, grouped: bool) -> None:
    generator = np.random.default_rng(5)
    codes, groups = random_codes(generator, 400, 6, 5), generator.integers(0, 90, 400) if grouped else None
    first, again, other = (divided(codes, groups, seed=seed, **options) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_classes_with_fewer_rows_than_folds_are_spread() -> None:
    codes = np.concatenate([np.arange(40), np.full(60, 40)])
    fold, _ = divided(codes)
    assert (np.bincount(fold) == 20).all()
    few = np.repeat(np.arange(30), 3)
    fold, _ = divided(few, folds=9)
    assert (np.bincount(fold) == 10).all()
    assert confusion_matrix(few, fold).max() == 1


def test_a_class_of_one_row_is_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    codes = np.concatenate([np.arange(10), np.repeat([10, 11], 50)])
    _, part = divided(codes, holdout=0.2)
    assert (part[:10] == "train").all()
    assert [(part[codes == code] == "holdout").sum() for code in (10, 11)] == [11, 11]
    assert not caplog.records
    _, part = divided(np.repeat(np.arange(50), 2), holdout=0.1)
    assert (part == "holdout").sum() == 10
    assert "10 of 100 rows" in caplog.text


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 0, 1, 1, 2])])
@pytest.mark.parametrize("options", [{"folds": 7}, {"holdout": 0.9}, {"ratios": [0.01, 0.98, 0.01]}])
def test_more_folds_or_parts_than_there_is_to_spread_are_refused(groups: np.ndarray | None, options: dict) -> None:
    with pytest.raises(SettingsError, match=r"\b[356] (rows|groups)"):
        divided([0, 1, 0, 1, 0, 1], groups, **options)


def test_rows_of_a_picture_follow_the_first_of_them() -> None:
    generator = np.random.default_rng(1)
    codes, pictures = random_codes(generator, 300, 4, 20), generator.integers(0, 250, 300)
    own = np.unique(pictures, return_index=True)[1]
    own.sort()
    for options in ({}, {"holdout": 0.1}, {"ratios": [0.8, 0.1, 0.1]}):
        fold, part = split_rows(codes, None, pictures, Split(**options))
        assert are_whole(pictures, fold)
        alone = divided(codes[own], **options)
        assert (fold[own] == alone[0]).all()
        assert (part[own] == alone[1]).all()


def test_products_are_divided_like_rows() -> None:
    generator = np.random.default_rng(2)
    products = np.unique(np.sort(generator.integers(0, 80, 400)), return_inverse=True)[1]
    count = products.max() + 1
    strata = generator.integers(0, 3, count)
    fold, part = split_products(strata[products], products, np.arange(400), Split(holdout=0.1))
    alone = divided(strata, holdout=0.1)
    assert (fold == alone[0][products]).all()
    assert (part == alone[1][products]).all()
    pictures = np.arange(400)
    pictures[products == count - 1] = pictures[0]
    fold, _ = split_products(strata[products], products, pictures, Split())
    assert set(fold[products == count - 1]) == {fold[0]}


@pytest.mark.parametrize("rows", [20, 60, 200])
def test_groups_that_share_a_picture_stay_together(rows: int) -> None:
    generator = np.random.default_rng(rows)
    groups, pictures = generator.integers(0, rows // 2, rows), generator.integers(0, rows * 2, rows)
    fold, _ = split_rows(generator.integers(0, 3, rows), groups, pictures, Split(folds=3))
    shape = (rows * 3, rows * 3)
    links = coo_matrix((np.ones(rows), (groups, rows + pictures)), shape)
    assert are_whole(connected_components(links, directed=False)[1][groups], fold)


def test_duplicates_are_found_in_digests_and_in_strings() -> None:
    digests = np.array([b"b", b"a", b"b", b"c", b"a", b"b"]).astype("V16")
    for keys in (digests, pa.array(["b", "a", "b", "c", "a", "b"])):
        found = find_duplicates(keys)
        assert sorted(rows.tolist() for rows in found.sets) == [[0, 2, 5], [1, 4]]
        conflicts = found.label_conflicts(np.array([0, 1, 0, 2, 2, 0]))
        assert [rows.tolist() for rows in conflicts] == [[1, 4]]
    assert find_duplicates(digests[[0, 1, 3]]).sets == []


def test_rows_without_a_group_stand_alone() -> None:
    for alone in (pa.nulls(3, pa.string()), pa.array(["a", None, "b", None])):
        assert group_codes(alone) is None
    codes = group_codes(pa.array(["p", None, "q", "p", None]))
    assert codes is not None
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 4


def test_labels_are_ranked_as_pandas_sorts_them() -> None:
    assert rank_labels(["-1", "10", "2"]).tolist() == [0, 2, 1]
    assert rank_labels(["10", "2", "a"]).tolist() == [0, 1, 2]
    assert rank_labels(["b", "A", "é", "B"]).tolist() == [2, 0, 3, 1]
