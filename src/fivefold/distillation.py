"""Compute the teacher's targets for the training rows of a student.

Leak-free means that the target of a row comes from a model that was not trained on that row, as in the out-of-fold
tables. No fold was trained on unlabelled images, so all folds can predict their targets.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fivefold import predictions
from fivefold.build import images_at, one_hot
from fivefold.config.schema import Settings, Spec
from fivefold.contract.artifacts import ModelDir, model_at
from fivefold.contract.stage_specs import OOF
from fivefold.data.image_io import Pixels
from fivefold.data.readers.stores import ImageStore, JoinedStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.split.verify import open_images
from fivefold.distributed.process_group import BY_ITSELF, Replicas
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.inference.blending import mean
from fivefold.inference.predictor import Runtime
from fivefold.inference.tta import build_views, distinct
from fivefold.predictions import Predictions, in_class_order, sample
from fivefold.trained_model import Gallery, ImageFiles, load_member
from fivefold.training.teacher import Teacher
from fivefold.training.trainer import TrainRows

log = logging.getLogger("fivefold")
TEACHERS = ("oof", "best_fold", "ensemble")


def allowed_patience(patience: int, holdout_rows: int) -> int:
    """Return the patience; raise a SettingsError without a holdout, since the teachers trained on all other labels."""
    if patience and not holdout_rows:
        raise SettingsError(
            f"distill.patience={patience} needs a holdout to validate on: the teachers trained on the labels of all folds; "
            "split with split.holdout=0.1, or set distill.patience=0"
        )
    return patience


@dataclass(frozen=True)
class Lesson:
    """The teacher's log-probabilities [N, C] of N rows; `leak_free` if no teacher was trained on the rows it predicts."""

    log_probs: np.ndarray
    leak_free: bool
    teacher: str


@dataclass(frozen=True)
class Pupils:
    """The student's rows of a split, the store of their images, and the ranks that share their prediction."""

    folds: FoldTable
    rows: np.ndarray
    store: ImageStore
    replicas: Replicas = BY_ITSELF
    scratch: Path | None = None

    def gallery(self) -> Gallery:
        """Return the images of the rows, which are preprocessed once for all teachers and views."""
        return Gallery(ImageFiles(self.store, list(self.folds.paths_of(self.rows))), self.scratch)


@dataclass(frozen=True)
class Unseen:
    """Unlabelled images at `paths` of a store, and their log-probabilities [N, C] by the ensemble."""

    store: ImageStore
    paths: Sequence[str]
    log_probs: np.ndarray


def teach(teacher: str, models: Sequence[ModelDir], pupils: Pupils, views: Sequence[Spec]) -> Lesson:
    """Return the targets of `teacher`: oof, best_fold, ensemble, or the path of a model folder.

    Raise a SettingsError for an unknown view, before any prediction.
    """
    build_views(views)
    if teacher == "oof":
        return _out_of_fold_lesson(models, pupils, views)
    if teacher == "best_fold":
        models = [best_model(models)]
    elif teacher != "ensemble":
        models = [_load_teacher(teacher, models[0].info["split"])]
    names = ", ".join(model.name for model in models)
    log.warning("the teacher (%s) was trained on rows that it predicts: this distillation is not leak-free", names)
    gallery, log_probs = pupils.gallery(), []
    for model in models:
        recipe_views = model.info["settings"].get("predict", {}).get("views", ["plain"])
        log_probs += _predict(model, pupils, gallery, [distinct([*recipe_views, *views])])
    return Lesson(mean(log_probs), leak_free=False, teacher=names)


def unseen_paths(store: ImageStore, paths: Sequence[str], pupils: Pupils, kind: Pixels = Pixels()) -> list[str]:  # noqa: B008
    """Return the paths of readable images that are not in the split, by their pixels; ignore the others, with warnings.

    Otherwise models would predict targets of images that they were trained on, and the student would train on the
    holdout. `kind` limits the image size: it must accept every image that the split accepts.
    """
    split, unlabelled = open_images(pupils.store, pupils.folds.paths, kind), open_images(store, pa.array(paths), kind)
    known = set(split.pixels[split.readable].tolist())
    if unlabelled.unreadable:
        reasons = sample(list(unlabelled.unreadable.values()))
        log.warning(
            "%d of %d unlabelled images cannot be read and are ignored: %s",
            len(unlabelled.unreadable),
            len(paths),
            reasons,
        )
    images = zip(paths, unlabelled.pixels.tolist(), unlabelled.readable.tolist(), strict=True)
    fresh = [path for path, pixels, readable in images if readable and pixels not in known]
    if same := len(paths) - len(unlabelled.unreadable) - len(fresh):
        log.warning("%d of %d unlabelled images are duplicates of images of the split; ignored", same, len(paths))
    return fresh


