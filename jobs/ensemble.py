"""The ensemble: every fold model predicts the test images, and the mean of them is the prediction."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fivefold import predictions
from fivefold.assemble import in_words
from fivefold.contract.artifacts import ModelDir, check_split, find_models, locate
from fivefold.contract.files import atomic, write_json
from fivefold.contract.job import Job
from fivefold.contract.stages import ENSEMBLE, FOLDS, HOLDOUT, OOF, PREDICTIONS
from fivefold.data.evals import EvalTable, read_eval
from fivefold.data.store import ImageStore, open_store
from fivefold.errors import DataError
from fivefold.evaluation.calibration import apply_temperature
from fivefold.inference.ensemble import blend, check_members, mean
from fivefold.inference.submission import write_submission
from fivefold.inference.systems import Score, System, judge_holdout, weigh
from fivefold.inference.tta import same_views
from fivefold.members import load_member, save_predictions
from fivefold.predictions import Predictions, in_class_order, mean_by_id
from fivefold.recipe import Settings, Spec
from jobs.outcome import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Predicts the eval channel with all members; the table, the submission, and what they are made of."""
    models = find_models(job)
    check(job, models)
    groups = by_system(models)
    classes = tuple(models[0].info["classes"])
    store = open_store(job.channel("eval"))
    images = read_eval(store, settings.data.id_column, settings.data.path_column)
    log.info("%d models of %s predict %d images", len(models), ", ".join(groups), len(images))

    explicit = {key: getattr(settings.predict, key) for key in settings.predict.model_fields_set}
    each = [predict(group, store, images, classes, explicit) for group in groups.values()]
    systems = [system_of(name, group, explicit.get("views")) for name, group in groups.items()]
    weights, scores = weigh(systems, settings.ensemble.blend)
    holdout, temperature, holdout_scores = judge_holdout(systems, weights, settings.ensemble.temperature)
    scores += holdout_scores
    tell(scores)

    log_probs = apply_temperature(blend(each, weights), temperature)
    table = Predictions(images.ids, np.full(len(images), -1, np.int16), " + ".join(groups), classes, log_probs)
    output = job.output()
    files = [
        save_predictions(output / PREDICTIONS, table),
        submit(output / settings.ensemble.submission, table, images),
    ]
    files += keep_holdout(output / HOLDOUT, holdout)
    write_json(output / ENSEMBLE, description(groups, weights, temperature, scores))
    return Outcome(
        [*files, output / ENSEMBLE], {"models": len(models), "images": len(images), "temperature": temperature}
    )


def check(job: Job, models: list[ModelDir]) -> None:
    """Raises a DataError unless the models belong together, and to the split of the folds channel if it is given."""
    if models[0].info["role"] == "fold":
        check_members([(model.name, model.info) for model in models])
    elif len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise DataError(f"several students below the channel 'model' ({names}); give the model dir of one")
    if job.optional_channel("folds") is not None:
        check_split(models, locate(job, "folds", FOLDS))


def by_system(models: list[ModelDir]) -> dict[str, list[ModelDir]]:
    """The models by their system's name; a student is a system of its own."""
    groups: dict[str, list[ModelDir]] = {}
    for model in models:
        student = model.info["role"] == "student"
        groups.setdefault(f"{model.info['system']} (student)" if student else model.info["system"], []).append(model)
    return groups


def predict(
    group: list[ModelDir], store: ImageStore, images: EvalTable, classes: tuple[str, ...], explicit: Mapping[str, Any]
) -> np.ndarray:
    """The equal mean of a system's models [N, C]; one network at a time is in memory."""
    found = []
    for number, model in enumerate(group, start=1):
        member = load_member(model, explicit)
        log.info("%s (%d of %d) predicts on %s", model.name, number, len(group), in_words(member.runtime))
        log_probs = member.predict(store, images.paths, model.name)
        found.append(in_class_order(log_probs, model.info["classes"], classes))
    return mean(found)


def system_of(name: str, group: list[ModelDir], views: list[Spec] | None) -> System:
    """The tables of a system; those of the holdout count only when they were made with the views that predict now."""
    own = views is None or all(same_views(views, model.info["settings"]["predict"]["views"]) for model in group)
    if not own:
        log.info("%s predicts with other views than it was trained to: its holdout scores are left out", name)
    seeds = len({model.info["seed"] for model in group})
    return System(name, len(group), seeds, joined(group, OOF), joined(group, HOLDOUT) if own else None)


def joined(group: list[ModelDir], file: str) -> Predictions | None:
    """The models' tables `file` as one; None unless all of them have it."""
    paths = [model.path / file for model in group]
    return mean_by_id([predictions.read(path) for path in paths]) if all(p.is_file() for p in paths) else None


def submit(path: Path, table: Predictions, images: EvalTable) -> Path:
    """Writes the submission in the sample's columns, or in the classes' where there is no sample."""
    columns, ids = (images.sample.classes, images.sample.ids) if images.sample else (table.classes, images.ids)
    id_column = images.sample.id_column if images.sample else images.id_column
    marked = images.sample is not None and images.sample.marked
    with atomic(path) as temporary:
        write_submission(temporary, table, id_column, columns, ids, marked)
    return path


def keep_holdout(path: Path, table: Predictions | None) -> list[Path]:
    path.unlink(missing_ok=True)
    return [] if table is None else [save_predictions(path, table)]


def tell(scores: list[Score]) -> None:
    for score in scores:
        figures = f"accuracy {score['accuracy']:.4f}, logloss {score['logloss']:.4f}"
        log.info("%s: %s (%s rows, n=%d)", score["what"], figures, score["rows"], score["n"])


def description(
    groups: Mapping[str, list[ModelDir]], weights: np.ndarray, temperature: float, scores: list[Score]
) -> dict[str, Any]:
    """What `ensemble.json` holds: members, weights, temperature, and scores with what they speak of."""
    members = [
        {
            "system": name,
            "model": model.name,
            "weight": round(float(weight) / len(group), 9),
            "best": model.info["best"],
        }
        for (name, group), weight in zip(groups.items(), weights, strict=True)
        for model in group
    ]
    systems = {name: round(float(weight), 9) for name, weight in zip(groups, weights, strict=True)}
    return {"members": members, "weights": systems, "temperature": temperature, "scores": scores}


if __name__ == "__main__":
    from jobs.__main__ import run

    sys.exit(run("ensemble", sys.argv[1:]))
