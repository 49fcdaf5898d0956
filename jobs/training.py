"""A training run of `train-fold` or `distill`: from a network with its first weights to a model dir."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fivefold import assemble, predictions
from fivefold.contract.artifacts import locate
from fivefold.contract.files import MIB, atomic, check_space, sha256
from fivefold.contract.job import Job
from fivefold.contract.stages import CLASSES, CURVES, EXAMPLES, FOLDS, HOLDOUT, OOF, TRAIN_LOG
from fivefold.data.dataset import MEMORY_LIMIT, ImageSet
from fivefold.data.folds import ASIDE, FoldTable, read_folds
from fivefold.data.images import decode, pixels_of
from fivefold.data.store import ImageStore
from fivefold.distributed.replicas import Replicas
from fivefold.evaluation.metrics import predicted, summary
from fivefold.evaluation.plots import image_grid, spread_out, training_curves
from fivefold.inference.predictor import Runtime
from fivefold.members import evaluation_images, predict_images, save_member
from fivefold.models.classifier import Classifier
from fivefold.predictions import Predictions
from fivefold.recipe import Settings
from fivefold.settings import key_settings
from fivefold.training.loop import Best, TrainRows, ValidRows
from fivefold.training.loop import fit as fit_loop
from fivefold.training.optim import OPTIMIZER_STATES
from fivefold.training.resume import Checkpoints
from fivefold.training.trackers import Run, Tracker, close_trackers, csv_log, metric_line, open_trackers

from .outcome import Outcome

log = logging.getLogger("fivefold")
DECISIONS = ".decisions"
"""Hidden, so that it is in no digest of the run."""
HEADS = 64
"""Images by whose heads the memory of all is estimated."""
BESIDE_WEIGHTS = 4 * MIB
"""Bytes for logs, curves, events and small tables of predictions."""


def read_split(job: Job, factors: Sequence[str] = ()) -> tuple[Path, FoldTable]:
    """The path of `folds.parquet` in the folds channel, and its table; of some factors of its classes, if any are given."""
    path = locate(job, "folds", FOLDS)
    Replicas(job.place).check_same(
        sha256(path), f"its {FOLDS} is another than the first one's; give all hosts the same split"
    )
    return path, read_folds(path, locate(job, "folds", CLASSES)).of_factors(factors)


def processes(job: Job) -> dict[str, int]:
    """What `model.json` says of the processes that trained together, if they were several: their number changes bits."""
    return {} if job.place.world == 1 else {"processes": job.place.world}


def split_facts(path: Path, table: FoldTable) -> dict[str, Any]:
    """What `model.json` says of the split: its folds and digest, the model's classes, their shares, and what they are made of."""
    factored = {} if table.factors is None else {"knows": table.knows, "factors": table.factors.as_json()}
    facts = {"folds": table.num_folds, "classes": table.classes, "split": sha256(path)}
    return {**facts, "shares": [round(share, 6) for share in table.shares().tolist()], **factored}


def settled(job: Job, settings: Settings, network: nn.Module, replicas: Replicas) -> tuple[Settings, Runtime]:
    """The settings with the precision of this run, and their Runtime.

    A run that goes on keeps that of its checkpoint. The stages of a run that share its folder share one decision.
    """
    before, shared = None, None
    if settings.train.precision == "auto" and job.place.leads:
        before = (Checkpoints(job.checkpoints()).load() or {}).get(assemble.RUNTIME)
        shared = decisions_of(job)
    found = assemble.settled(settings, network, replicas, before, shared)
    return found, assemble.runtime_of(found, replicas)


def decisions_of(job: Job) -> Path | None:
    """The folder for what the stages of a run decide once: beside the step, where the split that it reads lies there too.

    None where it does not, or where this user may not write there.
    """
    run, split = job.model().absolute().parent.parent, job.channels["folds"].absolute()
    together = split in (run / "split", run / "split" / "output")
    return run / DECISIONS if together and os.access(run, os.W_OK) else None


