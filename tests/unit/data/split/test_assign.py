from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedGroupKFold

from fivefold.config.schema import Split
from fivefold.data.split.assign import find_duplicates, group_codes, merge_groups, split_groups, split_rows
from fivefold.errors import SettingsError


def split(codes: Sequence[int], groups: np.ndarray | None = None, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Return (fold, part) of rows with distinct images."""
    if groups is None:
        return split_rows(np.asarray(codes), np.arange(len(codes)), Split(**options))
    return split_groups(np.asarray(codes), groups, Split(**options))


def random_codes(generator: np.random.Generator, rows: int, classes: int, least: int = 1) -> np.ndarray:
    """Return codes of classes of very different sizes, each with at least `least` rows."""
    codes = generator.choice(classes, rows, p=generator.dirichlet(np.ones(classes)))
    codes[: classes * least] = np.tile(np.arange(classes), least)
    return codes


def groups_are_intact(groups: np.ndarray, bins: np.ndarray) -> bool:
    return len(np.unique(groups)) == np.unique(np.stack([groups, bins]), axis=1).shape[1]


def largest_deviation(codes: np.ndarray, fold: np.ndarray) -> float:
    """Return the largest difference between a class's share in a fold and an equal share."""
    counts = confusion_matrix(codes, fold)[: codes.max() + 1, : fold.max() + 1]
    return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - 1 / (fold.max() + 1)).max())


def test_grouped_folds_are_as_even_as_those_of_scikit_learn() -> None:
    deviations, reference_deviations = [], []
    for case in range(6):
        generator = np.random.default_rng(case)
        rows, classes = int(generator.integers(500, 1000)), int(generator.integers(2, 20))
        groups = generator.choice(rows // 6, rows, p=generator.dirichlet(np.full(rows // 6, 0.7)))
        codes = random_codes(generator, rows, classes, least=5)
        fold, _ = split(codes, groups, seed=case)
        reference = np.empty_like(fold)
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=case)
        for number, (_, valid) in enumerate(splitter.split(codes, codes, groups)):
            reference[valid] = number
        assert groups_are_intact(groups, fold)
        deviations.append(largest_deviation(codes, fold))
        reference_deviations.append(largest_deviation(codes, reference))
    assert np.mean(deviations) <= 1.02 * np.mean(reference_deviations)


@pytest.mark.parametrize("parts", [(0.8, 0.1, 0.1), (0.7, 0.3, 0.0), (0.5, 0.35, 0.15)])
def test_grouped_parts_match_the_requested_shares(parts: tuple[float, ...]) -> None:
    generator = np.random.default_rng(8)
    groups = generator.integers(0, 1500, 9000)
    codes = random_codes(generator, 1500, 8)[groups]
    fold, part = split(codes, groups, ratios=list(parts))
    assert groups_are_intact(groups, fold)
    names = ["train", "valid", "test"][: np.count_nonzero(parts)]
    shares = np.stack([np.bincount(codes[part == name], minlength=8) for name in names], axis=1) / 9000
    big = np.bincount(codes) > 500
    expected = np.bincount(codes)[:, None] / 9000 * parts[: len(names)]
    assert np.abs(shares - expected)[big].max() < 0.01
    assert {name: set(fold[part == name]) for name in names} == {name: {0 if name == "valid" else -1} for name in names}


def test_unstratified_grouped_folds_have_similar_sizes_beside_a_holdout() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 100, 2000)
    fold, part = split(generator.integers(0, 3, 2000), groups, folds=4, holdout=0.2, stratify=False)
    assert groups_are_intact(groups, fold)
    assert ((part == "holdout") == (fold == -1)).all()
    assert np.ptp(np.bincount(fold + 1)) <= 6
    few = np.concatenate([np.zeros(50, int), 1 + np.arange(6).repeat(2)])
    fold, _ = split(generator.integers(0, 3, len(few)), few, folds=7)
    assert set(fold) == set(range(7)), "no fold is empty if there are enough groups"


@pytest.mark.parametrize("options", [{"holdout": 0.2}, {"ratios": [0.6, 0.2, 0.2]}, {"stratify": False, "folds": 7}])
@pytest.mark.parametrize("grouped", [False, True])
def test_split_depends_only_on_the_seed(options: dict, grouped: bool) -> None:
    generator = np.random.default_rng(5)
    codes, groups = random_codes(generator, 400, 6, 5), generator.integers(0, 90, 400) if grouped else None
    first, repeated, other = (split(codes, groups, seed=seed, **options) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, repeated, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_classes_with_fewer_rows_than_folds_are_spread_evenly() -> None:
    codes = np.concatenate([np.arange(40), np.full(60, 40)])
    fold, _ = split(codes)
    assert (np.bincount(fold) == 20).all()
    few = np.repeat(np.arange(30), 3)
    fold, _ = split(few, folds=9)
    assert (np.bincount(fold) == 10).all()
    assert confusion_matrix(few, fold).max() == 1


def test_single_row_classes_go_to_training(caplog: pytest.LogCaptureFixture) -> None:
    codes = np.concatenate([np.arange(10), np.repeat([10, 11], 50)])
    _, part = split(codes, holdout=0.2)
    assert (part[:10] == "train").all()
    assert [(part[codes == code] == "holdout").sum() for code in (10, 11)] == [11, 11]
    assert not caplog.records
    _, part = split(np.repeat(np.arange(50), 2), holdout=0.1)
    assert (part == "holdout").sum() == 10
    assert "10 of 100 rows" in caplog.text


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 0, 1, 1, 2])])
@pytest.mark.parametrize("options", [{"folds": 7}, {"holdout": 0.9}, {"ratios": [0.01, 0.98, 0.01]}])
def test_more_folds_or_parts_than_rows_or_groups_are_rejected(groups: np.ndarray | None, options: dict) -> None:
    with pytest.raises(SettingsError, match=r"\b[356] (rows|groups)"):
        split([0, 1, 0, 1, 0, 1], groups, **options)


def test_duplicate_images_follow_their_first_row() -> None:
    generator = np.random.default_rng(1)
    codes, images = random_codes(generator, 300, 4, 20), generator.integers(0, 250, 300)
    first_rows = np.sort(np.unique(images, return_index=True)[1])
    for options in ({}, {"holdout": 0.1}, {"ratios": [0.8, 0.1, 0.1]}):
        fold, part = split_rows(codes, images, Split(**options))
        assert groups_are_intact(images, fold)
        reference = split(codes[first_rows], **options)
        assert (fold[first_rows].tolist(), part[first_rows].tolist()) == (reference[0].tolist(), reference[1].tolist())


def test_groups_that_share_an_image_are_merged() -> None:
    groups, images = np.array([3, 3, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 3, 2, 4])
    merged = merge_groups(groups, images)
    assert len(set(merged[:6].tolist())) == 1
    assert merged[6] != merged[0]


def test_duplicates_are_detected_in_digests_and_strings() -> None:
    digests = np.array([b"b", b"a", b"b", b"c", b"a", b"b"]).astype("V16")
    for keys in (digests, pa.array(["b", "a", "b", "c", "a", "b"])):
        assert sorted(rows.tolist() for rows in find_duplicates(keys).sets) == [[0, 2, 5], [1, 4]]
    assert find_duplicates(digests[[0, 1, 3]]).sets == []


def test_each_row_without_a_group_gets_its_own_code() -> None:
    for groups in (pa.nulls(3, pa.string()), pa.array(["a", None, "b", None])):
        assert group_codes(groups) is None
    codes = group_codes(pa.array(["p", None, "q", "p", None]))
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 4
