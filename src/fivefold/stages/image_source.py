"""The image sources of a stage: the files of a channel, and the image caches."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fivefold.config.schema import Data, Settings
from fivefold.contract.artifacts import find_all
from fivefold.contract.job import StageContext
from fivefold.contract.run_layout import CACHES
from fivefold.contract.s3.urls import is_url
from fivefold.data.image_io import DecodeOptions, decode_options
from fivefold.data.pipeline.image_cache import DECODER, HEADER_FILE, Cache, format_bytes, get_or_build, make_image_files
from fivefold.data.readers.stores import ImageStore, open_store
from fivefold.data.split.fold_table import FoldTable
from fivefold.errors import MissingInputError, SettingsError
from fivefold.log import log


def open_channel(job: StageContext, channel: str, data: Data) -> ImageStore:
    """Open the store of a channel with the caches of the cache channel."""
    return replace(open_store(job.channel(channel), data.max_unpacked_gib), caches=channel_caches(job))


def open_split(job: StageContext, table: FoldTable, settings: Settings) -> ImageStore:
    """Open the store of the train channel with an image cache of the split's rows.

    The cache is that of the cache channel, else the one below `data.cache`, which the first process builds.
    """
    store, options = open_store(job.channel("train"), settings.data.max_unpacked_gib), decode_options(settings.data)
    rows = np.arange(len(table))
    digests = table.sha256_of(rows)
    known = [file for file in make_image_files(store, table.paths_of(rows), digests) if file.sha256]
    caches = channel_caches(job, options)
    folder = cache_folder(settings)
    if not caches and folder is not None and known:
        cache = get_or_build(folder, known, options, settings.data.cache_gib)
        caches = [] if cache is None else [cache]
    missing = np.all([cache.find(digests) < 0 for cache in caches], axis=0).sum() if caches else 0
    rest = f"; {missing} of {len(digests)} images are not in it and are decoded from their files" if missing else ""
    for cache in caches:
        size = f"{len(cache)} images, {cache.decode_options.description}, {format_bytes(cache.bytes)}"
        log.info("image cache: %s (%s)%s", cache.folder, size, rest)
    return replace(store, caches=caches)


def channel_caches(job: StageContext, options: DecodeOptions | None = None) -> list[Cache]:
    """Open the caches below the cache channel and verify all their bytes (once per host); `options` selects matching caches.

    Raise a MissingInputError for a channel without caches, a DataError for a damaged cache, and a SettingsError if no
    cache matches `options`.
    """
    folder = job.optional_channel("cache")
    if folder is None:
        return []
    caches = [Cache(path.parent) for path in find_all(folder, job.scratch, HEADER_FILE)]
    if not caches:
        raise MissingInputError(f"no {HEADER_FILE} below the channel 'cache' ({folder}): set it to prepare's output")
    for cache in caches:
        if job.rank.local_index == 0:
            cache.verify()
        if cache.header.decoder != DECODER:
            log.warning("%s was decoded by %s, not %s: pixels may differ", cache.folder, cache.header.decoder, DECODER)
    matching = [cache for cache in caches if options in (None, cache.decode_options)]
    if not matching:
        raise SettingsError(
            f"image cache {caches[0].folder} was built with images {caches[0].decode_options.description}, but the settings need "
            f"images {options.description}: rerun prepare with the same data.resize_shorter_side and data.jpeg_draft, "
            "or drop the cache channel"
        )
    return matching


def cache_folder(settings: Settings) -> Path | None:
    """Return the folder for caches built on first use: `data.cache`; `auto`: beside the runs for a local run, else None."""
    chosen = settings.data.cache
    if chosen == "auto":
        # On a platform with its own folders `run` is only a title, and there is no folder of runs.
        local = settings.run and not is_url(settings.runs) and Path(settings.runs).is_dir()
        return Path(settings.runs) / CACHES if local else None
    if is_url(chosen):
        raise SettingsError(f"data.cache={chosen} must be a local folder; only prepare can store a cache at a URL")
    return None if chosen in ("", "off") else Path(chosen)
