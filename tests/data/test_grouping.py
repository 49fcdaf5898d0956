"""Rows that belong together, against a search through the graph by hand."""

import numpy as np
import pyarrow as pa

from fivefold.data.grouping import find_duplicates, group_codes, merged


def components(groups: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Connected components of rows, by spreading the smallest row number until nothing changes."""
    found = np.arange(len(groups))
    while True:
        after = found.copy()
        for keys in (groups, pictures):
            for key in np.unique(keys):
                after[keys == key] = after[keys == key].min()
        if (after == found).all():
            return found
        found = after


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = np.unique(np.stack([first, second]), axis=1).shape[1]
    return pairs == len(np.unique(first)) == len(np.unique(second))


def test_duplicates_are_found_in_digests_and_in_strings() -> None:
    digests = np.array([b"b", b"a", b"b", b"c", b"a", b"b"]).astype("V16")
    for keys in (digests, pa.array(["b", "a", "b", "c", "a", "b"])):
        found = find_duplicates(keys)
        assert sorted(rows.tolist() for rows in found.sets) == [[0, 2, 5], [1, 4]]
        conflicts = found.conflicting(np.array([0, 1, 0, 2, 2, 0]))
        assert [rows.tolist() for rows in conflicts] == [[1, 4]]
    assert find_duplicates(digests[[0, 1, 3]]).sets == []


def test_rows_without_a_group_stand_alone() -> None:
    assert group_codes(pa.nulls(3, pa.string())) is None
    codes = group_codes(pa.array(["p", None, "q", "p", None]))
    assert codes is not None
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 4


def test_groups_that_share_a_picture_become_one() -> None:
    generator = np.random.default_rng(0)
    for rows in (5, 40, 200):
        groups = generator.integers(0, rows // 2, rows)
        duplicates = find_duplicates(generator.integers(0, rows * 2, rows).astype(np.int64).view("V8"))
        found = merged(groups, duplicates)
        assert found is not None
        assert same_partition(found, components(groups, duplicates.codes))


def test_what_is_alone_stays_alone() -> None:
    alone = find_duplicates(pa.array(["a", "b", "c"]))
    pair = find_duplicates(pa.array(["a", "b", "a"]))
    assert merged(None, alone) is None
    assert merged(np.array([0, 0, 1]), alone) is not None
    together = merged(None, pair)
    assert together is not None
    assert together[0] == together[2] != together[1]