def check_disk(job: Job, network: nn.Module, settings: Settings) -> None:
    """Raises a RetryableError before the first epoch where the weights that this stage keeps will not fit the disk.

    They are the kept ones, the unaveraged ones beside them if they are wanted, and a temporary file of one.
    """
    if not job.place.leads:
        return
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    copies = 2 + (settings.train.keep_raw and settings.train.ema_decay > 0)
    check_space(job.model(), copies * weights + BESIDE_WEIGHTS)
    # a checkpoint: weights, what the optimiser keeps of them, their average, the best ones; two, and a temporary file
    states = OPTIMIZER_STATES.get(settings.train.optimizer, 2)
    kept = copies + states + (settings.train.ema_decay > 0)
    check_space(job.checkpoints(), 3 * kept * weights)


@dataclass
class TrainingRun:
    """A network that a stage trains on rows of a split: `start_network`, `start_run`, then `fit`, `predict` and `finish`.

    `split` is the path of the `folds.parquet` of `table`, `store` holds its images, `label` is what logs call the run.
    """

    job: Job
    settings: Settings
    split: Path
    table: FoldTable
    store: ImageStore
    label: str
    network: Classifier
    runtime: Runtime
    trackers: list[Tracker] = field(default_factory=list)

    def fit(self, train: TrainRows, valid_rows: np.ndarray, patience: int, select: bool, fold: int | None) -> None:
        """Trains on `train`, validates on rows of the split (or on none), and keeps the best epoch if `select`.

        It goes on from the newest checkpoint of these settings, data and classes. Of several processes that train
        together the first alone is watched, and keeps checkpoints.
        """
        self.valid_rows = valid_rows
        self.valid_images = evaluation_images(self.store, self.table, valid_rows, self.settings)
        valid = ValidRows(self.valid_images, self.table.codes[valid_rows]) if len(valid_rows) else None
        self.loop = assemble.build_loop(
            self.label, self.network, train, valid, self.settings, self.runtime, select, patience
        )
        self.best = self._fit_watched(fold) if self.job.place.leads else fit_loop(self.loop)
        name, self.deciding = next(iter(self.best.items()))
        self.model = self.loop.contenders[name]
        self.model.load_state_dict(self.deciding.state)

    def _fit_watched(self, fold: int | None) -> dict[str, Best]:
        """The best epochs of the loop; the trackers that watch it stay open for the final scores."""
        job, chosen = self.job, self.settings.train
        name = f"{self.settings.system} {self.label}"
        shown = key_settings(self.settings, job.stage.sections)  # others say where things run, and may hold secrets
        run = Run(name, self.settings.system, chosen.project, shown, job.output())
        self.trackers = open_trackers(chosen.trackers, run)
        checkpoints = Checkpoints(
            job.checkpoints(), chosen.checkpoint_minutes, chosen.checkpoint_steps, job.remote.keep
        )
        observers = [csv_log(job.model() / TRAIN_LOG), *self.trackers]
        try:
            return fit_loop(
                replace(self.loop, observers=observers, announcers=[metric_line(fold)], checkpoints=checkpoints)
            )
        except BaseException:
            close_trackers(self.trackers, None)
            raise

    def predict(self, rows: np.ndarray, label: str) -> Predictions:
        """The model's predictions of rows of the split, with their labels, by the recipe's views."""
        validated = np.array_equal(rows, self.valid_rows)
        images = self.valid_images if validated else evaluation_images(self.store, self.table, rows, self.settings)
        return Predictions(
            ids=self.table.ids_of(rows),
            fold=self.table.fold[rows],
            system=self.settings.system,
            classes=self.table.classes,
            log_probs=predict_images(self.model, self.settings, self.runtime, images, label, link=self.loop.loss.link),
            labels=self.table.labels()[rows],
        )

    def finish(
        self, role: str, facts: Mapping[str, Any], metrics: Mapping[str, Any], oof: Predictions | None = None
    ) -> Outcome:
        """Predicts the rows that are set aside, if any, and writes the model dir and the pictures.

        `facts`: what `model.json` says beside the split, `metrics`: figures beside the scores. Of several processes
        the first alone writes.
        """
        aside = self.table.aside_rows()
        holdout = self.predict(aside, "holdout") if len(aside) else None
        if not self.job.place.leads:
            return Outcome([])
        folder = self.job.model()
        (folder / HOLDOUT).unlink(missing_ok=True)
        files, figures = [folder / TRAIN_LOG], {}
        for name, prefix, table in ((OOF, "oof", oof), (HOLDOUT, "holdout", holdout)):
            if table is None:
                continue
            files.append(predictions.write(folder / name, table))
            scores = {
                f"{prefix}_{metric}": round(value, 6)
                for metric, value in summary(table.log_probs, table.codes()).items()
            }
            words = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
            log.info("%s, %d rows that it did not train on: %s", self.label, len(table), words)
            figures |= scores
        facts = {"fold": None, **split_facts(self.split, self.table), **processes(self.job), **facts}
        files += save_member(folder, role, self.best, self.settings, self.runtime, facts)
        training_curves(folder / TRAIN_LOG, self.job.output() / CURVES)
        if oof is not None:
            self._draw_examples(oof)
        close_trackers(self.trackers, figures)
        return Outcome(files, {**metrics, **figures, **self.loop.throughput.figures()})

    def _draw_examples(self, table: Predictions) -> None:
        """Some validation rows with truth and prediction of the kept epoch: a picture, which the trackers keep too."""
        shown = spread_out(len(self.valid_rows))
        paths = self.table.paths_of(self.valid_rows[shown])
        guesses = [table.classes[code] for code in predicted(table.log_probs[shown])]
        with atomic(self.job.output() / EXAMPLES) as temporary:
            most = pixels_of(self.settings.data).max_pixels
            images = [decode(self.store.read(path), path, most) for path in paths]
            image_grid(images, list(table.labels[shown]), guesses, temporary)
        for tracker in self.trackers:
            tracker.picture("Val/examples", self.job.output() / EXAMPLES, self.deciding.epoch)


