"""What a teacher says of the rows that its student trains on.

Leak-free means: the target of a row comes from a model that never saw that row. The out-of-fold
tables hold just that. Images without labels were seen by no fold, so all folds may teach them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fivefold import predictions
from fivefold.assemble import images_at, one_hot
from fivefold.contract.artifacts import ModelDir, model_at
from fivefold.contract.stages import OOF
from fivefold.data.folds import FoldTable
from fivefold.data.images import Pixels
from fivefold.data.opening import open_images
from fivefold.data.store import ImageStore, JoinedStore
from fivefold.distributed.replicas import BY_ITSELF, Replicas
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.inference.blends import mean
from fivefold.inference.predictor import Runtime
from fivefold.inference.tta import build_views, distinct
from fivefold.members import Gallery, ImageFiles, load_member
from fivefold.predictions import Predictions, in_class_order, sample
from fivefold.recipe import Settings, Spec
from fivefold.training.loop import TrainRows
from fivefold.training.teaching import Teacher

log = logging.getLogger("fivefold")
TEACHERS = ("oof", "best_fold", "ensemble")


@dataclass(frozen=True)
class Lesson:
    """The teacher's log-probabilities [N, C] of N rows, and whether no teacher had seen its rows."""

    log_probs: np.ndarray
    leak_free: bool
    teacher: str


@dataclass(frozen=True)
class Pupils:
    """The rows of a split that are to be taught, where their images lie, and who parts them in predicting."""

    folds: FoldTable
    rows: np.ndarray
    store: ImageStore
    replicas: Replicas = BY_ITSELF
    scratch: Path | None = None

    def gallery(self) -> Gallery:
        """The images of the rows, to be made once for all teachers and views."""
        return Gallery(ImageFiles(self.store, list(self.folds.paths_of(self.rows))), self.scratch)


@dataclass(frozen=True)
class Unseen:
    """Images without labels at `paths` of a store, and the ensemble's log-probabilities [N, C] of them."""

    store: ImageStore
    paths: Sequence[str]
    log_probs: np.ndarray


def teach(teacher: str, models: Sequence[ModelDir], pupils: Pupils, views: Sequence[Spec]) -> Lesson:
    """The lesson of `teacher`: oof, best_fold, ensemble, or the path of a model dir.

    Raises SettingsError for a view that does not exist, before anything is predicted.
    """
    build_views(views)
    if teacher == "oof":
        return _teach_out_of_fold(models, pupils, views)
    if teacher == "best_fold":
        models = [best_model(models)]
    elif teacher != "ensemble":
        models = [_model_of_path(teacher, models[0].info["split"])]
    names = ", ".join(model.name for model in models)
    log.warning("the teacher (%s) saw rows that it teaches: this distillation is not leak-free", names)
    gallery, log_probs = pupils.gallery(), []
    for model in models:
        own = model.info["settings"].get("predict", {}).get("views", ["plain"])
        log_probs += _predict(model, pupils, gallery, [distinct([*own, *views])])
    return Lesson(mean(log_probs), leak_free=False, teacher=names)


def unseen_paths(store: ImageStore, paths: Sequence[str], pupils: Pupils, kind: Pixels = Pixels()) -> list[str]:  # noqa: B008
    """The paths whose pictures are none of the split's, by their pixels; the others, and what cannot be read, are left out, with warnings.

    A fold's own image would be taught by models that trained on it, a holdout's would be trained on. `kind` says how large
    an image may be: one that the split could open must be opened here too.
    """
    split, given = open_images(pupils.store, pupils.folds.paths, kind), open_images(store, pa.array(paths), kind)
    known = set(split.pixels[split.readable].tolist())
    if given.unreadable:
        reasons = sample(list(given.unreadable.values()))
        log.warning(
            "%d of %d unlabelled images cannot be read; they are left out: %s",
            len(given.unreadable),
            len(paths),
            reasons,
        )
    whole = zip(paths, given.pixels.tolist(), given.readable.tolist(), strict=True)
    fresh = [path for path, pixels, readable in whole if readable and pixels not in known]
    if same := len(paths) - len(given.unreadable) - len(fresh):
        log.warning("%d of %d unlabelled images are pictures of the split; they are left out", same, len(paths))
    return fresh


