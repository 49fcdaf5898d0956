"""Compute the teacher's targets for the training rows of a student.

Leak-free means that the target of a row comes from a model that was not trained on that row, as in the out-of-fold
tables. No fold was trained on unlabelled images, so all folds can predict their targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from fivefold import predictions
from fivefold.build import image_dataset, one_hot
from fivefold.config.schema import Settings, Spec
from fivefold.contract.artifacts import ModelDir, open_model_dir
from fivefold.contract.stage_specs import OOF
from fivefold.data.image_io import DecodeOptions
from fivefold.data.readers.stores import ImageStore, MultiStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.split.verify import match_duplicates, verify_images
from fivefold.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.inference.blending import mean
from fivefold.inference.predictor import Runtime
from fivefold.inference.tta import build_views, deduplicate
from fivefold.log import log
from fivefold.predictions import Predictions, preview, reorder_classes
from fivefold.trained_model import ImageList, SharedEvalImages, load_model
from fivefold.training.objectives import Teacher
from fivefold.training.trainer import TrainData

TEACHERS = ("oof", "best_fold", "ensemble")


def check_patience(patience: int, holdout_rows: int) -> int:
    """Return the patience; raise a SettingsError without a holdout, since the teachers trained on all other labels."""
    if patience and not holdout_rows:
        raise SettingsError(
            f"distill.patience={patience} needs a holdout to validate on: the teachers trained on the labels of all folds; "
            "split with split.holdout=0.1, or set distill.patience=0"
        )
    return patience


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's log-probabilities [N, C] of N rows; `leak_free` if no teacher was trained on the rows it predicts."""

    log_probs: np.ndarray
    leak_free: bool
    teacher: str


@dataclass(frozen=True)
class DistillRows:
    """The student's rows of a split, the store of their images, and the ranks that share their prediction."""

    folds: FoldTable
    rows: np.ndarray
    store: ImageStore
    process_group: ProcessGroup = SINGLE_PROCESS
    scratch: Path | None = None

    def eval_images(self) -> SharedEvalImages:
        """Return the images of the rows, which are preprocessed once for all teachers and views."""
        return SharedEvalImages(ImageList(self.store, list(self.folds.paths_of(self.rows))), self.scratch)


@dataclass(frozen=True)
class UnlabelledImages:
    """Unlabelled images at `paths` of a store, and their log-probabilities [N, C] by the ensemble."""

    store: ImageStore
    paths: Sequence[str]
    log_probs: np.ndarray


def compute_soft_targets(
    teacher: str, models: Sequence[ModelDir], student_rows: DistillRows, views: Sequence[Spec]
) -> SoftTargets:
    """Return the targets of `teacher`: oof, best_fold, ensemble, or the path of a model folder.

    Raise a SettingsError for an unknown view, before any prediction.
    """
    build_views(views)
    if teacher == "oof":
        return _oof_soft_targets(models, student_rows, views)
    if teacher == "best_fold":
        models = [best_model(models)]
    elif teacher != "ensemble":
        models = [_load_teacher(teacher, models[0].info["split"])]
    names = ", ".join(model.name for model in models)
    log.warning("the teacher (%s) was trained on rows that it predicts: this distillation is not leak-free", names)
    images, log_probs = student_rows.eval_images(), []
    for model in models:
        recipe_views = model.info["settings"].get("predict", {}).get("tta", ["plain"])
        log_probs += _predict(model, student_rows, images, [deduplicate([*recipe_views, *views])])
    return SoftTargets(mean(log_probs), leak_free=False, teacher=names)


def exclude_split_images(
    store: ImageStore,
    paths: Sequence[str],
    student_rows: DistillRows,
    options: DecodeOptions = DecodeOptions(),  # noqa: B008
) -> list[str]:
    """Return the paths of readable images that are not in the split, by their pixels; ignore the others, with warnings.

    Otherwise models would predict targets of images that they were trained on, and the student would train on the
    holdout. `options` limits the image size: it must accept every image that the split accepts.
    """
    split = verify_images(student_rows.store, student_rows.folds.paths, options)
    unlabelled = verify_images(store, pa.array(paths), options)
    duplicates = match_duplicates(unlabelled, split.pixels[split.readable])
    for problem, names in {
        "cannot be read and are ignored": list(unlabelled.unreadable.values()),
        "are duplicates of images of the split and are ignored": [paths[row] for row in duplicates],
    }.items():
        if names:
            log.warning("%d of %d unlabelled images %s: %s", len(names), len(paths), problem, preview(names))
    ignored = unlabelled.unreadable.keys() | duplicates.keys()
    return [path for row, path in enumerate(paths) if row not in ignored]


def ensemble_soft_targets(
    models: Sequence[ModelDir], store: ImageStore, paths: Sequence[str], student_rows: DistillRows
) -> np.ndarray:
    """Return the ensemble's log-probabilities [N, C] of unlabelled images, which no fold was trained on."""
    eval_images = SharedEvalImages(ImageList(store, paths), student_rows.scratch)
    return mean([_predict(model, student_rows, eval_images, [()])[0] for model in models])


