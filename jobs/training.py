"""What `train-fold` and `distill` share around their training runs."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fivefold import assemble
from fivefold.contract.artifacts import locate
from fivefold.contract.files import MIB, atomic, check_space, sha256
from fivefold.contract.job import Job
from fivefold.contract.stages import CLASSES, CURVES, EXAMPLES, FOLDS, HOLDOUT, TRAIN_LOG
from fivefold.data.folds import FoldTable, read_folds
from fivefold.data.images import decode
from fivefold.data.prepared import Prepared
from fivefold.data.store import ImageStore
from fivefold.distributed.replicas import Replicas
from fivefold.evaluation.examples import image_grid, spread_out
from fivefold.evaluation.metrics import predicted, summary
from fivefold.evaluation.plots import training_curves
from fivefold.inference.predictor import Runtime
from fivefold.inference.tables import save_predictions
from fivefold.members import evaluation_images, predict_images
from fivefold.predictions import Predictions
from fivefold.recipe import Settings
from fivefold.settings import flatten
from fivefold.training.loop import Best, Loop
from fivefold.training.loop import fit as fit_loop
from fivefold.training.optim import OPTIMIZER_STATES
from fivefold.training.resume import Checkpoints
from fivefold.training.trackers import Run, Tracker, close_trackers, csv_log, metric_line, open_trackers

log = logging.getLogger("fivefold")
DECISIONS = ".decisions"
"""Hidden, so that it is in no digest of the run."""
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
    """What `model.json` says of the split: its folds and digest, the model's classes, and what classes are made of."""
    factored = {} if table.factors is None else {"knows": table.knows, "factors": table.factors.as_json()}
    return {"folds": table.num_folds, "classes": table.classes, "split": sha256(path), **factored}


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


def fit(loop: Loop, job: Job, settings: Settings, fold: int | None) -> tuple[dict[str, Best], list[Tracker]]:
    """The loop's best epochs, and the trackers that watched it, still open for the final scores.

    It goes on from the newest checkpoint of these settings, data and classes. Of several processes that train
    together the first alone is watched, and keeps checkpoints.
    """
    if not job.place.leads:
        return fit_loop(loop), []
    name, project = f"{settings.system} {loop.label}", settings.train.project
    run = Run(name, settings.system, project, flatten(settings), job.output())
    trackers = open_trackers(settings.train.trackers, run)
    loop = replace(
        loop,
        observers=[csv_log(job.model() / TRAIN_LOG), *trackers],
        announcers=[metric_line(fold)],
        checkpoints=Checkpoints(
            job.checkpoints(), settings.train.checkpoint_minutes, settings.train.checkpoint_steps, job.remote.keep
        ),
    )
    try:
        return fit_loop(loop), trackers
    except BaseException:
        close_trackers(trackers, None)
        raise


def load_best(loop: Loop, best: Mapping[str, Best]) -> nn.Module:
    """The deciding contender with the weights of its kept epoch."""
    name = next(iter(best))
    model = loop.contenders[name]
    model.load_state_dict(best[name].state)
    return model


def predict_rows(
    model: nn.Module,
    store: ImageStore,
    table: FoldTable,
    rows: np.ndarray,
    settings: Settings,
    runtime: Runtime,
    label: str,
    images: Prepared | None = None,
) -> Predictions:
    """The predictions of rows of the split with the evaluation transform and the recipe's views, with their labels.

    `images`: those of the rows, where they are prepared already.
    """
    images = evaluation_images(store, table, rows, settings) if images is None else images
    return Predictions(
        ids=table.ids_of(rows),
        fold=table.fold[rows],
        system=settings.system,
        classes=table.classes,
        log_probs=predict_images(model, settings, runtime, images, label),
        labels=table.labels()[rows],
    )


def save_holdout(
    job: Job,
    model: nn.Module,
    store: ImageStore,
    table: FoldTable,
    settings: Settings,
    runtime: Runtime,
    images: Prepared | None = None,
) -> tuple[list[Path], dict[str, float]]:
    """Predicts the rows that are set aside, if there are any (`images`: theirs, if prepared already); the file written and its scores."""
    rows = table.aside_rows()
    if job.place.leads:
        (job.model() / HOLDOUT).unlink(missing_ok=True)
    if not len(rows):
        return [], {}
    found = predict_rows(model, store, table, rows, settings, runtime, "holdout", images)
    if not job.place.leads:
        return [], {}
    figures = scores(found, "holdout")
    log.info("holdout, %d rows that no model trained on: %s", len(rows), in_words(figures))
    return [save_predictions(job.model() / HOLDOUT, found)], figures


def scores(table: Predictions, prefix: str) -> dict[str, float]:
    """Accuracy, logloss and macro F1 of a table with labels, named `<prefix>_…`."""
    return {f"{prefix}_{name}": round(value, 6) for name, value in summary(table.log_probs, table.codes()).items()}


def draw_curves(job: Job) -> None:
    """The training curves as a picture."""
    training_curves(job.model() / TRAIN_LOG, job.output() / CURVES)


def draw_examples(
    job: Job,
    store: ImageStore,
    table: FoldTable,
    rows: np.ndarray,
    found: Predictions,
    epoch: int,
    trackers: Sequence[Tracker],
) -> None:
    """Some of the validation rows with truth and prediction of the kept epoch: a picture, which the trackers keep too."""
    shown = spread_out(len(rows))
    images = [decode(store.read(path), path) for path in table.paths_of(rows[shown])]
    guesses = [found.classes[code] for code in predicted(found.log_probs[shown])]
    with atomic(job.output() / EXAMPLES) as temporary:
        image_grid(images, list(found.labels[shown]), guesses, temporary)
    for tracker in trackers:
        tracker.picture("Val/examples", job.output() / EXAMPLES, epoch)


def in_words(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