def teach_unseen(models: Sequence[ModelDir], store: ImageStore, paths: Sequence[str], pupils: Pupils) -> np.ndarray:
    """The whole ensemble's log-probabilities [N, C] of images that no fold saw."""
    gallery = Gallery(ImageFiles(store, paths), pupils.scratch)
    return mean([_predict(model, pupils, gallery, [()])[0] for model in models])


def taught(pupils: Pupils, lesson: Lesson, unseen: Unseen | None, settings: Settings, runtime: Runtime) -> TrainRows:
    """The student's rows: images, labels (none where unlabelled), and their teacher."""
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
    """The out-of-fold log-probabilities float32 [N, C] of `rows`; several for a row (seeds) are averaged.

    Raises DataError when a row's prediction comes from another fold than its own, SettingsError
    when a row has none.
    """
    position = {name: at for at, name in enumerate(folds.ids_of(rows))}
    total, count = np.zeros((len(rows), len(folds.classes))), np.zeros(len(rows), dtype=np.int64)
    for table in tables:
        at = np.array([position.get(name, -1) for name in table.ids], dtype=np.int64)
        table, at = table.take(at >= 0), at[at >= 0]
        wrong = table.fold != folds.fold[rows[at]]
        if wrong.any():
            raise DataError(
                f"{int(wrong.sum())} out-of-fold predictions come from another fold than the split's, such as id "
                f"{table.ids[wrong][0]!r}: the models belong to another folds.parquet"
            )
        total[at] += np.exp(table.with_classes(folds.classes).log_probs.astype(np.float64))
        count[at] += 1
    if (count == 0).any():
        raise SettingsError(
            f"{int((count == 0).sum())} of {len(rows)} training rows have no out-of-fold prediction: train every fold "
            "first, or choose distill.teacher=best_fold or ensemble (not leak-free); a split by parts has no folds"
        )
    return np.log(np.maximum(total / count[:, None], np.finfo(np.float64).tiny)).astype(np.float32)


def best_model(models: Sequence[ModelDir]) -> ModelDir:
    """The fold model with the least validation logloss."""
    return min(models, key=lambda model: model.info["best"]["logloss"])


def _teach_out_of_fold(models: Sequence[ModelDir], pupils: Pupils, views: Sequence[Spec]) -> Lesson:
    """Each row by the models of its own fold: what they predicted after their training, and each of `views`."""
    folds, rows, gallery = pupils.folds, pupils.rows, pupils.gallery()
    tables = [[predictions.read(model.path / OOF) for model in models], *([] for _ in views)]
    ids, fold = folds.ids_of(rows), folds.fold[rows]
    for model in models if views else ():
        own = np.flatnonzero(fold == model.info["fold"])
        for table, log_probs in zip(
            tables[1:], _predict(model, pupils, gallery, [(view,) for view in views], own), strict=True
        ):
            table.append(Predictions(ids[own], fold[own], model.system, folds.classes, log_probs))
    lessons = [out_of_fold_targets(table, folds, rows) for table in tables]
    return Lesson(mean(lessons), leak_free=True, teacher=f"out-of-fold predictions of {len(models)} models")


def _model_of_path(path: str, split: str) -> ModelDir:
    """The model in a folder that `distill.teacher` names; a warning if it is of another split than the digest `split`."""
    if not Path(path).is_dir():
        raise MissingInputError(f"distill.teacher={path} is neither {', '.join(TEACHERS)} nor the folder of a model")
    model = model_at(Path(path))
    if model.info["split"] != split:
        log.warning("%s comes from another split: it may have seen this split's holdout too", model.name)
    return model


def _predict(
    model: ModelDir, pupils: Pupils, gallery: Gallery, lists: Sequence[Sequence[Spec]], rows: np.ndarray | None = None
) -> list[np.ndarray]:
    """A model's log-probabilities [N, C] of a gallery, or of some `rows` of it: the mean of each list of views, its own where empty."""
    classes = pupils.folds.classes
    differing = sorted(set(model.info["classes"]) ^ set(classes))
    if differing:
        raise DataError(
            f"the teacher {model.shown} knows other classes than the split that its student learns: {sample(differing)} "
            "on one side alone; give a teacher of the same classes"
        )
    member = load_member(model, {}, replicas=pupils.replicas)
    predicted = [member.predict_seen(gallery, f"teacher {model.name}", views, rows) for views in lists]
    return [in_class_order(log_probs, model.info["classes"], classes) for log_probs in predicted]
