"""The predict stage: classes of one image, a folder or a table of images; and the mistakes if the truth is known."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.api import answers, tell
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import ModelDir, check_split, locate
from fivefold.contract.job import Job
from fivefold.contract.stage_specs import CLASSES, FOLDS
from fivefold.data.readers.user_images import Given, check_truth, read_given, with_folders_as_truth
from fivefold.data.split.fold_table import read_folds
from fivefold.ensemble import Verdict, load_committee, seen_as
from fivefold.errors import DataError
from fivefold.evaluation.metrics import summary
from fivefold.evaluation.scored_rows import Scored, write_csv
from fivefold.launchers.plan import new_run_name
from fivefold.predictions import Predictions
from fivefold.stages.image_source import open_images
from fivefold.stages.result import Outcome
from fivefold.trained_model import ImageFiles

log = logging.getLogger("fivefold")

MISTAKE_FILES = {"train": "wrong_train.csv", "valid": "wrong_valid.csv", "test": "wrong_test.csv"}
"""Mistakes on rows that the models trained on, on rows that selected their best epoch, and on new rows."""


@dataclass(frozen=True, eq=False)
class Asked:
    """N images to predict, and the role of each in training: `part` [N], a key of MISTAKE_FILES."""

    given: Given
    part: np.ndarray
    sha256: Sequence[str | None] | None = None


def main(job: Job, settings: Settings) -> Outcome:
    """Predict the images; return the table of predictions, the mistakes of each part, and the time per image."""
    explicit = settings.predict.model_dump(exclude_unset=True)
    ensemble = load_committee(job.channel("model"), job.scratch, explicit)
    request = what_is_asked(job, settings, [member.source for member in ensemble.members], ensemble.classes)
    images = request.given
    log.info("%d models predict %d images", len(ensemble.members), len(images))

    start = time.perf_counter()
    prediction = ensemble.predict(ImageFiles(images.store, images.paths, request.sha256), "predict")
    seconds = time.perf_counter() - start
    results = answers(prediction, images.shown, ensemble.classes)
    tell(prediction, images.shown, results, seconds)

    folder = results_folder(job, settings)
    scored = scored_parts(request, prediction, ensemble.classes)
    files = [write_results(folder / settings.predict.file, results, images.truth), *write_wrong(folder, scored)]
    figures = {
        "images": len(images),
        "errors": len(prediction.unreadable),
        "ms_per_image": round(1000 * seconds / len(images), 3),
        **{part: {"n": len(rows.table), **rounded(rows)} for part, rows in scored.items()},
    }
    shown = results[0] if len(results) == 1 else figures
    print(json.dumps(shown, ensure_ascii=False), flush=True)
    log.info("predictions: %s", files[0])
    return Outcome(files, figures)


def what_is_asked(job: Job, settings: Settings, models: Sequence[ModelDir], classes: tuple[str, ...]) -> Asked:
    """Return the images of the channel; with a split, return the split's rows with their classes and parts."""
    data = settings.data
    if job.optional_channel("folds") is None:
        images = read_given(
            job.channel("images"), data.base_path, data.path_column, data.label_column, data.max_unpacked_gib
        )
        images = with_folders_as_truth(images, classes)
        check_truth(images, classes)
        return Asked(images, np.full(len(images), "test"))
    path = locate(job, "folds", FOLDS)
    check_split(models, path)
    factors = models[0].info["settings"]["model"].get("factors", [])
    table = read_folds(path, locate(job, "folds", CLASSES)).of_factors(factors)
    part = seen_as(models, table)
    rows = np.flatnonzero(np.isin(part, settings.predict.rows))
    if not len(rows):
        raise DataError(f"{path} has no {' or '.join(settings.predict.rows)} rows of these models")
    paths = table.paths_of(rows).tolist()
    images = Given(open_images(job, "images", data), paths, paths, table.labels()[rows].tolist())
    check_truth(images, classes)
    return Asked(images, part[rows], table.sha256_of(rows))


def results_folder(job: Job, settings: Settings) -> Path:
    """Return the output folder, or `<predict.folder>/<run>` in it."""
    if not settings.predict.folder:
        return job.output()
    return job.output() / settings.predict.folder / (settings.run or new_run_name())


def scored_parts(asked: Asked, verdict: Verdict, classes: tuple[str, ...]) -> dict[str, Scored]:
    """Return the readable rows with a known class, by part."""
    scored = {}
    truth = np.array(asked.given.truth, object)
    names = np.array(asked.given.shown, object)
    for part in MISTAKE_FILES:
        selected = (asked.part[verdict.rows] == part) & (truth[verdict.rows] != "")
        rows = verdict.rows[selected]
        if len(rows):
            unknown = np.full(len(rows), -1, np.int16)
            table = Predictions(names[rows], unknown, "", classes, verdict.log_probs[selected], truth[rows])
            scored[part] = Scored(part, "", "", table, dict(zip(names[rows], names[rows], strict=True)))
    return scored


def rounded(rows: Scored) -> dict[str, float]:
    return {name: round(value, 6) for name, value in summary(rows.table.log_probs, rows.codes).items()}


def write_results(path: Path, results: Sequence[Mapping[str, Any]], truth: Sequence[str]) -> Path:
    """Write one row per image, in input order; return the path."""
    return write_csv(path, pd.DataFrame(results).assign(true_class=list(truth)))


def write_wrong(folder: Path, scored: Mapping[str, Scored]) -> list[Path]:
    """Write the mistakes of each part, the most confident first; return the files."""
    for file in MISTAKE_FILES.values():
        (folder / file).unlink(missing_ok=True)
    return [write_csv(folder / MISTAKE_FILES[part], rows.mistakes()) for part, rows in scored.items()]
