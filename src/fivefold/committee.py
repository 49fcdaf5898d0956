"""Trained models that predict together, in memory: a fold's, a student, or an ensemble with its weights."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir, find_models, locate_all
from fivefold.contract.files import read_json
from fivefold.contract.stages import ENSEMBLE
from fivefold.data.dataset import Batch, ImageSet
from fivefold.data.folds import FoldTable
from fivefold.data.images import Pixels
from fivefold.data.store import FolderStore
from fivefold.errors import DataError
from fivefold.evaluation.calibration import apply_temperature
from fivefold.inference.blends import combined, equal
from fivefold.inference.ensemble import check_members
from fivefold.machine import count_cores
from fivefold.members import Gallery, ImageFiles, Member, load_member
from fivefold.predictions import in_class_order
from fivefold.progress import track

log = logging.getLogger("fivefold")

Prepared = dict[str, Batch]
"""An image as the networks take it, by the `sight` of the members."""
IMAGES_AT_ONCE = 32
"""So many decoded images are in memory at most, and as many that are decoded meanwhile."""


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
    """Models by system: a system's have an equal say, and the systems their convex `weights` [systems].

    `within` and `between` are the names of the blends inside a system and of the systems.
    """

    systems: Mapping[str, Sequence[Member]]
    classes: tuple[str, ...]
    weights: np.ndarray
    temperature: float = 1.0
    within: str = "mean"
    between: str = "mean"

    @property
    def members(self) -> list[Member]:
        return [member for group in self.systems.values() for member in group]

    def predict(self, files: ImageFiles, label: str = "") -> Verdict:
        """Every member's word on each image that can be read, blended; a progress bar where there is a `label`.

        An image is read and decoded once for all members to which the same pixels count, and transformed once for
        those that see alike. None of this raises for a single bad image.
        """
        total = -(-len(files.paths) // IMAGES_AT_ONCE)
        said: list[list[np.ndarray]] = [[] for _ in self.members]
        for pixels in self.kinds:
            portions, rows, unreadable = read_in_portions(files, pixels), [], {}
            seeing = [
                (words, member) for words, member in zip(said, self.members, strict=True) if member.pixels == pixels
            ]
            for portion in track(portions, total, label) if label else portions:
                unreadable |= {row: image for row, image in portion.items() if isinstance(image, str)}
                read = {row: image for row, image in portion.items() if not isinstance(image, str)}
                rows += read
                gallery = Gallery(ImageFiles(FolderStore(Path()), [""] * len(read), pixels=list(read.values())))
                for words, member in seeing if read else ():
                    words.append(self._of(member, gallery))
        return Verdict(np.array(rows, np.int64), self._blended(said), unreadable)

    @property
    def kinds(self) -> list[Pixels]:
        """What pixels of a file count to the members: nearly always the same to all of them."""
        return list(dict.fromkeys(member.pixels for member in self.members))

    def decode(self, content: bytes, name: str, max_pixels: float = math.inf) -> dict[Pixels, np.ndarray]:
        """An image file as the pixels uint8 [H, W, 3] that count to each member; for several threads. DataError as `images.decode`."""
        return {pixels: pixels.decode(content, name, max_pixels) for pixels in self.kinds}

    def prepare(self, decoded: Mapping[Pixels, np.ndarray]) -> Prepared:
        """What `decode` gave as the networks take it, once for members that see alike; for several threads."""
        seeing = {member.sight: member for member in self.members}
        return {sight: member.prepare(decoded[member.pixels]) for sight, member in seeing.items()}

    def judge(self, images: Sequence[Prepared]) -> np.ndarray:
        """log p float32 [N, C] of N prepared images, which each member takes in one step.

        The company of an image changes its row by no more than the rounding of the networks' precision.
        """
        said = []
        for member in self.members:
            words = member.predict_prepared([image[member.sight] for image in images])
            said.append([in_class_order(words, member.source.info["classes"], self.classes)])
        return self._blended(said)

    def _of(self, member: Member, gallery: Gallery) -> np.ndarray:
        return in_class_order(member.predict_seen(gallery, ""), member.source.info["classes"], self.classes)

    def _blended(self, said: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """log p float32 [R, C] of what each member `said` in portions."""
        if not said[0]:
            return np.empty((0, len(self.classes)), np.float32)
        whole = iter([np.concatenate(words) for words in said])
        groups = [[next(whole) for _ in group] for group in self.systems.values()]
        each = [combined(self.within, group, equal(len(group))) for group in groups]
        return apply_temperature(combined(self.between, each, self.weights), self.temperature)


def read_in_portions(files: ImageFiles, pixels: Pixels) -> Iterator[dict[int, np.ndarray | str]]:
    """Each row's pixels uint8 [H, W, 3], or why there are none; the next portion is decoded while one is in use."""
    images = ImageSet(files.store, files.paths, transform=_no_transform, sha256=files.sha256, pixels=pixels)

    def read(row: int) -> np.ndarray | str:
        try:
            return images.image(row)
        except DataError as error:
            return str(error)

    starts = range(0, len(images), IMAGES_AT_ONCE)
    with ThreadPoolExecutor(count_cores()) as pool:
        waiting = None
        for start in starts:
            rows = range(start, min(start + IMAGES_AT_ONCE, len(images)))
            ready, waiting = waiting, (rows, pool.map(read, rows))
            if ready:
                yield dict(zip(*ready, strict=True))
        if waiting:
            yield dict(zip(*waiting, strict=True))


