"""The ensemble stage: every fold model predicts the test images, and the systems are blended."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fivefold import predictions
from fivefold.config import schema
from fivefold.config.schema import Settings, Spec
from fivefold.contract.artifacts import ModelDir, check_split, find_models, locate
from fivefold.contract.files import write_json
from fivefold.contract.job import Job
from fivefold.contract.stage_specs import EACH, ENSEMBLE, FOLDS, HOLDOUT, OOF, PREDICTIONS
from fivefold.contract.submissions import find_submissions
from fivefold.data.class_aliases import SameClasses
from fivefold.data.readers.eval_images import EvalTable, Submission, read_eval
from fivefold.data.readers.stores import ImageStore
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.evaluation.calibration import apply_temperature
from fivefold.inference.blending import combined, equal
from fivefold.inference.ensemble_spec import Ensemble, by_system, check_together
from fivefold.inference.factor_product import Product, factors_of, product_of
from fivefold.inference.submission import check_submission, write_submission
from fivefold.inference.submission_reader import (
    PREFIX,
    has_one_column,
    holds_labels,
    is_table,
    read_submitted,
    system_name,
)
from fivefold.inference.systems import Rule, Score, System, join, judge_holdout, scores_alone, weigh
from fivefold.predictions import Predictions, in_class_order
from fivefold.stages.image_source import open_images
from fivefold.stages.result import Outcome

log = logging.getLogger("fivefold")

ID_COLUMN = "ID"
"""The id column of the submission if there is no test table."""
MIN_SHARE = 1e-6
"""Minimum share of a class in the prediction of an unreadable image; a class without rows gets it too."""


def main(job: Job, settings: Settings) -> Outcome:
    """Predict the eval channel with all members; return the table, the submission and the description of the ensemble."""
    options, same = settings.ensemble, SameClasses(settings.data.same_classes, settings.data.same_class)
    files = submission_files(job, options.submissions)
    files_only = files and job.optional_channel("model") is None
    models = [] if files_only else find_models(job.channel("model"), job.scratch)
    if models:
        check_together(models, options.blend == "product")
        if job.optional_channel("folds") is not None:
            check_split(models, locate(job, "folds", FOLDS))
    groups = by_system(models)
    product = product_for(options.blend, groups, files)
    store, images = asked_rows(job, settings, [] if models else list(files.values()))
    classes = product.factors.classes if product else known_classes(models, images, files)
    images = in_factors(images, models, classes)
    check_submission(images, classes, same)
    submitted = read_files(files, groups, images, classes, same, options)
    check_blends(options, submitted)
    log.info("%s: %d models and %d files", ", ".join([*groups, *submitted]), len(models), len(files))

    explicit = settings.predict.model_dump(exclude_unset=True)
    request = Asked(store, images, options.unreadable == "prior", job.scratch)
    system_probs, unreadable = predict_each(groups, request, explicit, options.within) if groups else ({}, [])
    system_probs |= {name: table.log_probs for name, table in submitted.items()}
    systems = [system_of(name, group, explicit.get("views"), options.within) for name, group in groups.items()]
    systems += [System(name, 1, 1, None, None) for name in submitted]
    rule, alone = Rule(options.blend, options.weights, options.within), []
    if product:
        rule, alone = Rule("mean", within=options.within, product=product.name), scores_alone(systems)
        system_probs, systems = {product.name: product.join(system_probs)}, [product.joined(systems)]
    weights, scores = weigh(systems, rule)
    holdout, temperature, holdout_scores = judge_holdout(systems, weights, rule, options.temperature)
    scores = alone + scores + holdout_scores
    tell(scores)

    blended = combined(rule.between, list(system_probs.values()), weights)
    log_probs = apply_temperature(blended, temperature)
    log_probs[unreadable] = blended[unreadable]
    table = table_of(images, " + ".join(system_probs), classes, log_probs)
    output = job.output()
    written = [predictions.write(output / PREDICTIONS, table), submit(output / options.submission, table, images, same)]
    written += submit_each(
        output / EACH, {name: system_probs[name] for name in groups if name in system_probs}, images, classes, same
    )
    written += keep_holdout(output / HOLDOUT, holdout)
    shares = tuple((product.weights if product else weights).tolist())
    ensemble = Ensemble(groups, shares, temperature, options.within, options.blend, files)
    facts = {"submission": options.submission, "id_column": images.id_column}
    facts |= {"unreadable": images.ids[unreadable].tolist()} if unreadable else {}
    write_json(output / ENSEMBLE, facts | ensemble.describe(scores))
    return Outcome(
        [*written, output / ENSEMBLE], {"models": len(models), "images": len(images), "temperature": temperature}
    )


def asked_rows(job: Job, settings: Settings, files: Sequence[Path]) -> tuple[ImageStore | None, EvalTable]:
    """Return the store and the rows of the eval channel; without it, if all `files` are tables, the rows of the first one."""
    options = settings.ensemble
    if files and all(map(is_table, files)) and job.optional_channel("eval") is None:
        ids = predictions.read(files[0]).ids
        store, images = None, EvalTable(ID_COLUMN, ids, ids, None)
    else:
        store = open_images(job, "eval", settings.data)
        images = read_eval(store, settings.data.id_column, settings.data.path_column)
    return store, images.answered_in(
        options.answer_column, options.number_column, options.answer, options.positive_class
    )


def submission_files(job: Job, named: Sequence[str]) -> dict[str, Path]:
    """Return the submission files of the channel and of the settings by system name."""
    files: dict[str, Path] = {}
    for path in [*find_submissions(job, tables=True), *(Path(name) for name in named)]:
        if not path.is_file():
            raise MissingInputError(f"ensemble.submissions: no file {path}")
        other = files.setdefault(system_name(path), path)
        if other != path:
            raise DataError(f"{other} and {path} are both called {system_name(path)!r}; rename one of them")
    return files


def known_classes(models: list[ModelDir], images: EvalTable, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the models' classes; without models the classes of the sample submission, else of the first file of probabilities.

    If all files have predicted classes only, return all classes that occur in them.
    """
    if models:
        return tuple(models[0].info["classes"])
    columns = images.sample.classes if images.sample else ()
    if len(columns) > 1:
        return tuple(columns)
    whole = [path for path in files.values() if is_table(path) or not has_one_column(path)]
    of_files = [read_submitted(path, images.ids).classes for path in whole[:1] or files.values()]
    return tuple(sorted({name for classes in of_files for name in classes}))


