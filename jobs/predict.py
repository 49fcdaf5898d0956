"""Classes of images that somebody has: one, a folder, or a table of them; and the mistakes where the truth is known."""

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
from fivefold.committee import Verdict, load_committee, seen_as
from fivefold.contract.artifacts import ModelDir, check_split, locate
from fivefold.contract.job import Job
from fivefold.contract.stages import CLASSES, FOLDS
from fivefold.data.folds import read_folds
from fivefold.data.given import Given, check_truth, read_given, with_folders_as_truth
from fivefold.errors import DataError
from fivefold.evaluation.metrics import summary
from fivefold.evaluation.tables import Scored, write_csv
from fivefold.launchers.plan import new_run_name
from fivefold.members import ImageFiles
from fivefold.predictions import Predictions
from fivefold.recipe import Settings

from .images import open_images
from .outcome import Outcome

log = logging.getLogger("fivefold")

WRONG = {"train": "wrong_train.csv", "valid": "wrong_valid.csv", "test": "wrong_test.csv"}
"""Mistakes on rows that the models trained on, on rows that chose their best epoch, and on rows that they never saw."""


@dataclass(frozen=True, eq=False)
class Asked:
    """N images to predict, and what each was to the models: `part` [N], a key of WRONG."""

    given: Given
    part: np.ndarray
    sha256: Sequence[str | None] | None = None


def main(job: Job, settings: Settings) -> Outcome:
    """Predicts the images; the table of them, the mistakes of each part, and how long an image took."""
    explicit = settings.predict.model_dump(exclude_unset=True)
    committee = load_committee(job.channel("model"), job.scratch, explicit)
    asked = what_is_asked(job, settings, [member.source for member in committee.members], committee.classes)
    given = asked.given
    log.info("%d models predict %d images", len(committee.members), len(given))

    start = time.perf_counter()
    verdict = committee.predict(ImageFiles(given.store, given.paths, asked.sha256), "predict")
    seconds = time.perf_counter() - start
    results = answers(verdict, given.shown, committee.classes)
    tell(verdict, given.shown, results, seconds)

    folder = results_folder(job, settings)
    scored = scored_parts(asked, verdict, committee.classes)
    files = [write_results(folder / settings.predict.file, results, given.truth), *write_wrong(folder, scored)]
    figures = {
        "images": len(given),
        "errors": len(verdict.unreadable),
        "ms_per_image": round(1000 * seconds / len(given), 3),
        **{part: {"n": len(rows.table), **rounded(rows)} for part, rows in scored.items()},
    }
    shown = results[0] if len(results) == 1 else figures
    print(json.dumps(shown, ensure_ascii=False), flush=True)
    log.info("predictions: %s", files[0])
    return Outcome(files, figures)


def what_is_asked(job: Job, settings: Settings, models: Sequence[ModelDir], classes: tuple[str, ...]) -> Asked:
    """The images of the channel; with a split, its rows among them, each with its class and its part."""
    data = settings.data
    if job.optional_channel("folds") is None:
        given = read_given(
            job.channel("images"), data.base_path, data.path_column, data.label_column, data.max_unpacked_gib
        )
        given = with_folders_as_truth(given, classes)
        check_truth(given, classes)
        return Asked(given, np.full(len(given), "test"))
    path = locate(job, "folds", FOLDS)
    check_split(models, path)
    factors = models[0].info["settings"]["model"].get("factors", [])
    table = read_folds(path, locate(job, "folds", CLASSES)).of_factors(factors)
    part = seen_as(models, table)
    rows = np.flatnonzero(np.isin(part, settings.predict.rows))
    if not len(rows):
        raise DataError(f"{path} has no rows that are {' or '.join(settings.predict.rows)} to these models")
    paths = table.paths_of(rows).tolist()
    given = Given(open_images(job, "images", data), paths, paths, table.labels()[rows].tolist())
    check_truth(given, classes)
    return Asked(given, part[rows], table.sha256_of(rows))


def results_folder(job: Job, settings: Settings) -> Path:
    """The output, or in it `<predict.folder>/<run>`."""
    if not settings.predict.folder:
        return job.output()
    return job.output() / settings.predict.folder / (settings.run or new_run_name())


def scored_parts(asked: Asked, verdict: Verdict, classes: tuple[str, ...]) -> dict[str, Scored]:
    """The readable rows whose truth is known, by their part."""
    found = {}
    truth = np.array(asked.given.truth, object)
    names = np.array(asked.given.shown, object)
    for part in WRONG:
        there = (asked.part[verdict.rows] == part) & (truth[verdict.rows] != "")
        rows = verdict.rows[there]
        if len(rows):
            unknown = np.full(len(rows), -1, np.int16)
            table = Predictions(names[rows], unknown, "", classes, verdict.log_probs[there], truth[rows])
            found[part] = Scored(part, "", "", table, dict(zip(names[rows], names[rows], strict=True)))
    return found


def rounded(rows: Scored) -> dict[str, float]:
    return {name: round(value, 6) for name, value in summary(rows.table.log_probs, rows.codes).items()}


def write_results(path: Path, results: Sequence[Mapping[str, Any]], truth: Sequence[str]) -> Path:
    """Writes a line an image, in the order in which they were given; the path."""
    return write_csv(path, pd.DataFrame(results).assign(true_class=list(truth)))


def write_wrong(folder: Path, scored: Mapping[str, Scored]) -> list[Path]:
    """Writes the mistakes of each part, the most confident first; the files."""
    for file in WRONG.values():
        (folder / file).unlink(missing_ok=True)
    return [write_csv(folder / WRONG[part], rows.mistakes()) for part, rows in scored.items()]
