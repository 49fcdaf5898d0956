"""Predict with loaded models in memory: a fold model, a student, or an ensemble with its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir, find_all, find_models
from fivefold.contract.stage_specs import ENSEMBLE
from fivefold.data.image_io import DecodeOptions, map_in_threads
from fivefold.data.pipeline.dataset import Batch, ImageDataset
from fivefold.data.split.fold_table import FoldTable
from fivefold.errors import DataError
from fivefold.inference.ensemble_spec import EnsembleSpec, find_ensemble
from fivefold.predictions import reorder_classes
from fivefold.progress import track
from fivefold.trained_model import ImageList, TrainedModel, load_model

PreparedImage = dict[str, Batch]
"""A preprocessed image, by the preprocessing key of the models."""
CHUNK_IMAGES = 32
"""Images that are predicted together, while threads prepare the next ones."""


@dataclass(frozen=True)
class PredictionBatch:
    """`rows` [R] of readable images, ascending, their `log_probs` float32 [R, C], and the reason of each `unreadable` row."""

    rows: np.ndarray
    log_probs: np.ndarray
    unreadable: Mapping[int, str]


@dataclass(frozen=True)
class EnsemblePredictor:
    """An ensemble with its loaded `models`, in the same order."""

    ensemble: EnsembleSpec
    models: Sequence[TrainedModel]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.ensemble.classes

    def predict(self, files: ImageList, label: str = "") -> PredictionBatch:
        """Return the blended predictions of all readable images; show a progress bar if `label` is not empty.

        Models share decoded images and transformed images. An image that cannot be read does not raise.
        """
        chunks, total = self._prepare_chunks(files), -(-len(files.paths) // CHUNK_IMAGES)
        rows, log_probs, unreadable = [], [np.empty((0, len(self.classes)), np.float32)], {}
        for chunk in track(chunks, total, label) if label else chunks:
            unreadable |= {row: image for row, image in chunk.items() if isinstance(image, str)}
            images = {row: image for row, image in chunk.items() if not isinstance(image, str)}
            rows += images
            if images:
                log_probs.append(self.predict_prepared(list(images.values())))
        return PredictionBatch(np.array(rows, np.int64), np.concatenate(log_probs), unreadable)

    @property
    def decode_options(self) -> list[DecodeOptions]:
        """The different decoding options of the models; usually one."""
        return list(dict.fromkeys(model.decode_options for model in self.models))

    def decode(self, content: bytes, name: str, **bounds: Any) -> dict[DecodeOptions, np.ndarray]:
        """Decode an image file to uint8 [H, W, 3] for each of `decode_options`; thread-safe. `bounds` and DataError as in `image_io.decode`."""
        return {options: options.decode(content, name, **bounds) for options in self.decode_options}

    def prepare(self, decoded: Mapping[DecodeOptions, np.ndarray]) -> PreparedImage:
        """Preprocess the result of `decode` once per preprocessing key; thread-safe."""
        by_key = {model.preprocess_key: model for model in self.models}
        return {key: model.prepare(decoded[model.decode_options]) for key, model in by_key.items()}

    def predict_prepared(self, images: Sequence[PreparedImage]) -> np.ndarray:
        """Return log p float32 [N, C] of N prepared images.

        The other images of the batch change a row only by the rounding of the networks' precision.
        """
        log_probs = []
        for model in self.models:
            predicted = model.predict_prepared([image[model.preprocess_key] for image in images])
            log_probs.append(reorder_classes(predicted, model.source.info["classes"], self.classes))
        return self.ensemble.blend(log_probs)

    def _prepare_chunks(self, files: ImageList) -> Iterator[dict[int, PreparedImage | str]]:
        """Yield chunks of rows, each preprocessed or with the reason why it cannot be read; threads prepare the next rows."""
        sets = [
            ImageDataset(files.store, files.paths, lambda image: image, sha256=files.sha256, decode_options=options)
            for options in self.decode_options
        ]

        def prepare(row: int) -> PreparedImage | str:
            try:
                return self.prepare({images.decode_options: images.image(row) for images in sets})
            except DataError as error:
                return str(error)

        prepared = enumerate(map_in_threads(prepare, range(len(files.paths))))
        while chunk := dict(islice(prepared, CHUNK_IMAGES)):
            yield chunk


def load_ensemble(folder: Path, scratch: Path, explicit: Mapping[str, Any]) -> EnsemblePredictor:
    """Load the ensemble of the models below a folder, as `find_ensemble` does; tarballs are unpacked to `scratch`.

    `explicit`: keys of `[predict]` that override the models' settings.
    """
    ensemble = find_ensemble(find_models(folder, scratch), find_all(folder, scratch, ENSEMBLE))
    if "rank" in (ensemble.within, ensemble.between):
        raise DataError(
            f"{ENSEMBLE} blends by rank, which is not defined for a single image; use another blend, or the model of one fold"
        )
    return EnsemblePredictor(ensemble, [load_model(model, explicit) for model in ensemble.models])


def row_roles(models: Sequence[ModelDir], table: FoldTable) -> np.ndarray:
    """Return the role of each row of the split for these models together, str [N].

    `train`: at least one model trained on the row. `valid`: the row only selected a best epoch. `test`: no model used it.
    """
    part = np.full(len(table), "test", dtype="U5")
    trained = np.zeros(len(table), bool)
    for model in models:
        fold = model.info["fold"]
        part[table.valid_rows(fold) if fold is not None else table.part == "valid"] = "valid"
        if model.info.get("selected_on") == "holdout":
            part[table.held_out_rows()] = "valid"
        trained[table.train_rows(fold) if fold is not None else table.part == "train"] = True
    part[trained] = "train"
    return part
