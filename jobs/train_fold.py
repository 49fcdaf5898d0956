"""The train-fold stage: train on the other folds' rows, and predict the fold's rows out-of-fold."""

from fivefold import build
from fivefold.config.schema import Settings
from fivefold.contract.job import StageContext, StageResult
from fivefold.data.split.assign import group_codes
from fivefold.errors import SettingsError
from fivefold.log import log
from fivefold.stages import image_source
from fivefold.stages.training_run import read_split, start_network, start_run
from fivefold.training.loggers import stdout_logger
from fivefold.training.trainer import TrainData


def main(job: StageContext, settings: Settings) -> StageResult:
    """Train the fold that the settings name; return its model directory and its out-of-fold figures."""
    settings = build.resolve_inputs(settings)
    build.check_training(settings)
    split, table = read_split(job, settings.model.label_factors)
    fold = select_fold(settings.fold, table.num_folds)
    rows, valid_rows = table.train_rows(fold), table.valid_rows(fold)
    network = start_network(job, settings, len(table.classes))
    store = image_source.open_split(job, table, settings)
    log.info(
        "fold %d: trains on %d rows of %d classes, validates on %d",
        fold,
        len(rows),
        len(table.classes),
        len(valid_rows),
    )

    run = start_run(job, settings, split, table, store, f"fold {fold}", network)
    targets = build.one_hot(table.codes[rows], len(table.classes), run.runtime.device)
    groups = group_codes(table.groups)
    images = build.split_dataset(store, table, rows, run.settings, training=True)
    train = TrainData(images, targets, groups=None if groups is None else groups[rows])
    run.fit(train, valid_rows, settings.train.patience, select=True, logger=stdout_logger(fold))
    oof = run.predict(valid_rows, f"{run.label} out-of-fold")
    return run.finish("fold", {"fold": fold}, {"best_epoch": run.deciding.epoch}, oof)


def select_fold(fold: int | None, folds: int) -> int:
    """Return the fold to train; raise a SettingsError if it is not set or the split has no such fold."""
    if fold is None:
        raise SettingsError(f"no fold is set: set FOLD=0 to FOLD={folds - 1} (as argument or environment variable)")
    if fold >= folds:
        raise SettingsError(f"FOLD={fold} is out of range: the split has the folds 0 to {folds - 1}")
    return fold
