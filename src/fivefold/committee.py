"""Trained models that predict together, in memory: a fold's, a student, or an ensemble with its weights."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir, find_models, locate_all
from fivefold.contract.stages import ENSEMBLE
from fivefold.data.dataset import Batch, ImageSet
from fivefold.data.folds import FoldTable
from fivefold.data.images import Pixels
from fivefold.errors import DataError
from fivefold.inference.ensemble import Ensemble, find_ensemble
from fivefold.machine import count_cores
from fivefold.members import ImageFiles, Member, load_member
from fivefold.predictions import in_class_order
from fivefold.progress import track

Prepared = dict[str, Batch]
"""An image as the networks take it, by the `sight` of the members."""
IMAGES_AT_ONCE = 32
"""So many prepared images are in memory at most, and as many that are prepared meanwhile."""


@dataclass(frozen=True)
class Verdict:
    """What was said of N images: `rows` [R] those that could be read, ascending, `log_probs` float32 [R, C] of them.

    `unreadable`: why not, by row, for the others.
    """

    rows: np.ndarray
    log_probs: np.ndarray
    unreadable: Mapping[int, str]


@dataclass(frozen=True)
class Committee:
    """An ensemble whose models are loaded: its `members`, in the order of its models."""

    ensemble: Ensemble
    members: Sequence[Member]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.ensemble.classes

    def predict(self, files: ImageFiles, label: str = "") -> Verdict:
        """Every member's word on each image that can be read, blended; a progress bar where there is a `label`.

        An image is decoded once for all members to which the same pixels count, and transformed once for
        those that see alike. None of this raises for a single bad image.
        """
        portions, total = self._prepared(files), -(-len(files.paths) // IMAGES_AT_ONCE)
        rows, log_probs, unreadable = [], [np.empty((0, len(self.classes)), np.float32)], {}
        for portion in track(portions, total, label) if label else portions:
            unreadable |= {row: image for row, image in portion.items() if isinstance(image, str)}
            images = {row: image for row, image in portion.items() if not isinstance(image, str)}
            rows += images
            if images:
                log_probs.append(self.judge(list(images.values())))
        return Verdict(np.array(rows, np.int64), np.concatenate(log_probs), unreadable)

    @property
    def kinds(self) -> list[Pixels]:
        """What pixels of a file count to the members: nearly always the same to all of them."""
        return list(dict.fromkeys(member.pixels for member in self.members))

    def decode(self, content: bytes, name: str, **bounds: Any) -> dict[Pixels, np.ndarray]:
        """An image file as the pixels uint8 [H, W, 3] that count to each member; for several threads. Bounds and DataError as `images.decode`."""
        return {pixels: pixels.decode(content, name, **bounds) for pixels in self.kinds}

    def prepare(self, decoded: Mapping[Pixels, np.ndarray]) -> Prepared:
        """What `decode` gave as the networks take it, once for members that see alike; for several threads."""
        seeing = {member.sight: member for member in self.members}
        return {sight: member.prepare(decoded[member.pixels]) for sight, member in seeing.items()}

    def judge(self, images: Sequence[Prepared]) -> np.ndarray:
        """log p float32 [N, C] of N prepared images.

        The company of an image changes its row by no more than the rounding of the networks' precision.
        """
        log_probs = []
        for member in self.members:
            own = member.predict_prepared([image[member.sight] for image in images])
            log_probs.append(in_class_order(own, member.source.info["classes"], self.classes))
        return self.ensemble.blend(log_probs)

    def _prepared(self, files: ImageFiles) -> Iterator[dict[int, Prepared | str]]:
        """Each row as the networks take it, or why it cannot be read; a portion is prepared while one is in use."""
        sets = [ImageSet(files.store, files.paths, _no_transform, 0, files.sha256, (), kind) for kind in self.kinds]

        def prepare(row: int) -> Prepared | str:
            try:
                return self.prepare({images.pixels: images.image(row) for images in sets})
            except DataError as error:
                return str(error)

        starts = range(0, len(files.paths), IMAGES_AT_ONCE)
        with ThreadPoolExecutor(count_cores()) as pool:
            waiting = None
            for start in starts:
                rows = range(start, min(start + IMAGES_AT_ONCE, len(files.paths)))
                ready, waiting = waiting, (rows, pool.map(prepare, rows))
                if ready:
                    yield dict(zip(*ready, strict=True))
            if waiting:
                yield dict(zip(*waiting, strict=True))


def load_committee(folder: Path, scratch: Path, explicit: Mapping[str, Any]) -> Committee:
    """The models below a folder (tarballs are unpacked to `scratch`), with the weights and temperature of their `ensemble.json` if it is there.

    `explicit`: keys of `[predict]` that override the models' own. One fold's model may stand alone;
    several must be whole systems of one split.
    """
    ensemble = find_ensemble(find_models(folder, scratch), locate_all(folder, scratch, ENSEMBLE))
    if "rank" in (ensemble.within, ensemble.between):
        raise DataError(
            f"{ENSEMBLE} blends by rank, which says nothing of an image alone; blend otherwise, or take a fold"
        )
    return Committee(ensemble, [load_member(model, explicit) for model in ensemble.models])


def seen_as(models: Sequence[ModelDir], table: FoldTable) -> np.ndarray:
    """What each row of the split was to these models together: `train`, `valid` or `test`, str [N].

    A row that one of them trained on is `train` to all; `valid` are those that only chose a best
    epoch, as the holdout did of a student with patience, and `test` those that none of them saw.
    """
    part = np.full(len(table), "test", dtype="U5")
    trained = np.zeros(len(table), bool)
    for model in models:
        fold = model.info["fold"]
        part[table.valid_rows(fold) if fold is not None else table.part == "valid"] = "valid"
        if model.info.get("selected_on") == "holdout":
            part[table.aside_rows()] = "valid"
        trained[table.train_rows(fold) if fold is not None else table.part == "train"] = True
    part[trained] = "train"
    return part


def _no_transform(image: Any) -> Any:
    return image
