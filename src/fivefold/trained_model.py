"""Save, load and run a trained model (a model folder)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.build import (
    build_classifier,
    build_eval_transforms,
    choose_workers,
    image_dataset,
    largest_batch_bytes,
    make_prediction_runtime,
    precision_name,
    predict_batch_size,
    split_dataset,
)
from fivefold.config.loading import hashed_settings, validate
from fivefold.config.schema import PLATFORM_SECTIONS, Settings, Spec
from fivefold.contract.artifacts import ModelDir
from fivefold.contract.files import atomic, write_json
from fivefold.contract.stage_specs import MODEL, RAW_WEIGHTS, WEIGHTS
from fivefold.data.image_io import DecodeOptions, decode_options
from fivefold.data.pipeline.dataset import Batch, concat_batches, image_stats
from fivefold.data.pipeline.eval_cache import EvalImageCache, memory_limit
from fivefold.data.readers.stores import ImageStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.transforms.registry import Transform
from fivefold.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from fivefold.errors import DataError, SettingsError
from fivefold.inference.predictor import Runtime, ViewReducer, log_mean, predict, predict_all
from fivefold.lookup import choose
from fivefold.models.classifier import LINKS, Backbone
from fivefold.models.weights import digest_weights, load_strict, save_weights
from fivefold.training.losses import build_loss
from fivefold.training.trainer import BestCheckpoint

FORMAT = 1
MACHINE_SETTINGS = dict.fromkeys(("run", "runs", "stage", "time", "serve", *PLATFORM_SECTIONS), True) | {
    "data": {"cache", "cache_gib"}
}
"""Settings of the place of a run, which `model.json` does not contain: a model does not depend on where it was trained."""
TRAINING_SECTIONS = ("data.resize_shorter_side", "data.jpeg_draft", "model", "augment", "train")


@dataclass(frozen=True)
class TrainedModel:
    """A loaded model, ready to predict: model folder, settings, network, runtime, and the link of its loss."""

    source: ModelDir
    settings: Settings
    network: nn.Module
    runtime: Runtime
    link: str = "softmax"

    def predict_cached(
        self, shared: "SharedEvalImages", label: str, views: Sequence[Spec] = (), rows: Sequence[int] | None = None
    ) -> np.ndarray:
        """Predict shared images or some `rows` of them, as `predict_images`; they are prepared once for all models.

        Linear probes of one backbone also share the features of all images.
        """
        images = shared.for_model(self)
        if self.settings.train.method == "linear_probe" and rows is None and self.network.meta is None:
            return self._predict_features(shared, images, label, views or self.settings.predict.tta)
        of_views = partial(log_mean, link=self.link)
        return predict_images(self.network, self.settings, self.runtime, images, label, views, rows, of_views)

    def _predict_features(
        self, shared: "SharedEvalImages", images: EvalImageCache, label: str, views: Sequence[Spec]
    ) -> np.ndarray:
        """Predict all shared images from their features in each view, which an earlier model may have computed."""
        digest = digest_weights(self.network.backbone)
        key = repr((digest, self.preprocess_key, views, precision_name(self.runtime), self.runtime.device))
        if key not in shared.features:
            network, stack = Backbone(self.network), partial(torch.stack, dim=1)
            features = predict_images(network, self.settings, self.runtime, images, label, views, None, stack)
            shared.features[key] = torch.from_numpy(features).to(self.runtime.device)
        with torch.inference_mode(), self.runtime.autocast():
            logits = [self.network.head(view).float() for view in shared.features[key].unbind(dim=1)]
        return log_mean(logits, self.link).cpu().numpy()

    @property
    def preprocess_key(self) -> str:
        """Preprocessing key: models with equal keys can share preprocessed images."""
        model = self.settings.model
        preparation = (self.settings.augment.eval, model.size, model.interpolation, model.image_stats)
        return repr((self.decode_options, *preparation))

    @property
    def decode_options(self) -> DecodeOptions:
        """The decoding options of the model."""
        return decode_options(self.settings.data)

    @cached_property
    def _transform(self) -> Transform:
        return build_eval_transforms(self.settings)

    def prepare(self, pixels: np.ndarray) -> Batch:
        """Preprocess a decoded image uint8 [H, W, 3] to a batch of one; thread-safe."""
        pixels, features = self.decode_options.resize(pixels), self.settings.model.image_stats
        meta = torch.from_numpy(image_stats(pixels, features)[None]) if features else None
        image = self._transform(torch.from_numpy(pixels).permute(2, 0, 1))
        return Batch(image[None], torch.zeros(1, dtype=torch.int64), meta)

    def predict_prepared(self, images: Sequence[Batch]) -> np.ndarray:
        """Return log-probabilities float32 [N, C] of N prepared images, with the recipe's views and batch size."""
        size = predict_batch_size(self.settings)
        batches = [concat_batches(images[start : start + size]) for start in range(0, len(images), size)]
        return predict(
            self.network, batches, self.runtime, self.settings.predict.tta, partial(log_mean, link=self.link)
        )


