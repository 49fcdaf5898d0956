"""A training run of `train-fold` or `distill`: from a network with initial weights to a model directory."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fivefold import build, predictions
from fivefold.config.loading import hashed_settings
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import find_one
from fivefold.contract.files import MIB, atomic, check_space, sha256
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import CLASSES, CURVES, EXAMPLES, FOLDS, HOLDOUT, OOF, TRAIN_LOG
from fivefold.data.image_io import decode, decode_options
from fivefold.data.pipeline.dataset import MEMORY_LIMIT, ImageDataset
from fivefold.data.readers.stores import ImageStore
from fivefold.data.split.fold_table import HELD_OUT_PARTS, FoldTable, read_folds
from fivefold.distributed.process_group import ProcessGroup
from fivefold.evaluation.metrics import compute_metrics, predicted_classes
from fivefold.evaluation.plots import evenly_spaced, plot_image_grid, plot_training_curves
from fivefold.inference.predictor import Runtime, log_mean
from fivefold.log import log
from fivefold.models.classifier import Classifier
from fivefold.predictions import Predictions
from fivefold.stages.linear_probe import LinearProbe
from fivefold.system import DEADLINE
from fivefold.trained_model import evaluation_images, predict_images, save_model
from fivefold.training.checkpoints import Checkpoints
from fivefold.training.loggers import Run, Tracker, close_trackers, csv_logger, open_trackers
from fivefold.training.optim import OPTIMIZER_STATES
from fivefold.training.trainer import BestCheckpoint, Observer, TrainData, Trainer, ValidData
from fivefold.training.trainer import fit as fit_loop

PROBE_CACHE_DIR = ".decisions"
"""A hidden name, so that no digest of the run includes it."""
SAMPLED_HEADERS = 64
"""Number of image headers that are read to estimate the memory of all images."""
EXTRA_BYTES = 4 * MIB
"""Disk space for logs, curves, events and small tables of predictions."""


def read_split(job: StageContext, factors: Sequence[str] = ()) -> tuple[Path, FoldTable]:
    """Return the path of `folds.parquet` in the folds channel, and its table, reduced to `factors` if there are any."""
    path = find_one(job, "folds", FOLDS)
    ProcessGroup(job.rank).check_same(
        sha256(path), f"its {FOLDS} differs from that of rank 0; give all hosts the same split"
    )
    return path, read_folds(path, find_one(job, "folds", CLASSES)).project_factors(factors)


def world_size(job: StageContext) -> dict[str, int]:
    """Return the world size for `model.json` if it is above 1: it changes the bits of the result."""
    return {} if job.rank.world_size == 1 else {"processes": job.rank.world_size}


def split_facts(path: Path, table: FoldTable) -> dict[str, Any]:
    """Return the split's entries of `model.json`: folds, digest, the model's classes, their shares and factors."""
    factored = {} if table.factors is None else {"knows": table.known_factors, "factors": table.factors.to_json()}
    facts = {"folds": table.num_folds, "classes": table.classes, "split": sha256(path)}
    return {**facts, "shares": [round(share, 6) for share in table.class_fractions().tolist()], **factored}


def resolve_runtime(
    job: StageContext, settings: Settings, network: nn.Module, process_group: ProcessGroup
) -> tuple[Settings, Runtime]:
    """Return the settings with the resolved precision, and their Runtime.

    A resumed run keeps the precision of its checkpoint. The stages of a run that share its folder share one decision.
    """
    earlier, shared = None, None
    if settings.train.precision == "auto" and job.rank.is_main:
        earlier = (Checkpoints(job.checkpoints()).load() or {}).get(build.RUNTIME)
        shared = probe_cache_dir(job)
    resolved = build.resolve_precision(settings, network, process_group, earlier, shared)
    return resolved, build.make_training_runtime(resolved, process_group)


def probe_cache_dir(job: StageContext) -> Path | None:
    """Return the folder for decisions that a run's stages share: in the run's folder, which has the split and this step.

    None if the split lies elsewhere, or if this user cannot write to the folder.
    """
    split = job.channels["folds"].absolute()
    folders = job.record_dir().absolute().parents
    run = next((run for run in folders if split in (run / "split", run / "split" / "output")), None)
    return run / PROBE_CACHE_DIR if run is not None and os.access(run, os.W_OK) else None


def check_disk(job: StageContext, network: nn.Module, settings: Settings) -> None:
    """Raise a RetryableError before the first epoch if the weights of this stage do not fit the disk.

    These are the saved weights, the raw weights if they are saved too, and one temporary file.
    """
    if not job.rank.is_main:
        return
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    copies = 2 + (settings.train.save_raw_weights and settings.train.ema_decay > 0)
    check_space(job.model(), copies * weights + EXTRA_BYTES)
    # A checkpoint has weights, optimiser states, the EMA and the best weights. There are two, and a temporary file.
    states = OPTIMIZER_STATES.get(settings.train.optimizer, 2)
    tensors = copies + states + (settings.train.ema_decay > 0)
    check_space(job.checkpoints(), 3 * tensors * weights)


@dataclass
class TrainingRun:
    """A network in training on rows of a split: call `start_network`, `start_run`, then `fit`, `predict` and `finish`.

    `split` is the path of the `folds.parquet` of `table`, `store` has its images, `label` is the name of the run in logs.
    """

    job: StageContext
    settings: Settings
    split: Path
    table: FoldTable
    store: ImageStore
    label: str
    network: Classifier
    runtime: Runtime
    probe: LinearProbe | None = None
    trackers: list[Tracker] = field(default_factory=list)

    def fit(self, train: TrainData, valid_rows: np.ndarray, patience: int, select: bool, logger: Observer) -> None:
        """Train on `train`, validate on rows of the split (or none), and keep the best epoch if `select`.

        Resume from the newest checkpoint of these settings, data and classes. In a process group only rank 0 has
        trackers and a `logger` of epochs, and writes checkpoints.
        """
        self.valid_rows = valid_rows
        self.valid_images = evaluation_images(self.store, self.table, valid_rows, self.settings)
        if self.probe is not None:
            self.probe.fit(train)
        valid = ValidData(self.valid_images, self.table.codes[valid_rows]) if len(valid_rows) else None
        self.trainer = build.build_trainer(
            self.label,
            self.network,
            train,
            valid,
            self.settings,
            self.runtime,
            select,
            patience,
            float(os.environ.get(DEADLINE) or math.inf),
        )
        self.best = self._fit_tracked(logger) if self.job.rank.is_main else self._fit(self.trainer)
        name, self.deciding = next(iter(self.best.items()))
        self.model = self.trainer.scored_models[name]
        self.model.load_state_dict(self.deciding.state)

    def _fit(self, trainer: Trainer) -> dict[str, BestCheckpoint]:
        """Train, or only score the head of a linear probe; return the kept epochs."""
        if self.settings.train.method != "linear_probe":
            return fit_loop(trainer)
        return self.probe.run(trainer, self._images(self.valid_rows) if len(self.valid_rows) else None)

    def _images(self, rows: np.ndarray) -> ImageDataset:
        return build.split_dataset(self.store, self.table, rows, self.settings, training=False)

    def _fit_tracked(self, logger: Observer) -> dict[str, BestCheckpoint]:
        """Run the loop with trackers and checkpoints; return its best epochs. The trackers stay open for the final scores."""
        job, chosen = self.job, self.settings.train
        name = f"{self.settings.system} {self.label}"
        shown = hashed_settings(self.settings, job.stage.sections)  # the platform's settings may hold secrets
        run = Run(name, self.settings.system, chosen.logger_project, shown, job.output())
        self.trackers = open_trackers(chosen.loggers, run)
        upload = job.remote.checkpoints.upload_async if job.remote.checkpoints else None
        checkpoints = Checkpoints(job.checkpoints(), chosen.checkpoint_minutes, chosen.checkpoint_steps, upload)
        observers = [csv_logger(job.model() / TRAIN_LOG), *self.trackers]
        try:
            trainer = replace(self.trainer, observers=observers, live_observers=[logger], checkpoints=checkpoints)
            return self._fit(trainer)
        except BaseException:
            close_trackers(self.trackers, None)
            raise

    def predict(self, rows: np.ndarray, label: str) -> Predictions:
        """Predict rows of the split with the recipe's views; return the predictions with labels."""
        if self.settings.train.method == "linear_probe":
            log_probs = self.probe.predict(self._images(rows))
        else:
            validated = np.array_equal(rows, self.valid_rows)
            images = self.valid_images if validated else evaluation_images(self.store, self.table, rows, self.settings)
            of_views = partial(log_mean, link=self.trainer.loss.link)
            log_probs = predict_images(self.model, self.settings, self.runtime, images, label, reduce_views=of_views)
        return Predictions(
            ids=self.table.ids_of(rows),
            fold=self.table.fold[rows],
            system=self.settings.system,
            classes=self.table.classes,
            log_probs=log_probs,
            labels=self.table.labels()[rows],
        )

    def finish(
        self, role: str, facts: Mapping[str, Any], metrics: Mapping[str, Any], oof: Predictions | None = None
    ) -> StageResult:
        """Predict the holdout rows, if any, and write the model directory and the plots.

        `facts`: the entries of `model.json` besides the split. `metrics`: figures besides the scores. In a process
        group only rank 0 writes.
        """
        aside = self.table.held_out_rows()
        holdout = self.predict(aside, "holdout") if len(aside) else None
        if not self.job.rank.is_main:
            return StageResult([])
        folder = self.job.model()
        (folder / HOLDOUT).unlink(missing_ok=True)
        files, figures = [folder / TRAIN_LOG], {}
        for name, prefix, table in ((OOF, "oof", oof), (HOLDOUT, "holdout", holdout)):
            if table is None:
                continue
            files.append(predictions.write(folder / name, table))
            scores = {
                f"{prefix}_{metric}": round(value, 6)
                for metric, value in compute_metrics(table.log_probs, table.codes()).items()
            }
            words = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
            log.info("%s, %d rows not trained on: %s", self.label, len(table), words)
            figures |= scores
        start = {"initial_weights": self.network.initial_weights} if self.network.initial_weights else {}
        facts = {"fold": None, **split_facts(self.split, self.table), **world_size(self.job), **start, **facts}
        files += save_model(folder, role, self.best, self.settings, self.runtime, facts)
        plot_training_curves({self.label: folder / TRAIN_LOG}, self.job.output() / CURVES)
        if oof is not None:
            self._draw_examples(oof)
        close_trackers(self.trackers, figures)
        return StageResult(files, {**metrics, **figures, **self.trainer.speed_metrics(), **start})

    def _draw_examples(self, table: Predictions) -> None:
        """Plot some validation rows with truth and prediction of the kept epoch; send the plot to the trackers too."""
        shown = evenly_spaced(len(self.valid_rows))
        paths = self.table.paths_of(self.valid_rows[shown])
        guesses = [table.classes[code] for code in predicted_classes(table.log_probs[shown])]
        with atomic(self.job.output() / EXAMPLES) as temporary:
            limit = decode_options(self.settings.data).max_pixels
            images = [decode(self.store.read(path), path, limit) for path in paths]
            plot_image_grid(images, list(table.labels[shown]), guesses, temporary)
        for tracker in self.trackers:
            tracker.log_image("Val/examples", self.job.output() / EXAMPLES, self.deciding.epoch)