def build_train_data(
    student_rows: DistillRows,
    targets: SoftTargets,
    unlabelled: UnlabelledImages | None,
    settings: Settings,
    runtime: Runtime,
) -> TrainData:
    """Return the student's training rows: images, labels (none for unlabelled images), and teacher."""
    folds, rows, store = student_rows.folds, student_rows.rows, student_rows.store
    paths, digests = [*folds.paths_of(rows)], [*folds.sha256_of(rows)]
    codes, log_probs = folds.codes[rows], targets.log_probs
    if unlabelled is not None:
        store = MultiStore({"labelled": store, "unlabelled": unlabelled.store})
        paths = [f"labelled/{path}" for path in paths] + [f"unlabelled/{path}" for path in unlabelled.paths]
        digests += [None] * len(unlabelled.paths)
        codes = np.append(codes, np.full(len(unlabelled.paths), -1, codes.dtype))
        log_probs = np.concatenate([log_probs, unlabelled.log_probs])
    images = image_dataset(store, paths, digests, settings, training=True)
    teacher = Teacher(log_probs, settings.distill.alpha, settings.distill.temperature, runtime.device)
    return TrainData(images, one_hot(codes, len(folds.classes), runtime.device), teacher)


def out_of_fold_targets(tables: Sequence[Predictions], folds: FoldTable, rows: np.ndarray) -> np.ndarray:
    """Return the out-of-fold log-probabilities float32 [N, C] of `rows`; average several of a row (seeds).

    Raise a DataError if a prediction comes from another fold than the row's, and a SettingsError if a row has none.
    """
    ids = pd.Index(folds.ids_of(rows))
    total, count = np.zeros((len(rows), len(folds.classes))), np.zeros(len(rows), dtype=np.int64)
    for table in tables:
        index = ids.get_indexer(table.ids)
        table, index = table.take(index >= 0), index[index >= 0]
        wrong = table.fold != folds.fold[rows[index]]
        if wrong.any():
            raise DataError(
                f"{int(wrong.sum())} out-of-fold predictions come from another fold than the split's, such as id "
                f"{table.ids[wrong][0]!r}: the models belong to another folds.parquet"
            )
        total[index] += np.exp(table.with_classes(folds.classes).log_probs.astype(np.float64))
        count[index] += 1
    if (count == 0).any():
        raise SettingsError(
            f"{int((count == 0).sum())} of {len(rows)} training rows have no out-of-fold prediction: train every fold "
            "first, or choose distill.teacher=best_fold or ensemble (not leak-free); a split by parts has no folds"
        )
    return np.log(np.maximum(total / count[:, None], np.finfo(np.float64).tiny)).astype(np.float32)


def best_model(models: Sequence[ModelDir]) -> ModelDir:
    """Return the fold model with the lowest validation logloss."""
    return min(models, key=lambda model: model.info["best"]["logloss"])


def _oof_soft_targets(models: Sequence[ModelDir], student_rows: DistillRows, views: Sequence[Spec]) -> SoftTargets:
    """Average, for each row, the stored out-of-fold predictions of its fold's models and their predictions of each of `views`."""
    folds, rows, eval_images = student_rows.folds, student_rows.rows, student_rows.eval_images()
    tables = [[predictions.read(model.path / OOF) for model in models], *([] for _ in views)]
    ids, fold = folds.ids_of(rows), folds.fold[rows]
    for model in models if views else ():
        held_out = np.flatnonzero(fold == model.info["fold"])
        predicted = _predict(model, student_rows, eval_images, [(view,) for view in views], held_out)
        for table, log_probs in zip(tables[1:], predicted, strict=True):
            table.append(Predictions(ids[held_out], fold[held_out], model.system, folds.classes, log_probs))
    targets = [out_of_fold_targets(table, folds, rows) for table in tables]
    return SoftTargets(mean(targets), leak_free=True, teacher=f"out-of-fold predictions of {len(models)} models")


def _load_teacher(path: str, split: str) -> ModelDir:
    """Return the model at the path in `distill.teacher`; warn if its split differs from the digest `split`."""
    if not Path(path).is_dir():
        raise MissingInputError(f"distill.teacher={path} is neither one of {', '.join(TEACHERS)} nor a model folder")
    model = open_model_dir(Path(path))
    if model.info["split"] != split:
        log.warning("%s comes from another split: it may have been trained on this split's holdout", model.name)
    return model


def _predict(
    model: ModelDir,
    student_rows: DistillRows,
    eval_images: SharedEvalImages,
    lists: Sequence[Sequence[Spec]],
    rows: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return a model's log-probabilities [N, C] of shared images or of some `rows`, one per list of views; empty: the recipe's views."""
    classes = student_rows.folds.classes
    if differing := sorted(set(model.info["classes"]) ^ set(classes)):
        raise DataError(
            f"the teacher {model.display_path} and the student's split have different classes: {preview(differing)}"
        )
    member = load_model(model, {}, process_group=student_rows.process_group)
    predicted = [member.predict_cached(eval_images, f"teacher {model.name}", views, rows) for views in lists]
    return [reorder_classes(log_probs, model.info["classes"], classes) for log_probs in predicted]