def start_network(job: Job, settings: Settings, classes: int) -> Classifier:
    """The network with its first weights; called before images are read, for they may be missing or another network's."""
    assemble.seed_everything(settings.seed)
    network = assemble.build_classifier(settings.model, classes)
    assemble.start_weights(network, settings.model, job.optional_channel("weights"))
    return network


def kept_images(settings: Settings, table: FoldTable, store: ImageStore) -> int:
    """About the bytes of images that a run keeps decoded: those it trains on, and a fold's as they are validated."""
    rows = np.flatnonzero(~np.isin(table.part, ASIDE))
    expected = 0
    if settings.train.keep_in_memory:
        pixels, digests = pixels_of(settings.data), table.sha256_of(rows)
        images = ImageSet(store, table.paths_of(rows), lambda image: image, sha256=digests, pixels=pixels)
        expected = round(images.expected_bytes(HEADS))
    validated = len(rows) // max(1, table.num_folds) * 3 * settings.model.size[0] * settings.model.size[1]
    return sum(size for size in (expected, validated) if size <= MEMORY_LIMIT)


def start_run(
    job: Job, settings: Settings, split: Path, table: FoldTable, store: ImageStore, label: str, network: Classifier
) -> TrainingRun:
    """A run of a network with its first weights, whose precision is settled, and which fits memory and disk.

    Raises a SettingsError or RetryableError if it does not fit.
    """
    settings, runtime = settled(job, settings, network, Replicas(job.place))
    images = kept_images(settings, table, store) if runtime.device.type == "cpu" else 0
    assemble.check_memory(network, settings, runtime, images)
    check_disk(job, network, settings)
    return TrainingRun(job, settings, split, table, store, label, network, runtime)
