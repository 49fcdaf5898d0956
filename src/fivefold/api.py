"""`ImageClassificationAPI`: a trained model inside another program, which it never brings down over one bad image."""

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fivefold.committee import Committee, Verdict, load_committee
from fivefold.contract.artifacts import TARBALLS
from fivefold.contract.files import tree_files
from fivefold.data.given import HandedStore
from fivefold.errors import MissingInputError
from fivefold.members import ImageFiles
from fivefold.predictions import sample

log = logging.getLogger("fivefold")

ERROR = "ERROR"
"""The predicted class of what cannot be read, with a confidence of 0."""

LISTED = 5
"""Reasons that the warning of unreadable images names; a line each follows for the others."""

Picture = str | os.PathLike[str] | bytes | Image.Image
PICTURES = (str, os.PathLike, bytes, Image.Image)


class ImageClassificationAPI:
    """Predicts images by the model at a path: a fold's model dir, a student's, or a folder with a whole ensemble.

    Of several fold models each has an equal say; where an `ensemble.json` of them lies there too, its
    weights and its temperature count. The models stay in memory. Nothing is written to disk.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        device: str = "auto",
        batch_size: int = 0,
        images_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Loads the models. `device`: auto (CUDA, else MPS, else CPU), cuda, mps or cpu; `batch_size` 0: the recipe's.

        `images_folder`: paths of images count from there, and one that leads out of it, also by a link, is `ERROR`.
        Set it where others than you name the paths; without it any file of this machine can be named.

        Raises MissingInputError where no model or no such folder is, DataError for a model that is broken or
        not finished, SettingsError for a device that this machine has not.
        """
        path = Path(model_path)
        if not path.exists():
            raise MissingInputError(f"{path} does not exist; give the folder of a trained model, or of an ensemble")
        self._folder = None if images_folder is None else Path(images_folder)
        if self._folder and not self._folder.is_dir():
            raise MissingInputError(f"images_folder={self._folder}: there is no such folder")
        explicit = {"device": device, **({"batch_size": batch_size} if batch_size else {})}
        packed = any(file.name in TARBALLS for file in tree_files(path))
        with tempfile.TemporaryDirectory(prefix="fivefold-") if packed else nullcontext("") as scratch:
            self._committee: Committee = load_committee(path, Path(scratch), explicit)
        log.info("%d models of %s, %d classes", len(self._committee.members), path, len(self.classes))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that `predict` may give, beside ERROR."""
        return self._committee.classes

    def predict(self, images: Sequence[Picture] | Picture) -> list[dict[str, Any]]:
        """`[{"image_path", "predicted_class", "confidence"}]`, as many as `images` and in their order.

        An image is a path, the bytes of an image file, or one of Pillow's. What cannot be read is
        `ERROR` with the confidence 0.0, and its reason is logged; it never raises.
        """
        things = [images] if isinstance(images, PICTURES) else list(images)
        start = time.perf_counter()
        keys = [thing if isinstance(thing, str) else f"<image {at}>" for at, thing in enumerate(things)]
        store = HandedStore(dict(zip(keys, things, strict=True)), self._folder)
        verdict = self._committee.predict(ImageFiles(store, keys))
        names = [_name(thing, at) for at, thing in enumerate(things)]
        results = answers(verdict, names, self.classes)
        tell(verdict, names, results, time.perf_counter() - start)
        return results


def answers(verdict: Verdict, names: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """A result for each of `names`: class and confidence in 0..1, or ERROR."""
    results = [{"image_path": name, "predicted_class": ERROR, "confidence": 0.0} for name in names]
    best = verdict.log_probs.argmax(axis=1)
    sure = np.minimum(np.exp(verdict.log_probs.max(axis=1, initial=-np.inf).astype(np.float64)), 1.0)
    for row, code, confidence in zip(verdict.rows.tolist(), best.tolist(), sure.tolist(), strict=True):
        results[row] |= {"predicted_class": classes[code], "confidence": confidence}
    return results


def tell(verdict: Verdict, names: Sequence[str], results: Sequence[dict[str, Any]], seconds: float) -> None:
    """Logs time, successes, failures with the reason of each, and how often each class was predicted."""
    read, failed = len(verdict.rows), len(verdict.unreadable)
    each = f"{1000 * seconds / len(names):.1f} ms an image" if names else "no image"
    log.info("predicted %d images in %.2f s (%s): %d successes, %d failures", len(names), seconds, each, read, failed)
    counts = Counter(result["predicted_class"] for result in results if result["predicted_class"] != ERROR)
    if counts:
        log.info("classes: %s", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if failed:
        reasons = list(verdict.unreadable.values())
        log.warning("%d images cannot be read: %s", failed, sample(reasons, LISTED))
        for reason in reasons[LISTED:]:
            log.info("cannot be read: %s", reason)


def _name(thing: Any, at: int) -> str:
    """What a result calls a thing: its path as given, or its number among those handed over."""
    path = thing if isinstance(thing, str | os.PathLike) else getattr(thing, "filename", "")
    return os.fsdecode(path) if path else f"image {at}"