def teach_unseen(models: Sequence[ModelDir], store: ImageStore, paths: Sequence[str], pupils: Pupils) -> np.ndarray:
    """Return the ensemble's log-probabilities [N, C] of unlabelled images, which no fold was trained on."""
    gallery = Gallery(ImageFiles(store, paths), pupils.scratch)
    return mean([_predict(model, pupils, gallery, [()])[0] for model in models])


def taught(pupils: Pupils, lesson: Lesson, unseen: Unseen | None, settings: Settings, runtime: Runtime) -> TrainRows:
    """Return the student's training rows: images, labels (none for unlabelled images), and teacher."""
    folds, rows, store = pupils.folds, pupils.rows, pupils.store
    paths, digests = [*folds.paths_of(rows)], [*folds.sha256_of(rows)]
    codes, log_probs = folds.codes[rows], lesson.log_probs
    if unseen is not None:
        store = JoinedStore({"labelled": store, "unlabelled": unseen.store})
        paths = [f"labelled/{path}" for path in paths] + [f"unlabelled/{path}" for path in unseen.paths]
        digests += [None] * len(unseen.paths)
        codes = np.concatenate([codes, np.full(len(unseen.paths), -1, codes.dtype)])
        log_probs = np.concatenate([log_probs, unseen.log_probs])
    images = images_at(store, paths, digests, settings, training=True)
    teacher = Teacher(log_probs, settings.distill.alpha, settings.distill.temperature, runtime.device)
    return TrainRows(images, one_hot(codes, len(folds.classes), runtime.device), teacher)


def out_of_fold_targets(tables: Sequence[Predictions], folds: FoldTable, rows: np.ndarray) -> np.ndarray:
    """Return the out-of-fold log-probabilities float32 [N, C] of `rows`; average several of a row (seeds).

    Raise a DataError if a prediction comes from another fold than the row's, and a SettingsError if a row has none.
    """
    position = {name: index for index, name in enumerate(folds.ids_of(rows))}
    total, count = np.zeros((len(rows), len(folds.classes))), np.zeros(len(rows), dtype=np.int64)
    for table in tables:
        index = np.array([position.get(name, -1) for name in table.ids], dtype=np.int64)
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


def _out_of_fold_lesson(models: Sequence[ModelDir], pupils: Pupils, views: Sequence[Spec]) -> Lesson:
    """Average, for each row, the stored out-of-fold predictions of its fold's models and their predictions of each of `views`."""
    folds, rows, gallery = pupils.folds, pupils.rows, pupils.gallery()
    tables = [[predictions.read(model.path / OOF) for model in models], *([] for _ in views)]
    ids, fold = folds.ids_of(rows), folds.fold[rows]
    for model in models if views else ():
        held_out = np.flatnonzero(fold == model.info["fold"])
        for table, log_probs in zip(
            tables[1:], _predict(model, pupils, gallery, [(view,) for view in views], held_out), strict=True
        ):
            table.append(Predictions(ids[held_out], fold[held_out], model.system, folds.classes, log_probs))
    targets = [out_of_fold_targets(table, folds, rows) for table in tables]
    return Lesson(mean(targets), leak_free=True, teacher=f"out-of-fold predictions of {len(models)} models")


def _load_teacher(path: str, split: str) -> ModelDir:
    """Return the model at the path in `distill.teacher`; warn if its split differs from the digest `split`."""
    if not Path(path).is_dir():
        raise MissingInputError(f"distill.teacher={path} is neither one of {', '.join(TEACHERS)} nor a model folder")
    model = model_at(Path(path))
    if model.info["split"] != split:
        log.warning("%s comes from another split: it may have been trained on this split's holdout", model.name)
    return model


def _predict(
    model: ModelDir, pupils: Pupils, gallery: Gallery, lists: Sequence[Sequence[Spec]], rows: np.ndarray | None = None
) -> list[np.ndarray]:
    """Return a model's log-probabilities [N, C] of a gallery or of some `rows`, one per list of views; empty: the recipe's views."""
    classes = pupils.folds.classes
    differing = sorted(set(model.info["classes"]) ^ set(classes))
    if differing:
        raise DataError(
            f"the teacher {model.shown} and the student's split have different classes: {sample(differing)} are in only one "
            "of them; use a teacher with the same classes"
        )
    member = load_member(model, {}, replicas=pupils.replicas)
    predicted = [member.predict_seen(gallery, f"teacher {model.name}", views, rows) for views in lists]
    return [in_class_order(log_probs, model.info["classes"], classes) for log_probs in predicted]