@dataclass(frozen=True)
class ImageList:
    """Images: their store and paths, and their digests if they must be verified."""

    store: ImageStore
    paths: Sequence[str]
    sha256: Sequence[str | None] | None = None


@dataclass
class SharedEvalImages:
    """Evaluation images, decoded and transformed once for all models with the same preprocessing key, and for all views.

    They stay in memory up to a limit that all keys share, then in files of the folder `scratch`. `use_placeholders`: as in
    `EvalImageCache`.
    """

    files: ImageList
    scratch: Path | None = None
    use_placeholders: bool = False
    caches: dict[str, EvalImageCache] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    """Features [N, V, F] of N images in V views, by backbone, preprocessing and views."""

    @property
    def unreadable(self) -> list[int]:
        """Return the rows that could not be read so far, ascending; they have placeholders."""
        return sorted({row for images in self.caches.values() for row in images.unreadable})

    def for_model(self, model: TrainedModel) -> EvalImageCache:
        """Return the images preprocessed for `model`; preprocessing runs during prediction."""
        key, files = model.preprocess_key, self.files
        if key not in self.caches:
            remaining = memory_limit() - sum(other.memory_bytes for other in self.caches.values())
            images = image_dataset(files.store, files.paths, files.sha256, model.settings, training=False)
            self.caches[key] = EvalImageCache(images, self.scratch, remaining, self.use_placeholders)
        return self.caches[key]


def evaluation_images(store: ImageStore, table: FoldTable, rows: np.ndarray, settings: Settings) -> EvalImageCache:
    """Return rows of the split as evaluation images, preprocessed once for all validations and views if they fit in memory."""
    return EvalImageCache(split_dataset(store, table, rows, settings, training=False))


def predict_images(
    network: nn.Module,
    settings: Settings,
    runtime: Runtime,
    images: EvalImageCache,
    label: str,
    views: Sequence[Spec] = (),
    rows: Sequence[int] | None = None,
    reduce_views: ViewReducer = log_mean,
) -> np.ndarray:
    """Return log-probabilities float32 [N, C] of all images or of some `rows`, with `views` or else the recipe's views.

    Show a progress bar if `label` is not empty. `reduce_views` combines the views' logits, by the link of the training loss.
    """
    size, views = predict_batch_size(settings), views or settings.predict.tta
    workers = choose_workers(settings.train.num_workers, runtime, largest_batch_bytes(settings, training=False))
    return predict_all(network, images, size, workers, runtime, views, label, rows, reduce_views)


def load_model(
    source: ModelDir, explicit: Mapping[str, Any], weights: str = WEIGHTS, process_group: ProcessGroup = SINGLE_PROCESS
) -> TrainedModel:
    """Load the model of a folder as its `model.json` describes it; `explicit` keys of `[predict]` override its recipe's.

    `weights`: file name of the weights in the folder. `process_group`: the ranks that share the rows of a prediction. Raise a
    DataError if the folder does not contain a valid model.
    """
    try:
        settings, link = validate(source.info["settings"], {}), source.info["link"]
        choose(LINKS, "link", link)
    except (SettingsError, KeyError) as error:
        hint = "if another version of Fivefold wrote it, use that version, or train again"
        raise DataError(f"{source.path}: {MODEL} does not describe a valid model ({hint}): {error}") from error
    settings = settings.model_copy(update={"predict": settings.predict.model_copy(update=dict(explicit))})
    network = build_classifier(settings.model, len(source.info["classes"]))
    load_strict(network, source.path / weights)
    runtime = make_prediction_runtime(settings, source.info["precision"], explicit.get("device", "auto"), process_group)
    return TrainedModel(source, settings, runtime.to_device(network).eval(), runtime, link)


def save_model(
    folder: Path,
    role: str,
    best: Mapping[str, BestCheckpoint],
    settings: Settings,
    runtime: Runtime,
    facts: Mapping[str, Any],
) -> list[Path]:
    """Write the weights that predict, the raw weights if there are any, and `model.json`; return the written files.

    `best`: the kept epoch of each contender, the first of which predicts. `facts`: further entries of `model.json`.
    """
    written = []
    (folder / RAW_WEIGHTS).unlink(missing_ok=True)
    for name, contender in zip((WEIGHTS, RAW_WEIGHTS), best.values(), strict=False):
        with atomic(folder / name) as temporary:
            save_weights(temporary, contender.state)
        written.append(folder / name)
    deciding = next(iter(best.values()))
    write_json(
        folder / MODEL,
        {
            "format": FORMAT,
            "role": role,
            "system": settings.system,
            "seed": settings.seed,
            **facts,
            "best": {"epoch": deciding.epoch, **deciding.scores},
            "precision": precision_name(runtime),
            "device": runtime.device.type,
            "link": build_loss(settings.train.loss).link,
            "training": hashed_settings(settings, TRAINING_SECTIONS) | {"train.precision": precision_name(runtime)},
            "settings": json.loads(settings.model_dump_json(exclude=MACHINE_SETTINGS)),
        },
    )
    return [*written, folder / MODEL]
