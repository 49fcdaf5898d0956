"""The image cache: every image of the split, and of the images to predict, decoded once for all later stages."""

import logging

import numpy as np

from fivefold.contract.artifacts import locate
from fivefold.contract.job import Job
from fivefold.contract.stages import CLASSES, FOLDS
from fivefold.data.cache import HEAD, INDEX, PIXELS
from fivefold.data.caching import Source, in_words, key_of_images, made, survey
from fivefold.data.evals import read_eval
from fivefold.data.folds import read_folds
from fivefold.data.images import is_image, pixels_of
from fivefold.data.store import open_store
from fivefold.recipe import Settings

from .outcome import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Decodes the images of all channels that are given into a folder of the output, which is named by what it holds."""
    pixels = pixels_of(settings.data)
    images = survey(sources(job, settings), pixels)
    folder = job.output() / key_of_images(images, pixels)
    cache = made(folder, images, pixels, settings.data.cache_gib)
    log.info("%d images, %s, %s: %s", len(cache), pixels.in_words, in_words(cache.bytes), folder)
    others = sorted(path.parent.name for path in job.output().glob(f"*/{HEAD}") if path.parent != folder)
    if others:
        log.info("caches of other images or settings are left alone: %s", ", ".join(others))
    files = [folder / PIXELS, folder / INDEX, folder / HEAD]
    return Outcome(files, {"images": len(cache), "bytes": cache.bytes})


def sources(job: Job, settings: Settings) -> list[Source]:
    """The images of the split, of the eval channel and of the unlabelled one, as far as they are given."""
    table = read_folds(locate(job, "folds", FOLDS), locate(job, "folds", CLASSES))
    rows = np.arange(len(table))
    found = [Source(open_store(job.channel("train")), table.paths_of(rows), table.sha256_of(rows))]
    if job.optional_channel("eval") is not None:
        store = open_store(job.channel("eval"))
        paths = read_eval(store, settings.data.id_column, settings.data.path_column).paths
        found.append(Source(store, paths, [None] * len(paths)))
    if job.optional_channel("unlabeled") is not None:
        store = open_store(job.channel("unlabeled"))
        names = [name for name in store.names() if is_image(name)]
        found.append(Source(store, names, [None] * len(names)))
    return found
