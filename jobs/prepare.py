"""The prepare stage: build the image cache, with every image of the split and of the test images decoded once."""

import logging

import numpy as np

from fivefold.config.schema import Settings
from fivefold.contract.artifacts import locate
from fivefold.contract.job import Job
from fivefold.contract.stage_specs import CLASSES, FOLDS
from fivefold.data.image_io import is_image, pixels_of
from fivefold.data.pipeline.image_cache import (
    HEAD,
    INDEX,
    PIXELS,
    ImageFile,
    files_of,
    in_words,
    key_of,
    open_or_build,
    survey,
)
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.stages.result import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Decode the images of all channels into a subfolder of the output, named after a digest of its contents."""
    pixels = pixels_of(settings.data)
    images = survey(image_files(job, settings), pixels)
    folder = job.output() / key_of([image.sha256 for image in images], pixels)
    cache = open_or_build(folder, lambda: images, pixels, settings.data.cache_gib)
    log.info("%d images, %s, %s: %s", len(cache), pixels.in_words, in_words(cache.bytes), folder)
    files = [folder / PIXELS, folder / INDEX, folder / HEAD]
    return Outcome(files, {"images": len(cache), "bytes": cache.bytes})


def image_files(job: Job, settings: Settings) -> list[ImageFile]:
    """Return the images of the split, and of the eval and unlabelled channels if there are any."""
    table = read_folds(locate(job, "folds", FOLDS), locate(job, "folds", CLASSES))
    rows, limit = np.arange(len(table)), settings.data.max_unpacked_gib
    files = files_of(open_store(job.channel("train"), limit), table.paths_of(rows), table.sha256_of(rows))
    if job.optional_channel("eval") is not None:
        store = open_store(job.channel("eval"), limit)
        files += files_of(store, read_eval(store, settings.data.id_column, settings.data.path_column).paths)
    if job.optional_channel("unlabeled") is not None:
        store = open_store(job.channel("unlabeled"), limit)
        files += files_of(store, [name for name in store.names() if is_image(name)])
    return files
