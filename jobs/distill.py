"""Distillation: the fold models teach one student, each row by a model that never saw it."""

import logging
from collections.abc import Sequence

import numpy as np

from fivefold import assemble, distillation
from fivefold.contract.artifacts import ModelDir, check_split, find_models
from fivefold.contract.job import Job
from fivefold.data.folds import FoldTable
from fivefold.data.images import pixels_of
from fivefold.data.inventory import log_left_out, take_inventory
from fivefold.distributed.replicas import Replicas
from fivefold.errors import DataError, SettingsError
from fivefold.inference.ensemble import check_members
from fivefold.recipe import Data, Settings

from . import images
from .outcome import Outcome
from .training import read_split, start_network, start_run

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Trains the student; its model dir (`role: student`), and its holdout figures where there is a holdout."""
    student = settings.student()
    assemble.check_training(student)
    split, table = read_split(job, student.model.factors)
    models = find_models(job.channel("model"), job.scratch)
    check_members(models)
    check_split(models, split)
    check_factors(models, table)
    rows, aside = np.flatnonzero(table.part == "train"), table.aside_rows()
    patience = allowed_patience(settings.distill.patience, len(aside))
    network = start_network(job, student, len(table.classes))
    store = images.open_split(job, table, student)

    pupils = distillation.Pupils(table, rows, store, Replicas(job.place), job.scratch)
    lesson = distillation.teach(settings.distill.teacher, models, pupils, settings.distill.views)
    log.info("student: %d rows, taught by %s", len(rows), lesson.teacher)

    run = start_run(job, student, split, table, store, "student", network)
    unseen = unlabelled(job, models, pupils, settings.data)
    train = distillation.taught(pupils, lesson, unseen, run.settings, run.runtime)
    run.fit(train, aside, patience, select=patience > 0, fold=None)
    facts = {
        "teacher": lesson.teacher,
        "leak_free": lesson.leak_free,
        "selected_on": "holdout" if patience else None,
        "unlabeled": len(unseen.paths) if unseen else 0,
    }
    told = {key: facts[key] for key in ("leak_free", "selected_on") if facts[key] is not None}
    return run.finish("student", facts, told | {"rows": len(train.images)})


def check_factors(models: list[ModelDir], table: FoldTable) -> None:
    """Raises a SettingsError unless the student is to know the factors of the classes that its teachers know."""
    for model in models:
        knows = model.info.get("knows", [])
        if tuple(knows) != table.knows:
            raise SettingsError(
                f"{model.name} knows {in_factors(knows)}, and its student is to know {in_factors(table.knows)}: "
                "a teacher speaks of its own classes alone; give the student the model.factors of its teachers"
            )


def in_factors(names: Sequence[str]) -> str:
    return f"the factors {', '.join(names)}" if names else "the classes as they are"


def allowed_patience(patience: int, holdout_rows: int) -> int:
    """The patience; a SettingsError without a holdout, since the teachers saw every other row's label."""
    if patience and not holdout_rows:
        raise SettingsError(
            f"distill.patience={patience} needs a holdout to watch: the teachers saw the labels of all folds; "
            "split with split.holdout=0.1, or leave distill.patience at 0"
        )
    return patience


def unlabelled(job: Job, models: list[ModelDir], pupils: distillation.Pupils, data: Data) -> distillation.Unseen | None:
    """The images of the unlabelled channel with the ensemble's word on each; None without that channel."""
    channel = job.optional_channel("unlabeled")
    if channel is None:
        return None
    store = images.open_images(job, "unlabeled", data)
    stock = take_inventory(store)
    log_left_out(stock.counts(), channel)
    paths = stock.images
    if not paths:
        raise DataError(f"no images below the channel 'unlabeled' ({channel})")
    paths = distillation.unseen_paths(store, paths, pupils, pixels_of(data))
    if not paths:
        return None
    log.info("student: %d unlabelled images, taught by the whole ensemble", len(paths))
    return distillation.Unseen(store, paths, distillation.teach_unseen(models, store, paths, pupils))
