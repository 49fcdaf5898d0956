"""The ensemble stage: fit the weights of the systems; every fold model predicts the test images, if there are any."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fivefold import predictions
from fivefold.config import schema
from fivefold.config.schema import Settings, Spec
from fivefold.contract.artifacts import ModelDir, check_split, find_models, find_one, find_submissions
from fivefold.contract.files import write_json
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import ENSEMBLE, FOLDS, HOLDOUT, OOF, PER_SYSTEM_CSV, PREDICTIONS
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.eval_images import EvalImages, SampleSubmission, read_eval
from fivefold.data.readers.stores import ImageStore
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.evaluation.metrics import apply_temperature
from fivefold.inference.blending import apply_blend
from fivefold.inference.ensemble_spec import EnsembleSpec, check_combinable, group_by_system
from fivefold.inference.factor_product import FactorProduct, build_product, read_factors
from fivefold.inference.submission import check_submission, write_submission
from fivefold.inference.submission_reader import (
    PREFIX,
    contains_labels,
    has_one_column,
    is_table,
    read_submission,
    system_name,
)
from fivefold.inference.systems import (
    BlendConfig,
    System,
    align_rows,
    compute_weights,
    score_holdout,
    score_systems,
)
from fivefold.log import log
from fivefold.predictions import Predictions, mean_by_id, reorder_classes
from fivefold.stages.image_source import open_channel

ID_COLUMN = "ID"
"""The id column of the submission if there is no test table."""
MIN_SHARE = 1e-6
"""Minimum share of a class in the prediction of an unreadable image; a class without rows gets it too."""


def main(job: StageContext, settings: Settings) -> StageResult:
    """Predict the eval channel with all members; return the table, the submission and the description of the ensemble.

    Without an eval channel and submission files, only fit and describe the ensemble.
    """
    options = settings.ensemble
    files = submission_files(job, options.submissions)
    files_only = files and job.optional_channel("model") is None
    models = [] if files_only else find_models(job.channel("model"), job.scratch)
    if models:
        check_combinable(models, options.blend == "product")
        if job.optional_channel("folds") is not None:
            check_split(models, find_one(job, "folds", FOLDS))
    groups = group_by_system(models)
    if options.blend == "product" and files:
        raise SettingsError(
            f"ensemble.blend=product combines models of different factors, but {next(iter(files))} is a submission file; "
            "blend it with the product's submission in a second run with another blend"
        )
    product = build_product(groups) if options.blend == "product" else None
    predicted = predict_eval(job, settings, models, files, product)

    views = settings.predict.tta if "tta" in settings.predict.model_fields_set else None
    systems = [load_system(name, group, views, options.seed_blend) for name, group in groups.items()]
    systems += [System(name, 1, 1, None, None) for name in files]
    rule, alone = BlendConfig(options.blend, options.weights, options.seed_blend), []
    if product:
        rule, alone = BlendConfig("mean", within=options.seed_blend, product=product.name), score_systems(systems)
        systems = [product.combine_systems(systems)]
    weights, scores = compute_weights(systems, rule)
    holdout, temperature, holdout_scores = score_holdout(systems, weights, rule, options.calibrate_on)
    scores = alone + scores + holdout_scores
    for score in scores:
        figures = f"accuracy {score['accuracy']:.4f}, logloss {score['logloss']:.4f}"
        log.info("%s: %s (%s rows, n=%d)", score["what"], figures, score["rows"], score["n"])

    output, written, facts = job.output(), [], {}
    if predicted is not None:
        written, facts = write_blend(output, predicted, rule.between, weights, temperature, list(groups), settings)
    (output / HOLDOUT).unlink(missing_ok=True)
    if holdout is not None:
        written.append(predictions.write(output / HOLDOUT, holdout))
    shares = tuple((product.weights if product else weights).tolist())
    ensemble = EnsembleSpec(groups, shares, temperature, options.seed_blend, options.blend, files)
    write_json(output / ENSEMBLE, facts | ensemble.describe(scores))
    images = len(predicted.images) if predicted else 0
    return StageResult(
        [*written, output / ENSEMBLE], {"models": len(models), "images": images, "temperature": temperature}
    )


@dataclass(frozen=True)
class Predicted:
    """The test images, each system's log-probabilities [N, C] of them by its name, and the rows of unreadable images."""

    images: EvalImages
    classes: tuple[str, ...]
    systems: dict[str, np.ndarray]
    unreadable: list[int]


