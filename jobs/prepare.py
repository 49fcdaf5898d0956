"""The prepare stage: build the image cache, with every image of the split and of the test images decoded once."""

import numpy as np

from fivefold.config.schema import Settings
from fivefold.contract.artifacts import find_one
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import CLASSES, FOLDS
from fivefold.data.image_io import decode_options, is_image
from fivefold.data.pipeline import image_cache
from fivefold.data.pipeline.image_cache import make_image_files
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.log import log


def main(job: StageContext, settings: Settings) -> StageResult:
    """Decode the images of all channels into a subfolder of the output, named after a digest of its contents."""
    options = decode_options(settings.data)
    images = image_cache.plan_cache(image_files(job, settings), options)
    folder = job.output() / image_cache.cache_name([image.sha256 for image in images], options)
    cache = image_cache.open_or_build(folder, lambda: images, options, settings.data.cache_gib)
    log.info("%d images, %s, %s: %s", len(cache), options.description, image_cache.format_bytes(cache.bytes), folder)
    files = [folder / name for name in (image_cache.PIXELS_FILE, image_cache.INDEX_FILE, image_cache.HEADER_FILE)]
    return StageResult(files, {"images": len(cache), "bytes": cache.bytes})


def image_files(job: StageContext, settings: Settings) -> list[image_cache.ImageFile]:
    """Return the images of the split, and of the eval and unlabelled channels if there are any."""
    table = read_folds(find_one(job, "folds", FOLDS), find_one(job, "folds", CLASSES))
    rows, limit = np.arange(len(table)), settings.data.max_unpacked_gib
    files = make_image_files(open_store(job.channel("train"), limit), table.paths_of(rows), table.sha256_of(rows))
    if job.optional_channel("eval") is not None:
        store = open_store(job.channel("eval"), limit)
        files += make_image_files(store, read_eval(store, settings.data.id_column, settings.data.path_column).paths)
    if job.optional_channel("unlabeled") is not None:
        store = open_store(job.channel("unlabeled"), limit)
        files += make_image_files(store, [name for name in store.names() if is_image(name)])
    return files
