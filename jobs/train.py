"""A training run that needs no split: it makes one by the recipe, and trains one fold of it."""

import logging
from dataclasses import replace

from fivefold.contract.job import Job
from fivefold.contract.stages import STAGES
from fivefold.recipe import Settings

from . import split, train_fold
from .outcome import Outcome
from .training import start_network

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Splits the channel's rows into the output's `split/`, and trains fold 0 unless the settings name another.

    Of several processes that train together each splits, to the same folds, the first alone where they stay.
    """
    fold = settings.fold or 0
    log.info("train: no folds channel, so the recipe splits, and fold %d is trained", fold)
    if settings.model.weights:
        start_network(job, settings, 2)  # to no end but its errors: the split reads all images
    parting = replace(
        job,
        stage=STAGES["split"],
        channels={"train": job.channel("train")},
        output_data_dir=(job.output() if job.place.leads else job.scratch) / "split",
    )
    folds = split.main(parting, settings)
    training = replace(job, stage=STAGES["train-fold"], channels={**job.channels, "folds": parting.output()})
    model = train_fold.main(training, settings.model_copy(update={"fold": fold}))
    return Outcome([*folds.outputs, *model.outputs], {**folds.metrics, **model.metrics})