def predict_eval(
    job: StageContext,
    settings: Settings,
    models: list[ModelDir],
    files: Mapping[str, Path],
    product: FactorProduct | None,
) -> Predicted | None:
    """Predict the test images with all models, and read the submission `files`; None if there are no images and no files."""
    options, groups, same = settings.ensemble, group_by_system(models), ClassAliases.of(settings.data)
    log.info("%s: %d models and %d files", ", ".join([*groups, *files]), len(models), len(files))
    if not files and job.optional_channel("eval") is None:
        log.warning("no test images (SM_CHANNEL_EVAL is not set): only weights and temperature are fitted")
        return None
    store, images = select_rows(job, settings, [] if models else list(files.values()))
    classes = product.factors.classes if product else known_classes(models, images, files)
    images = with_factor_labels(images, models, classes)
    check_submission(images, classes, same)
    submitted = read_files(files, groups, images, classes, same, options)
    systems, unreadable = predict_each(job, settings, groups, store, images, options.seed_blend)
    systems |= {name: table.log_probs for name, table in submitted.items()}
    return Predicted(images, classes, {product.name: product.combine(systems)} if product else systems, unreadable)


def write_blend(
    output: Path,
    predicted: Predicted,
    blend: str,
    weights: np.ndarray,
    temperature: float,
    models: Sequence[str],
    settings: Settings,
) -> tuple[list[Path], dict[str, Any]]:
    """Write the blended predictions, the submission and one CSV for each system of `models`.

    Return the files, and the facts about them for `ensemble.json`.
    """
    images, unreadable, options = predicted.images, predicted.unreadable, settings.ensemble
    same = ClassAliases.of(settings.data)
    blended = apply_blend(blend, list(predicted.systems.values()), weights)
    log_probs = apply_temperature(blended, temperature)
    log_probs[unreadable] = blended[unreadable]
    table = make_table(images, " + ".join(predicted.systems), predicted.classes, log_probs)
    tables = [make_table(images, n, predicted.classes, probs) for n, probs in predicted.systems.items() if n in models]
    written = [predictions.write(output / PREDICTIONS, table)]
    written.append(save_submission(output / options.submission, table, images, same))
    written += save_submission_per_system(output / PER_SYSTEM_CSV, tables, images, same)
    facts = {"submission": options.submission, "id_column": images.id_column}
    return written, facts | ({"unreadable": images.ids[unreadable].tolist()} if unreadable else {})


def select_rows(job: StageContext, settings: Settings, files: Sequence[Path]) -> tuple[ImageStore | None, EvalImages]:
    """Return the store and the rows of the eval channel; without it, if all `files` are tables, the rows of the first one."""
    options = settings.ensemble
    if files and all(map(is_table, files)) and job.optional_channel("eval") is None:
        ids = predictions.read(files[0]).ids
        store, images = None, EvalImages(ID_COLUMN, ids, ids, None)
    else:
        store = open_channel(job, "eval", settings.data)
        images = read_eval(store, settings.data.id_column, settings.data.path_column)
    answer = options.answer, options.positive_class
    return store, images.with_label_column(options.label_column, options.row_number_column, *answer)


def submission_files(job: StageContext, configured: Sequence[str]) -> dict[str, Path]:
    """Return the submission files of the channel and of the settings by system name."""
    files: dict[str, Path] = {}
    for path in [*find_submissions(job, tables=True), *(Path(name) for name in configured)]:
        if not path.is_file():
            raise MissingInputError(f"ensemble.submissions: no file {path}")
        other = files.setdefault(system_name(path), path)
        if other != path:
            raise DataError(f"{other} and {path} are both called {system_name(path)!r}; rename one of them")
    return files


