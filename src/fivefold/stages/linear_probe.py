"""The linear probe of a training run: a linear head on the features of the frozen backbone.

The features of an image are those of the evaluation transform, for each of the recipe's views. They are cached beside the
image cache (`feature_cache.py`), so folds, seeds and later runs compute them once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fivefold import build
from fivefold.config.schema import Settings
from fivefold.data.image_io import decode_options
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.pipeline.feature_cache import get_or_compute, load_or_fit, name_of
from fivefold.data.pipeline.image_cache import DECODER
from fivefold.inference.predictor import Runtime, log_mean, predict_all
from fivefold.log import log
from fivefold.models.classifier import Backbone, Classifier
from fivefold.models.weights import digest_weights
from fivefold.stages.image_source import cache_folder
from fivefold.training.linear_probe import fit_linear
from fivefold.training.losses import balanced_weights
from fivefold.training.trainer import BestCheckpoint, TrainData, Trainer, score_logits

FIT_VERSION = 1
"""Raise it if `fit_linear` changes, so that cached heads are fitted again."""


@dataclass(frozen=True)
class LinearProbe:
    """A network whose head is fitted to frozen features, and predicts from them.

    `known`: the features [N, V, F] of images by their paths, so that this process computes them once without a cache too.
    """

    network: Classifier
    settings: Settings
    runtime: Runtime
    known: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False)

    def features(self, images: ImageDataset) -> Tensor:
        """Return the features float32 [N, V, F] of N images on the device, in V views, with the image statistics of the model."""
        settings, runtime = self.settings, self.runtime
        size, views = build.predict_batch_size(settings), settings.predict.tta
        workers = build.choose_workers(settings.train.num_workers, runtime, build.largest_batch_bytes(settings, False))
        network = Backbone(self.network)

        def compute(rows: Sequence[int]) -> np.ndarray:
            # Every batch is full, so that the features of an image do not depend on the number of images.
            padded = [*rows, *[rows[-1]] * (-len(rows) % size)]
            stack = partial(torch.stack, dim=1)
            return predict_all(network, images, size, workers, runtime, views, "features", padded, stack)[: len(rows)]

        paths = tuple(images.paths)
        if paths not in self.known:
            self.known[paths] = torch.from_numpy(get_or_compute(self._cache(), images.sha256, compute))
        features = self.known[paths].to(runtime.device)
        if self.network.meta is None:
            return features
        stats = self.network.meta(torch.from_numpy(images.compute_image_stats()).to(runtime.device))
        return torch.cat([features, stats[:, None].expand(-1, features.shape[1], -1)], dim=2)

    def fit(self, train: TrainData) -> None:
        """Fit the head to the training rows: to their labels, or to the mix of labels and teacher of a distillation.

        The teacher's probabilities are not softened: a head that learns softened ones would predict them.
        """
        if not self.network.initial_weights:
            log.warning("the linear head is fitted to the features of a backbone with random weights")
        if self.network.meta is not None:
            self.network.meta.fit(torch.from_numpy(train.images.compute_image_stats()))
        targets = train.targets
        if train.teacher is not None:
            alpha, probs = train.teacher.alpha, torch.from_numpy(np.exp(train.teacher.log_probs)).to(targets)
            targets = (1 - alpha) * targets + alpha * probs
        if self.settings.train.class_weights == "balanced":
            targets = targets * balanced_weights(targets)
        features = self.features(self._evaluation(train.images))
        groups = np.zeros(0, np.int64) if train.groups is None else train.groups
        # The number of threads changes the last bits of a fit.
        numbers = np.array([FIT_VERSION, self.settings.seed, torch.get_num_threads()])
        inputs = [features.cpu().numpy(), targets.cpu().numpy(), groups, numbers]

        def compute() -> dict[str, np.ndarray]:
            fit = fit_linear(features, targets, train.groups, self.settings.seed)
            return {"weight": fit.weight.cpu().numpy(), "bias": fit.bias.cpu().numpy()}

        head = load_or_fit(self._cache(), inputs, compute)
        *_, linear = self.network.head.modules()
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(head["weight"]))
            linear.bias.copy_(torch.from_numpy(head["bias"]))

    @torch.inference_mode()
    def predict(self, images: ImageDataset) -> np.ndarray:
        """Return log-probabilities float32 [N, C], the mean over the views."""
        features = self.features(images)
        with self.runtime.autocast():
            logits = [self.network.head.eval()(view).float() for view in features.unbind(dim=1)]
        return log_mean(logits).cpu().numpy()

    def run(self, trainer: Trainer, valid: ImageDataset | None) -> dict[str, BestCheckpoint]:
        """Score the fitted head in place of the epochs of `trainer`; return its weights as its only epoch."""
        train = trainer.train
        codes = torch.where(train.targets.sum(dim=1) > 0, train.targets.argmax(dim=1), -1)
        scores = self._scores(train.images, codes.cpu().numpy(), trainer)
        row = {"epoch": 1, "train_loss": scores["loss"], "train_acc": scores["acc"], "lr": 0.0}
        figures = {} if valid is None else self._scores(valid, trainer.valid.codes, trainer)
        row |= {f"val_{name}": value for name, value in figures.items()}
        for observe in (*trainer.observers, *trainer.live_observers):
            observe(row)
        best = BestCheckpoint(trainer.monitor)
        best.store(1, figures, next(iter(trainer.scored_models.values())))
        return {next(iter(trainer.scored_models)): best}

    def _scores(self, images: ImageDataset, codes: np.ndarray, trainer: Trainer) -> dict[str, float]:
        """Return the scores of the images with a class index in `codes`; -1 stands for no label."""
        log_probs = torch.from_numpy(self.predict(self._evaluation(images)))
        return score_logits(log_probs[codes >= 0], codes[codes >= 0], trainer.loss)

    def _evaluation(self, images: ImageDataset) -> ImageDataset:
        """Return the images with the evaluation transform. They share the decoded images that are kept in memory."""
        other = replace(images, transform=build.build_eval_transforms(self.settings))
        other.kept, other.measured = images.kept, images.measured
        return other

    def _cache(self) -> Path | None:
        """Return the folder of features of these weights, preprocessing, views and precision; None without a cache, or with several ranks."""
        folder = cache_folder(self.settings)
        if folder is None or not self.runtime.process_group.is_single:
            return None
        model, data = self.settings.model, decode_options(self.settings.data)
        facts = {
            "weights": digest_weights(self.network.backbone),
            "backbone": [model.backbone, model.backbone_kwargs],
            "images": [model.size, model.mean, model.std, model.interpolation, self.settings.augment.eval],
            "decoding": [DECODER, data.resize_shorter_side, data.scaled],
            "views": self.settings.predict.tta,
            "runtime": [build.precision_name(self.runtime), self.runtime.device.type, torch.__version__],
        }
        return folder / name_of(facts)
