"""The train stage (reference systems): split by the recipe, and train one fold."""

from dataclasses import replace

from fivefold import build
from fivefold.config.schema import Settings
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import STAGES
from fivefold.log import log
from fivefold.stages.training_run import start_network

from . import split, train_fold


def main(job: StageContext, settings: Settings) -> StageResult:
    """Split the channel's rows into the output's `split/`, and train fold 0 or the fold in the settings.

    In a process group every rank makes the same split; only rank 0 keeps it.
    """
    fold = settings.fold or 0
    log.info("train: no folds channel; splitting by the recipe and training fold %d", fold)
    if settings.model.weights or settings.model.pretrained:
        # only to raise its errors before the split reads all images
        start_network(job, build.resolve_inputs(settings), 2)
    splitting = replace(
        job,
        stage=STAGES["split"],
        channels={"train": job.channel("train")},
        output_data_dir=(job.output() if job.rank.is_main else job.scratch) / "split",
    )
    folds = split.main(splitting, settings)
    training = replace(job, stage=STAGES["train-fold"], channels={**job.channels, "folds": splitting.output()})
    model = train_fold.main(training, settings.model_copy(update={"fold": fold}))
    return StageResult([*folds.outputs, *model.outputs], {**folds.metrics, **model.metrics})