def start_network(job: StageContext, settings: Settings, classes: int) -> Classifier:
    """Build the network with its initial weights, before images are read, since the weights may be missing or not match."""
    build.seed_everything(settings.seed)
    network = build.build_classifier(settings.model, classes)
    build.load_initial_weights(network, settings, job.optional_channel("weights"))
    return network


def kept_image_bytes(settings: Settings, table: FoldTable, store: ImageStore) -> int:
    """Estimate the bytes of decoded images that a run keeps: its training images, and the validation images of a fold."""
    rows = np.flatnonzero(~np.isin(table.part, HELD_OUT_PARTS))
    expected = 0
    if settings.train.cache_in_memory:
        options, digests = decode_options(settings.data), table.sha256_of(rows)
        images = ImageDataset(store, table.paths_of(rows), lambda image: image, sha256=digests, decode_options=options)
        expected = round(images.expected_bytes(SAMPLED_HEADERS))
    validated = len(rows) // max(1, table.num_folds) * 3 * settings.model.size[0] * settings.model.size[1]
    return sum(size for size in (expected, validated) if size <= MEMORY_LIMIT)


def start_run(
    job: StageContext,
    settings: Settings,
    split: Path,
    table: FoldTable,
    store: ImageStore,
    label: str,
    network: Classifier,
) -> TrainingRun:
    """Return the training run of a network with initial weights, with resolved precision.

    Raise a SettingsError or RetryableError if the run does not fit memory and disk.
    """
    settings, runtime = resolve_runtime(job, settings, network, ProcessGroup(job.rank))
    images = kept_image_bytes(settings, table, store) if runtime.device.type == "cpu" else 0
    method = settings.train.method
    if method != "linear_probe":
        build.check_memory(network, settings, runtime, images)
    check_disk(job, network, settings)
    probe = None if method == "fine_tune" else LinearProbe(runtime.to_device(network), settings, runtime)
    return TrainingRun(job, settings, split, table, store, label, network, runtime, probe)
