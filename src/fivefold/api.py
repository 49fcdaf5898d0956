"""`ImageClassificationAPI`: predict with a trained model in another program; an unreadable image never raises."""

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

from fivefold.contract.artifacts import TARBALLS
from fivefold.contract.files import tree_files
from fivefold.data.readers.user_images import HandedStore
from fivefold.ensemble import Committee, Verdict, load_committee
from fivefold.errors import MissingInputError
from fivefold.predictions import sample
from fivefold.trained_model import ImageFiles

log = logging.getLogger("fivefold")

ERROR = "ERROR"
"""The predicted class of an image that cannot be read, with a confidence of 0."""

MAX_LISTED = 5
"""Maximum number of reasons in the warning about unreadable images; the others get one line each."""

Picture = str | os.PathLike[str] | bytes | Image.Image
PICTURES = (str, os.PathLike, bytes, Image.Image)


class ImageClassificationAPI:
    """Predict images with the model at a path: a fold's model folder, a student's, or a folder with a whole ensemble.

    Several fold models have equal weights, unless the folder also contains their `ensemble.json` with weights and a
    temperature. The models stay in memory. Nothing is written to disk.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        device: str = "auto",
        batch_size: int = 0,
        images_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Load the models. `device`: auto (CUDA, else MPS, else CPU), cuda, mps or cpu; `batch_size` 0: the recipe's.

        `images_folder`: base folder of image paths; a path that leads out of it, also by a link, gives `ERROR`. Set it if
        other people choose the paths; without it, they can name any file of this machine.

        Raise a MissingInputError if there is no model or no such folder, a DataError if a model is damaged or
        unfinished, and a SettingsError if this machine does not have the device.
        """
        path = Path(model_path)
        if not path.exists():
            raise MissingInputError(f"{path} does not exist; set the folder of a trained model or of an ensemble")
        self._folder = None if images_folder is None else Path(images_folder)
        if self._folder and not self._folder.is_dir():
            raise MissingInputError(f"images_folder={self._folder} is not a folder")
        explicit = {"device": device, **({"batch_size": batch_size} if batch_size else {})}
        packed = any(file.name in TARBALLS for file in tree_files(path))
        with tempfile.TemporaryDirectory(prefix="fivefold-") if packed else nullcontext("") as scratch:
            self._committee: Committee = load_committee(path, Path(scratch), explicit)
        log.info("%d models of %s, %d classes", len(self._committee.members), path, len(self.classes))

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that `predict` can return, besides ERROR."""
        return self._committee.classes

    def predict(self, images: Sequence[Picture] | Picture) -> list[dict[str, Any]]:
        """Return `[{"image_path", "predicted_class", "confidence"}]`, one per image, in the order of `images`.

        An image is a path, the bytes of an image file, or a Pillow image. An image that cannot be read gives `ERROR`
        with confidence 0.0, and the reason is logged; it does not raise.
        """
        pictures = [images] if isinstance(images, PICTURES) else list(images)
        start = time.perf_counter()
        keys = [image if isinstance(image, str) else f"<image {number}>" for number, image in enumerate(pictures)]
        store = HandedStore(dict(zip(keys, pictures, strict=True)), self._folder)
        verdict = self._committee.predict(ImageFiles(store, keys))
        names = [_name(image, number) for number, image in enumerate(pictures)]
        results = answers(verdict, names, self.classes)
        tell(verdict, names, results, time.perf_counter() - start)
        return results


def answers(verdict: Verdict, names: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a result for each of `names`: class and confidence in 0..1, or ERROR."""
    results = [{"image_path": name, "predicted_class": ERROR, "confidence": 0.0} for name in names]
    best = verdict.log_probs.argmax(axis=1)
    top = np.minimum(np.exp(verdict.log_probs.max(axis=1, initial=-np.inf).astype(np.float64)), 1.0)
    for row, code, confidence in zip(verdict.rows.tolist(), best.tolist(), top.tolist(), strict=True):
        results[row] |= {"predicted_class": classes[code], "confidence": confidence}
    return results


def tell(verdict: Verdict, names: Sequence[str], results: Sequence[dict[str, Any]], seconds: float) -> None:
    """Log the time, the numbers of successes and failures, the reason of each failure, and the count of each class."""
    read, failed = len(verdict.rows), len(verdict.unreadable)
    speed = f"{1000 * seconds / len(names):.1f} ms per image" if names else "no image"
    log.info("predicted %d images in %.2f s (%s): %d successes, %d failures", len(names), seconds, speed, read, failed)
    counts = Counter(result["predicted_class"] for result in results if result["predicted_class"] != ERROR)
    if counts:
        log.info("classes: %s", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if failed:
        reasons = list(verdict.unreadable.values())
        log.warning("%d images cannot be read: %s", failed, sample(reasons, MAX_LISTED))
        for reason in reasons[MAX_LISTED:]:
            log.info("cannot be read: %s", reason)


def _name(image: Any, number: int) -> str:
    """Return an image's name for results: its path as passed, or its number in the call."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return os.fsdecode(path) if path else f"image {number}"