def read_files(
    files: Mapping[str, Path],
    groups: Mapping[str, Any],
    images: EvalTable,
    classes: tuple[str, ...],
    same: SameClasses,
    options: schema.Ensemble,
) -> dict[str, Predictions]:
    """Read each file's predictions of the test images, in their order, by system name."""
    duplicates = sorted(files.keys() & groups.keys())
    if duplicates:
        name = duplicates[0]
        raise DataError(f"{files[name]} and a system of the models are both called {name!r}; rename one of them")
    ids = [str(name) for name in images.ids]
    answer = {"answer": options.answer, "positive": options.positive_class}
    tables = {name: read_submitted(path, ids, classes, same, **answer) for name, path in files.items()}
    return {name: table.in_order(ids) for name, table in tables.items()}


def check_blends(options: schema.Ensemble, submitted: Mapping[str, Predictions]) -> None:
    """Raise a SettingsError for a file of predicted classes in a blend where it would be a veto or could not be ranked."""
    certain = [name for name, table in submitted.items() if holds_labels(table)]
    if certain and options.blend in ("geometric", "rank"):
        raise SettingsError(
            f"ensemble.blend={options.blend} needs probabilities, but {certain[0]} has only predicted classes; "
            "use vote, mean or weighted"
        )


def product_for(blend: str, groups: Mapping[str, list[ModelDir]], files: Mapping[str, Path]) -> Product | None:
    """Return the product of the systems for the blend `product`, None for another blend; raise an error if it is impossible."""
    if blend != "product":
        return None
    if files:
        raise SettingsError(
            f"ensemble.blend=product combines models of different factors, but {next(iter(files))} is a submission file; "
            "blend it with the product's submission in a second run with another blend"
        )
    return product_of(groups)


@dataclass(frozen=True)
class Asked:
    """The images to predict; `prior`: unreadable images get the class shares of the training data."""

    store: ImageStore | None
    images: EvalTable
    prior: bool
    scratch: Path


