"""Distillation: train one student; each row's teacher is a fold model that was not trained on that row."""

from collections.abc import Sequence

import numpy as np

from fivefold import build, distillation
from fivefold.config.schema import Data, Settings
from fivefold.contract.artifacts import ModelDir, check_split, find_models
from fivefold.contract.job import StageContext, StageResult
from fivefold.data.image_io import decode_options
from fivefold.data.readers.stores import log_ignored, take_inventory
from fivefold.data.split.fold_table import FoldTable
from fivefold.distributed.process_group import ProcessGroup
from fivefold.errors import DataError, SettingsError
from fivefold.inference.ensemble_spec import check_members
from fivefold.log import log
from fivefold.stages import image_source
from fivefold.stages.training_run import read_split, start_network, start_run
from fivefold.training.loggers import stdout_logger


def main(job: StageContext, settings: Settings) -> StageResult:
    """Train the student; return its model directory (`role: student`), and its holdout figures if there is a holdout."""
    student = build.resolve_inputs(settings.student())
    build.check_training(student)
    split, table = read_split(job, student.model.label_factors)
    models = find_models(job.channel("model"), job.scratch)
    check_members(models)
    check_split(models, split)
    check_factors(models, table)
    rows, aside = np.flatnonzero(table.part == "train"), table.held_out_rows()
    patience = distillation.check_patience(settings.distill.patience, len(aside))
    network = start_network(job, student, len(table.classes))
    store = image_source.open_split(job, table, student)

    train_rows = distillation.DistillRows(table, rows, store, ProcessGroup(job.rank), job.scratch)
    targets = distillation.compute_soft_targets(
        settings.distill.teacher, models, train_rows, settings.distill.teacher_tta
    )
    log.info("student: %d rows, teacher: %s", len(rows), targets.teacher)

    run = start_run(job, student, split, table, store, "student", network)
    unseen = load_unlabelled(job, models, train_rows, settings.data)
    train = distillation.build_train_data(train_rows, targets, unseen, run.settings, run.runtime)
    run.fit(train, aside, patience, select=patience > 0, logger=stdout_logger(None))
    facts = {
        "teacher": targets.teacher,
        "leak_free": targets.leak_free,
        "selected_on": "holdout" if patience else None,
        "unlabeled": len(unseen.paths) if unseen else 0,
    }
    metrics = {key: facts[key] for key in ("leak_free", "selected_on") if facts[key] is not None}
    return run.finish("student", facts, metrics | {"rows": len(train.images)})


def check_factors(models: list[ModelDir], table: FoldTable) -> None:
    """Raise a SettingsError unless the student predicts the same factors of the classes as its teachers."""
    for model in models:
        knows = model.info.get("knows", [])
        if tuple(knows) != table.known_factors:
            raise SettingsError(
                f"teacher {model.name} predicts {describe_factors(knows)}, but the student is configured for "
                f"{describe_factors(table.known_factors)}; set model.label_factors of the student to those of the teacher"
            )


def describe_factors(names: Sequence[str]) -> str:
    return f"the factors {', '.join(names)}" if names else "whole classes"


def load_unlabelled(
    job: StageContext, models: list[ModelDir], student_rows: distillation.DistillRows, data: Data
) -> distillation.UnlabelledImages | None:
    """Return the images of the unlabelled channel with the ensemble's predictions; None without that channel."""
    channel = job.optional_channel("unlabeled")
    if channel is None:
        return None
    store = image_source.open_channel(job, "unlabeled", data)
    inventory = take_inventory(store)
    log_ignored(inventory.counts(), channel)
    paths = inventory.images
    if not paths:
        raise DataError(f"no images below the channel 'unlabeled' ({channel})")
    paths = distillation.exclude_split_images(store, paths, student_rows, decode_options(data))
    if not paths:
        return None
    log.info("student: %d unlabelled images, teacher: the whole ensemble", len(paths))
    return distillation.UnlabelledImages(
        store, paths, distillation.ensemble_soft_targets(models, store, paths, student_rows)
    )