def load_committee(folder: Path, scratch: Path, explicit: Mapping[str, Any]) -> Committee:
    """The models below a folder (tarballs are unpacked to `scratch`), with the weights and temperature of their `ensemble.json` if it is there.

    `explicit`: keys of `[predict]` that override the models' own. One fold's model may stand alone;
    several must be whole systems of one split.
    """
    models = find_models(folder, scratch)
    if len(models) > 1 and models[0].info["role"] == "fold":
        check_members([(model.name, model.info) for model in models])
    elif len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise DataError(f"several students below {folder} ({names}); give the model dir of one")
    classes = tuple(models[0].info["classes"])
    groups: dict[str, list[Member]] = {}
    for model in models:
        groups.setdefault(model.system, []).append(load_member(model, explicit))
    found = _description(folder, scratch, models)
    if found is None:
        return Committee(groups, classes, equal(len(groups)))
    log.info("%d models with the weights and the temperature %.4g of %s", len(models), found["temperature"], ENSEMBLE)
    weights = np.array([found["weights"][name] for name in groups])
    return Committee(groups, classes, weights, found["temperature"], found["within"], found["blend"])


def seen_as(models: Sequence[ModelDir], table: FoldTable) -> np.ndarray:
    """What each row of the split was to these models together: `train`, `valid` or `test`, str [N].

    A row that one of them trained on is `train` to all; `valid` are those that only chose a best
    epoch, and `test` those that none of them saw.
    """
    part = np.full(len(table), "test", dtype="U5")
    trained = np.zeros(len(table), bool)
    for model in models:
        fold = model.info["fold"]
        part[table.valid_rows(fold) if fold is not None else table.part == "valid"] = "valid"
        trained[table.train_rows(fold) if fold is not None else table.part == "train"] = True
    part[trained] = "train"
    return part


def find_description(folder: Path, scratch: Path, models: Sequence[ModelDir]) -> Path | None:
    """The `ensemble.json` below a folder that blends exactly these models; None where there is none.

    Raises DataError for one that does not say what it blends, and for several that blend otherwise.
    """
    own = sorted((model.system, model.name) for model in models)
    found: dict[Path, dict[str, Any]] = {}
    for path in locate_all(folder, scratch, ENSEMBLE):
        facts = read_json(path)
        try:
            if sorted((member["system"], member["model"]) for member in facts["members"]) == own:
                found[path] = _blend(facts)
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"{path} does not describe an ensemble: {error}; write it again, or leave it out"
            ) from error
    blends = list(found.values())
    if any(blend != blends[0] for blend in blends):
        raise DataError(
            f"several {ENSEMBLE} of these models below {folder}, with other weights or temperatures; give the folder of "
            "one run"
        )
    return next(iter(found), None)


def _description(folder: Path, scratch: Path, models: Sequence[ModelDir]) -> dict[str, Any] | None:
    path = find_description(folder, scratch, models)
    blend = _blend(read_json(path)) if path else None
    if blend and "rank" in (blend["within"], blend["blend"]):
        raise DataError(
            f"{ENSEMBLE} blends by rank, which says nothing of an image alone; blend otherwise, or take a fold"
        )
    return blend


def _blend(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an `ensemble.json` that says how to blend."""
    kept = {"weights": dict(facts["weights"]), "temperature": float(facts["temperature"])}
    return kept | {name: str(facts.get(name, "mean")) for name in ("within", "blend")}


def _no_transform(image: Any) -> Any:
    return image
