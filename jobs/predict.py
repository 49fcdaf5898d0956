"""The predict stage: classes of one image, a folder or a table of images; and the mistakes if the truth is known."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.api import log_counts, to_results
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import check_split, find_one
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import CLASSES, FOLDS
from fivefold.data.readers.user_images import UserImages, check_labels, labels_from_folders, read_user_images
from fivefold.data.split.fold_table import read_folds
from fivefold.ensemble import EnsemblePredictor, PredictionBatch, load_ensemble, row_roles
from fivefold.errors import DataError
from fivefold.evaluation.metrics import compute_metrics
from fivefold.evaluation.scored_rows import ScoredRows, write_csv
from fivefold.launchers.plan import new_run_name
from fivefold.log import log
from fivefold.predictions import Predictions
from fivefold.stages.image_source import open_channel
from fivefold.trained_model import ImageList

PARTS = ("train", "valid", "test")
"""Rows that the models trained on, rows that selected their best epoch, and new rows."""


def main(job: StageContext, settings: Settings) -> StageResult:
    """Predict the images; return the table of predictions, the mistakes of each part, and the time per image."""
    explicit = settings.predict.model_dump(exclude_unset=True)
    ensemble = load_ensemble(job.channel("model"), job.scratch, explicit)
    images, part, sha256 = select_images(job, settings, ensemble)
    log.info("%d models predict %d images", len(ensemble.models), len(images))

    start = time.perf_counter()
    prediction = ensemble.predict(ImageList(images.store, images.paths, sha256), "predict")
    seconds = time.perf_counter() - start
    results = to_results(prediction, images.names, ensemble.classes)
    log_counts(prediction, images.names, results, seconds)

    folder = job.output()
    if settings.predict.folder:
        folder = folder / settings.predict.folder / (settings.run or new_run_name())
    scored = scored_parts(images, part, prediction, ensemble.classes)
    files = [write_results(folder / settings.predict.file, results, images.labels), *write_mistakes(folder, scored)]
    figures = {
        "images": len(images),
        "errors": len(prediction.unreadable),
        "ms_per_image": round(1000 * seconds / len(images), 3),
    }
    for name, rows in scored.items():
        metrics = compute_metrics(rows.table.log_probs, rows.codes)
        figures[name] = {"n": len(rows.table)} | {metric: round(value, 6) for metric, value in metrics.items()}
    print(json.dumps(results[0] if len(results) == 1 else figures, ensure_ascii=False), flush=True)
    log.info("predictions: %s", files[0])
    return StageResult(files, figures)


def select_images(
    job: StageContext, settings: Settings, ensemble: EnsemblePredictor
) -> tuple[UserImages, np.ndarray, Sequence[str | None] | None]:
    """Return the N images of the channel, the part of each (one of PARTS) and their digests, if there is a split.

    With a split, return only its rows with `predict.subsets`.
    """
    data, classes, models = settings.data, ensemble.classes, [model.source for model in ensemble.models]
    if job.optional_channel("folds") is None:
        images = labels_from_folders(read_user_images(job.channel("images"), data), classes)
        check_labels(images, classes)
        return images, np.full(len(images), "test"), None
    path = find_one(job, "folds", FOLDS)
    check_split(models, path)
    factors = models[0].info["settings"]["model"].get("label_factors", [])
    table = read_folds(path, find_one(job, "folds", CLASSES)).project_factors(factors)
    part = row_roles(models, table)
    rows = np.flatnonzero(np.isin(part, settings.predict.subsets))
    if not len(rows):
        raise DataError(f"{path} has no {' or '.join(settings.predict.subsets)} rows of these models")
    paths = table.paths_of(rows).tolist()
    images = UserImages(open_channel(job, "images", data), paths, paths, table.labels()[rows].tolist())
    check_labels(images, classes)
    return images, part[rows], table.sha256_of(rows)


def scored_parts(
    images: UserImages, part: np.ndarray, batch: PredictionBatch, classes: tuple[str, ...]
) -> dict[str, ScoredRows]:
    """Return the readable rows with a known class, by part."""
    scored = {}
    truth, names = np.array(images.labels, object), np.array(images.names, object)
    for name in PARTS:
        selected = (part[batch.rows] == name) & (truth[batch.rows] != "")
        rows = batch.rows[selected]
        if len(rows):
            unknown = np.full(len(rows), -1, np.int16)
            table = Predictions(names[rows], unknown, "", classes, batch.log_probs[selected], truth[rows])
            scored[name] = ScoredRows(name, "", "", table, dict(zip(names[rows], names[rows], strict=True)))
    return scored


def write_results(path: Path, results: Sequence[Mapping[str, Any]], truth: Sequence[str]) -> Path:
    """Write one row per image, in input order; return the path."""
    return write_csv(path, pd.DataFrame(results).assign(true_class=list(truth)))


def write_mistakes(folder: Path, scored: Mapping[str, ScoredRows]) -> list[Path]:
    """Write the mistakes of each part, the most confident first; return the files."""
    for part in PARTS:
        (folder / f"wrong_{part}.csv").unlink(missing_ok=True)
    return [write_csv(folder / f"wrong_{part}.csv", rows.mistakes()) for part, rows in scored.items()]
