"""`ImageClassificationAPI`: predict with a trained model in another program; an unreadable image never raises."""

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
from fivefold.data.readers.user_images import InMemoryStore
from fivefold.ensemble import EnsemblePredictor, PredictionBatch, load_ensemble
from fivefold.errors import MissingInputError
from fivefold.log import log
from fivefold.trained_model import ImageList

ERROR = "ERROR"
"""The predicted class of an image that cannot be read, with a confidence of 0."""

ImageInput = str | os.PathLike[str] | bytes | Image.Image
IMAGE_INPUT_TYPES = (str, os.PathLike, bytes, Image.Image)


class ImageClassificationAPI:
    """Predict images with the model at a path: a fold's model folder, a student's, or a folder with a whole ensemble.

    Several fold models have equal weights, unless the folder also contains their `ensemble.json`. The models stay in memory.
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
        other people choose the paths; without it, they can name any file of this machine. Raise a MissingInputError if there
        is no model or no such folder, a DataError for a damaged model, and a SettingsError for a missing device.
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
            self._predictor: EnsemblePredictor = load_ensemble(path, Path(scratch), explicit)
        log.info("%d models of %s, %d classes", len(self._predictor.models), path, len(self.classes))

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that `predict` can return, besides ERROR."""
        return self._predictor.classes

    def predict(self, images: Sequence[ImageInput] | ImageInput) -> list[dict[str, Any]]:
        """Return `[{"image_path", "predicted_class", "confidence"}]`, one per image, in the order of `images`.

        An image is a path, the bytes of an image file, or a Pillow image. An image that cannot be read gives `ERROR`
        with confidence 0.0, and the reason is logged; it does not raise.
        """
        pictures = [images] if isinstance(images, IMAGE_INPUT_TYPES) else list(images)
        start = time.perf_counter()
        keys = [image if isinstance(image, str) else f"<image {number}>" for number, image in enumerate(pictures)]
        store = InMemoryStore(dict(zip(keys, pictures, strict=True)), self._folder)
        batch = self._predictor.predict(ImageList(store, keys))
        names = [_name(image, number) for number, image in enumerate(pictures)]
        results = to_results(batch, names, self.classes)
        log_counts(batch, names, results, time.perf_counter() - start)
        return results


def to_results(batch: PredictionBatch, names: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a result for each of `names`: class and confidence in 0..1, or ERROR."""
    results = [{"image_path": name, "predicted_class": ERROR, "confidence": 0.0} for name in names]
    best = batch.log_probs.argmax(axis=1)
    top = np.minimum(np.exp(batch.log_probs.max(axis=1, initial=-np.inf).astype(np.float64)), 1.0)
    for row, code, confidence in zip(batch.rows.tolist(), best.tolist(), top.tolist(), strict=True):
        results[row] |= {"predicted_class": classes[code], "confidence": confidence}
    return results


def log_counts(batch: PredictionBatch, names: Sequence[str], results: Sequence[dict[str, Any]], seconds: float) -> None:
    """Log the time, the numbers of successes and failures, the reason of each failure, and the count of each class."""
    read, failed = len(batch.rows), len(batch.unreadable)
    speed = f"{1000 * seconds / len(names):.1f} ms per image" if names else "no image"
    log.info("predicted %d images in %.2f s (%s): %d successes, %d failures", len(names), seconds, speed, read, failed)
    counts = Counter(result["predicted_class"] for result in results)
    log.info("classes: %s", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for reason in batch.unreadable.values():
        log.warning("cannot be read: %s", reason)


def _name(image: Any, number: int) -> str:
    """Return an image's name for results: its path as passed, or its number in the call."""
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return os.fsdecode(path) if path else f"image {number}"
