"""Rows that no fold may part: those of a group, and those that show the same picture."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


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
    """Groups [N] as whole numbers from 0 up, where a null is a group of its own; None when all are null."""
    if groups.null_count == len(groups):
        return None
    encoded = pc.dictionary_encode(groups)
    codes = encoded.indices.fill_null(-1).to_numpy().copy()
    alone = codes < 0
    codes[alone] = len(encoded.dictionary) + np.arange(alone.sum())
    return codes


def merged(groups: np.ndarray | None, duplicates: Duplicates) -> np.ndarray | None:
    """Groups [N] that keep both the given groups and the duplicates whole; None when every row stands alone.

    Two groups that share a picture become one: connected components of the rows.
    """
    if groups is None or not duplicates.sets:
        return duplicates.codes if duplicates.sets else groups
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Groups and pictures are the nodes of one graph, and a row is an edge between its two.
    pictures = duplicates.codes.astype(np.int64) + groups.max() + 1
    nodes = int(pictures.max()) + 1
    edges = coo_array((np.ones(len(groups), bool), (groups, pictures)), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][groups]
