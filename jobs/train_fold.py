"""One fold: trains on the other folds' rows, predicts its own rows out-of-fold."""

import logging

from fivefold import assemble, members
from fivefold.contract.job import Job
from fivefold.contract.stages import OOF, TRAIN_LOG
from fivefold.distributed.replicas import Replicas
from fivefold.errors import SettingsError
from fivefold.inference.tables import save_predictions
from fivefold.recipe import Settings
from fivefold.training.loop import TrainRows, ValidRows
from fivefold.training.trackers import close_trackers

from . import images, training
from .outcome import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Trains the fold that the settings name; its model dir, and its out-of-fold figures."""
    assemble.check_training(settings)
    split, table = training.read_split(job, settings.model.factors)
    fold = chosen_fold(settings.fold, table.num_folds)
    rows, own_rows = table.train_rows(fold), table.valid_rows(fold)
    store = images.open_split(job, table, settings)
    label = f"fold {fold}"
    log.info(
        "%s: trains on %d rows of %d classes, validates on %d", label, len(rows), len(table.classes), len(own_rows)
    )

    assemble.seed_everything(settings.seed)
    network = assemble.build_classifier(settings.model, len(table.classes))
    assemble.start_weights(network, settings.model, job.optional_channel("weights"))
    settings, runtime = training.settled(job, settings, network, Replicas(job.place))
    free = assemble.check_memory(network, settings, runtime)
    training.check_disk(job, network, settings)

    targets = assemble.one_hot(table.codes[rows], len(table.classes), runtime.device)
    train = TrainRows(assemble.image_set(store, table, rows, settings, training=True), targets)
    train = assemble.on_device(train, settings, runtime, free)
    valid = ValidRows(members.evaluation_images(store, table, own_rows, settings), table.codes[own_rows])
    patience = settings.train.patience
    loop = assemble.build_loop(label, network, train, valid, settings, runtime, select=True, patience=patience)
    best, trackers = training.fit(loop, job, settings, fold)

    model = training.load_best(loop, best)
    oof = training.predict_rows(model, store, table, own_rows, settings, runtime, f"{label} out-of-fold", valid.images)
    holdout_files, holdout_scores = training.save_holdout(job, model, store, table, settings, runtime)
    if not job.place.leads:
        return Outcome([])
    files = [job.model() / TRAIN_LOG, save_predictions(job.model() / OOF, oof)]
    facts = {"fold": fold, **training.split_facts(split, table), **training.processes(job)}
    files += holdout_files + members.save_member(job.model(), "fold", best, settings, runtime, facts)
    training.draw_curves(job)
    training.draw_examples(job, store, table, own_rows, oof, next(iter(best.values())).epoch, trackers)

    figures = training.scores(oof, "oof")
    close_trackers(trackers, figures | holdout_scores)
    log.info("%s out-of-fold, %d rows: %s", label, len(own_rows), training.in_words(figures))
    told = {"best_epoch": next(iter(best.values())).epoch, **figures, **holdout_scores, **loop.throughput.figures()}
    return Outcome(files, told)


def chosen_fold(fold: int | None, folds: int) -> int:
    """The fold to train; a SettingsError when none is named or the split has no such fold."""
    if fold is None:
        raise SettingsError(f"which fold? give FOLD=0 to FOLD={folds - 1} (an argument, or the environment)")
    if fold >= folds:
        raise SettingsError(f"FOLD={fold} is out of range: the split has the folds 0 to {folds - 1}")
    return fold
