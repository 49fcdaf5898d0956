"""The feature cache: features of a frozen backbone, by the SHA-256 of the image file.

A folder belongs to one backbone, with its weights, preprocessing and views: `name_of` makes its name from them, so features
of other weights are never mixed. Each file in it has the features of some images. All folds, seeds and later runs read them,
and images that it lacks are added. Its folder `heads` has the linear heads that were fitted to them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fivefold.contract.files import atomic, lock
from fivefold.errors import RetryableError
from fivefold.log import log

PREFIX = "features-"
HEADS = "heads"
CHUNK_IMAGES = 4096
"""Images that are computed and stored at a time: a run that is killed loses no more."""
Compute = Callable[[Sequence[int]], np.ndarray]
"""From row numbers to features float32 [rows, V, F]."""


def name_of(facts: Mapping[str, Any]) -> str:
    """Return the name of the folder for features that these facts determine."""
    return PREFIX + hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def get_or_compute(folder: Path | None, digests: Sequence[str | None], compute: Compute) -> np.ndarray:
    """Return the features float32 [N, V, F] of N images from the cache `folder`; `compute` those that it lacks, and add them.

    Without a folder, or if an image has no digest, compute all. One process computes at a time, the others wait for it. If the
    folder is not writable or the disk is full, log a warning and keep nothing.
    """
    digests, rows = list(digests), range(len(digests))
    if folder is None or None in digests:
        return np.concatenate([compute(part) for part in _chunks(rows)])
    known = _read(folder, set(digests))
    if any(digest not in known for digest in digests):
        try:
            with _locked(folder):
                known = _read(folder, set(digests))
                unknown = {digest: row for row, digest in enumerate(digests) if digest not in known}
                for part in _chunks(list(unknown.values())):
                    added = dict(zip([digests[row] for row in part], compute(part), strict=True))
                    known |= added
                    _write(folder, added)
        except (OSError, RetryableError) as error:
            log.warning("features are not kept in %s: %s", folder, error)
            missing = [row for row in rows if digests[row] not in known]
            known |= dict(zip([digests[row] for row in missing], compute(missing), strict=True)) if missing else {}
    return np.stack([known[digest] for digest in digests])


def load_or_fit(
    folder: Path | None, inputs: Sequence[np.ndarray], fit: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Return the arrays that `fit` gives for these `inputs`; the cache `folder` keeps them, if there is one."""
    if folder is None:
        return fit()
    digest = hashlib.sha256()
    for array in inputs:
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    path = folder / HEADS / f"{digest.hexdigest()[:32]}.npz"
    with suppress(OSError, BadZipFile, ValueError, KeyError, EOFError), np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}
    fitted = fit()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **fitted)
    except (OSError, RetryableError) as error:
        log.warning("a linear head is not kept in %s: %s", path.parent, error)
    return fitted


def _chunks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    return (rows[start : start + CHUNK_IMAGES] for start in range(0, len(rows), CHUNK_IMAGES))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        lock(file.fileno(), f"another process is computing features into {folder}: waiting for it")
        for leftover in folder.glob(".*.tmp"):  # of a killed process
            leftover.unlink()
        yield


def _read(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Return the features [V, F] of the `wanted` images in the folder, by digest. Remove a damaged file: its images are computed again."""
    known: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
                digests = content["sha256"].tolist()
                if wanted.intersection(digests):
                    found = zip(digests, content["features"], strict=True)
                    known |= {digest: features for digest, features in found if digest in wanted}
        except (BadZipFile, ValueError, KeyError, EOFError) as error:
            log.warning("%s is damaged (%s): its features are computed again", path, type(error).__name__)
            path.unlink(missing_ok=True)
    return known


def _write(folder: Path, features: Mapping[str, np.ndarray]) -> None:
    """Add a file with these features. Another process never sees a part of it."""
    name = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:32]
    with atomic(folder / f"{name}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, sha256=np.array(list(features)), features=np.stack(list(features.values())))
