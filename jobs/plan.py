"""The plan stage: read the split, measure this machine, and write a recipe with the reason of each choice."""

import os

import numpy as np

from fivefold.config.schema import Settings
from fivefold.contract.files import read_json
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import SPLIT_SUMMARY
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import HELD_OUT_PARTS
from fivefold.log import log
from fivefold.planning.facts import read_facts, sample_rows
from fivefold.planning.recipe import plan_recipe, write_plan
from fivefold.stages.training_run import probe_cache_dir, read_split


def main(job: StageContext, settings: Settings) -> StageResult:
    """Plan for the rows of the split that folds use; return the recipe and the measurements."""
    path, table = read_split(job)
    rows = np.flatnonzero(~np.isin(table.part, HELD_OUT_PARTS))
    store = open_store(job.channel("train"), settings.data.max_unpacked_gib)
    summary = path.with_name(SPLIT_SUMMARY)
    eval_images = read_json(summary).get("eval", {}).get("images", 0) if summary.is_file() else 0
    paths, groups = table.paths_of(rows), table.groups.take(rows)
    facts = read_facts(
        store, paths, table.codes[rows], len(table.classes), groups, table.num_folds, eval_images, settings.data
    )
    sample = [paths[row] for row in sample_rows(len(paths))]
    train, weights = job.channel("train"), job.optional_channel("weights")
    planned = plan_recipe(settings, facts, train, sample, os.environ, weights, probe_cache_dir(job))
    for choice in planned.choices:
        log.info("plan: %s=%s: %s", choice.key, choice.value, choice.reason)
    metrics = {"backbone": planned.speed.backbone, "images_per_second": round(planned.speed.train, 1)}
    return StageResult(write_plan(job.output(), planned), metrics)