def predict_each(
    groups: Mapping[str, list[ModelDir]], asked: Asked, explicit: Mapping[str, Any], within: str
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return each system's [N, C], and the unreadable rows, which get the class shares of the training data.

    An image is decoded and transformed once for all models with the same preprocessing, and for all views.
    """
    from fivefold.trained_model import Gallery, ImageFiles

    images = Gallery(ImageFiles(asked.store, asked.images.paths), asked.scratch, asked.prior)
    log_probs = {name: predict(group, images, explicit, within) for name, group in groups.items()}
    if rows := images.unreadable:
        names = ", ".join(map(str, asked.images.paths[rows]))
        log.warning(
            "%d test images cannot be read; they get the class shares of the training data: %s", len(rows), names
        )
    return log_probs, rows


def prior_of(model: ModelDir) -> np.ndarray:
    """Return the log of the class shares [C] in the model's split, none below MIN_SHARE."""
    shares = np.maximum(np.array(model.info["shares"], np.float64), MIN_SHARE)
    return np.log(shares / shares.sum()).astype(np.float32)


def predict(group: list[ModelDir], gallery: Any, explicit: Mapping[str, Any], within: str) -> np.ndarray:
    """Predict with a system's models and combine them into one [N, C] with equal weights; load one network at a time."""
    from fivefold.build import in_words
    from fivefold.trained_model import load_member

    predicted, classes = [], group[0].info["classes"]
    for number, model in enumerate(group, start=1):
        member = load_member(model, explicit)
        log.info("%s (%d of %d) predicts on %s", model.name, number, len(group), in_words(member.runtime))
        log_probs = member.predict_seen(gallery, model.name)
        log_probs[gallery.unreadable] = prior_of(model)
        del member
        predicted.append(in_class_order(log_probs, model.info["classes"], classes))
    return combined(within, predicted, equal(len(predicted)))


def system_of(name: str, group: list[ModelDir], views: list[Spec] | None, within: str) -> System:
    """Return a system with its tables; the holdout tables count only if they were predicted with the current views."""
    from fivefold.inference.tta import same_views

    unchanged = views is None or all(same_views(views, model.info["settings"]["predict"]["views"]) for model in group)
    if not unchanged:
        log.info("%s predicts with other views than its recipe: skipping its holdout scores", name)
    seeds = len({model.info["seed"] for model in group})
    holdout = joined(group, HOLDOUT, within) if unchanged else None
    selected = any(model.info.get("selected_on") == "holdout" for model in group)
    folds_selected = any(m.info["role"] == "fold" and m.info["settings"]["train"]["epochs"] > 1 for m in group)
    return System(name, len(group), seeds, joined(group, OOF), holdout, selected, folds_selected)


def joined(group: list[ModelDir], file: str, within: str = "mean") -> Predictions | None:
    """Combine the models' tables `file` into one; None unless all of them have it."""
    paths = [model.path / file for model in group]
    return join([predictions.read(path) for path in paths], within) if all(p.is_file() for p in paths) else None


def table_of(images: EvalTable, system: str, classes: tuple[str, ...], log_probs: np.ndarray) -> Predictions:
    return Predictions(images.ids, np.full(len(images), -1, np.int16), system, classes, log_probs)


def in_factors(images: EvalTable, models: Sequence[ModelDir], classes: Sequence[str]) -> EvalTable:
    """Return `images` with class names as answers if the models predict only some factors: a sample has whole classes."""
    info = models[0].info if models else {}
    part = info.get("knows") and set(classes) != set(factors_of(info).classes)
    if not (part and images.sample and images.sample.answer == "auto" and not images.sample.positive):
        return images
    return images.answered_in("", answer="class")


def submit(path: Path, table: Predictions, images: EvalTable, same: SameClasses) -> Path:
    """Write the submission with the sample's columns, or one column per class if there is no sample."""
    sample = images.sample or Submission(images.id_column, same.names(table.classes), images.ids)
    return write_submission(path, table, sample, same)


def submit_each(
    folder: Path, each: Mapping[str, np.ndarray], images: EvalTable, classes: tuple[str, ...], same: SameClasses
) -> list[Path]:
    """Write output_<system>.csv for every system: its probabilities of all classes, for blending elsewhere.

    Classes with the same meaning keep their own probabilities, except merged classes.
    """
    if folder.is_dir():
        for old in folder.glob(f"{PREFIX}*.csv"):
            old.unlink()
    plain = replace(same, policy="merge" if same.merged else "none")
    names = {system: re.sub(r"[^\w.()+-]+", "_", system) for system in each}
    if len(set(names.values())) < len(names):
        raise DataError(f"several systems map to one file name: {', '.join(names)}; rename one with system=")
    columns = images.sample.classes if images.sample and len(images.sample.classes) > 1 else same.names(classes)
    layout = Submission(images.id_column, tuple(columns), images.ids)
    tables = {folder / f"{PREFIX}{names[n]}.csv": table_of(images, n, classes, probs) for n, probs in each.items()}
    return [write_submission(path, table, layout, plain) for path, table in tables.items()]


def keep_holdout(path: Path, table: Predictions | None) -> list[Path]:
    path.unlink(missing_ok=True)
    return [] if table is None else [predictions.write(path, table)]


def tell(scores: list[Score]) -> None:
    for score in scores:
        figures = f"accuracy {score['accuracy']:.4f}, logloss {score['logloss']:.4f}"
        log.info("%s: %s (%s rows, n=%d)", score["what"], figures, score["rows"], score["n"])