def known_classes(models: list[ModelDir], images: EvalImages, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the models' classes, else those of the sample, of the first file of probabilities, or of all files of classes."""
    if models:
        return tuple(models[0].info["classes"])
    columns = images.sample.classes if images.sample else ()
    if len(columns) > 1:
        return tuple(columns)
    whole = [path for path in files.values() if is_table(path) or not has_one_column(path)]
    of_files = [read_submission(path, images.ids).classes for path in whole[:1] or files.values()]
    return tuple(sorted({name for classes in of_files for name in classes}))


def read_files(
    files: Mapping[str, Path],
    systems: Collection[str],
    images: EvalImages,
    classes: Sequence[str],
    same: ClassAliases,
    options: schema.Ensemble,
) -> dict[str, Predictions]:
    """Read each file's predictions of the test images, in their order, by system name.

    Raise a SettingsError for a file of predicted classes in a blend where it would be a veto or could not be ranked.
    """
    ids, submitted = [str(name) for name in images.ids], {}
    answer = {"answer": options.answer, "positive": options.positive_class}
    for name, path in files.items():
        if name in systems:
            raise DataError(f"{path} and a system of the models are both called {name!r}; rename one of them")
        submitted[name] = read_submission(path, ids, classes, same, **answer).reindex(ids)
        if options.blend in ("geometric", "rank") and contains_labels(submitted[name]):
            raise SettingsError(
                f"ensemble.blend={options.blend} needs probabilities, but {name} has only predicted classes; "
                "use vote, mean or weighted"
            )
    return submitted


def predict_each(
    job: StageContext,
    settings: Settings,
    groups: Mapping[str, list[ModelDir]],
    store: ImageStore | None,
    images: EvalImages,
    within: str = "mean",
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return each system's [N, C], and the unreadable rows, which get the class shares of the training data.

    An image is decoded and transformed once for all models with the same preprocessing, and for all views.
    """
    if not groups:
        return {}, []
    from fivefold.build import describe_runtime
    from fivefold.trained_model import ImageList, SharedEvalImages, load_model

    explicit, prior = settings.predict.model_dump(exclude_unset=True), settings.ensemble.unreadable == "prior"
    shared, blended = SharedEvalImages(ImageList(store, images.paths), job.scratch, prior), {}
    for name, group in groups.items():
        predicted, classes = [], group[0].info["classes"]
        for number, model in enumerate(group, start=1):
            member = load_model(model, explicit)
            log.info("%s (%d of %d) predicts on %s", model.name, number, len(group), describe_runtime(member.runtime))
            log_probs = member.predict_cached(shared, model.name)
            shares = np.maximum(np.array(model.info["shares"], np.float64), MIN_SHARE)
            log_probs[shared.unreadable] = np.log(shares / shares.sum())
            del member
            predicted.append(reorder_classes(log_probs, model.info["classes"], classes))
        blended[name] = apply_blend(within, predicted)
    if rows := shared.unreadable:
        words = "test images cannot be read; they get the class shares of the training data"
        log.warning("%d %s: %s", len(rows), words, ", ".join(map(str, images.paths[rows])))
    return blended, rows


def load_system(name: str, group: list[ModelDir], views: list[Spec] | None, within: str) -> System:
    """Return a system with its tables; the holdout tables count only if they were predicted with the current views."""
    from fivefold.inference.tta import views_equal

    unchanged = views is None or all(views_equal(views, model.info["settings"]["predict"]["tta"]) for model in group)
    if not unchanged:
        log.info("%s predicts with other views than its recipe: skipping its holdout scores", name)
    seeds = len({model.info["seed"] for model in group})
    holdout = mean_table(group, HOLDOUT, within) if unchanged else None
    selected = any(model.info.get("selected_on") == "holdout" for model in group)
    folds_selected = any(model.info["role"] == "fold" and selects_epochs(model.info["settings"]) for model in group)
    return System(name, len(group), seeds, mean_table(group, OOF), holdout, selected, folds_selected)


def selects_epochs(settings: Mapping[str, Any]) -> bool:
    """Return whether a fold with these settings chose its epoch among several by its out-of-fold rows."""
    train = settings["train"]
    return train["method"] != "linear_probe" and train["epochs"] > train["validate_every"]


def mean_table(group: list[ModelDir], file: str, within: str = "mean") -> Predictions | None:
    """Combine the models' tables `file` into one with equal weights; None unless all of them have it."""
    paths = [model.path / file for model in group]
    if not all(path.is_file() for path in paths):
        return None
    tables = [predictions.read(path) for path in paths]
    if within == "mean":
        return mean_by_id(tables)
    tables = align_rows(tables)
    log_probs = apply_blend(within, [table.log_probs for table in tables])
    return replace(tables[0], fold=np.full(len(tables[0]), -1, np.int16), log_probs=log_probs)


def make_table(images: EvalImages, system: str, classes: tuple[str, ...], log_probs: np.ndarray) -> Predictions:
    return Predictions(images.ids, np.full(len(images), -1, np.int16), system, classes, log_probs)


def with_factor_labels(images: EvalImages, models: Sequence[ModelDir], classes: Sequence[str]) -> EvalImages:
    """Return `images` with class names as answers if the models predict only some factors: a sample has whole classes."""
    info = models[0].info if models else {}
    part = info.get("knows") and set(classes) != set(read_factors(info).classes)
    if not (part and images.sample and images.sample.answer == "auto" and not images.sample.positive):
        return images
    return images.with_label_column("", answer="class")


def save_submission(path: Path, table: Predictions, images: EvalImages, same: ClassAliases) -> Path:
    """Write the submission with the sample's columns, or one column per class if there is no sample."""
    sample = images.sample or SampleSubmission(images.id_column, same.names(table.classes), images.ids)
    return write_submission(path, table, sample, same)


def save_submission_per_system(
    folder: Path, tables: Sequence[Predictions], images: EvalImages, same: ClassAliases
) -> list[Path]:
    """Write output_<system>.csv for every table: a system's probabilities of all classes, for blending elsewhere.

    Classes with the same meaning keep their own probabilities, except merged classes.
    """
    for old in folder.glob(f"{PREFIX}*.csv"):
        old.unlink()
    plain = replace(same, policy="merge" if same.canonical_names else "none")
    names = [re.sub(r"[^\w.()+-]+", "_", table.system) for table in tables]
    if len(set(names)) < len(names):
        systems = ", ".join(table.system for table in tables)
        raise DataError(f"several systems map to one file name: {systems}; rename one with system=")
    paths = [folder / f"{PREFIX}{name}.csv" for name in names]
    sample = images.sample.classes if images.sample and len(images.sample.classes) > 1 else ()
    for path, table in zip(paths, tables, strict=True):
        layout = SampleSubmission(images.id_column, tuple(sample or same.names(table.classes)), images.ids)
        write_submission(path, table, layout, plain)
    return paths
