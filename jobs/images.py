"""Where a stage's images are read from: the files of a channel, and what a cache holds of them decoded."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from fivefold.contract.artifacts import locate_all
from fivefold.contract.job import Job
from fivefold.contract.layout import CACHES
from fivefold.contract.s3.urls import is_url
from fivefold.data.folds import FoldTable
from fivefold.data.image_cache import DECODER, HEAD, Cache, cached_once, files_of, in_words
from fivefold.data.images import Pixels, pixels_of
from fivefold.data.store import ImageStore, open_store
from fivefold.errors import MissingInputError, SettingsError
from fivefold.recipe import Data, Settings

log = logging.getLogger("fivefold")


def open_images(job: Job, channel: str, data: Data) -> ImageStore:
    """The store of a channel, with what the caches of the cache channel hold of it."""
    return replace(open_store(job.channel(channel), data.max_unpacked_gib), caches=channel_caches(job))


def open_split(job: Job, table: FoldTable, settings: Settings) -> ImageStore:
    """The store of the train channel, with what a cache holds of the rows of the split.

    That is the cache channel's, or else the one below `data.cache`, which the first process that asks makes.
    """
    store, pixels = open_store(job.channel("train"), settings.data.max_unpacked_gib), pixels_of(settings.data)
    rows = np.arange(len(table))
    digests = table.sha256_of(rows)
    known = [file for file in files_of(store, table.paths_of(rows), digests) if file.sha256]
    caches = channel_caches(job, pixels)
    folder = cache_folder(settings)
    if not caches and folder is not None and known:
        cache = cached_once(folder, known, pixels, settings.data.cache_gib)
        caches = [] if cache is None else [cache]
    lacking = np.all([cache.find(digests) < 0 for cache in caches], axis=0).sum() if caches else 0
    rest = f"; {lacking} of {len(digests)} are not there and read from their files" if lacking else ""
    for cache in caches:
        size = f"{len(cache)} images, {cache.pixels.in_words}, {in_words(cache.bytes)}"
        log.info("image cache: %s (%s)%s", cache.folder, size, rest)
    return replace(store, caches=caches)


def channel_caches(job: Job, pixels: Pixels | None = None) -> list[Cache]:
    """The caches below the cache channel, all their bytes checked (on each host once); those that hold images as `pixels`, if given.

    Raises MissingInputError for a channel without any, DataError for one that is damaged, SettingsError where none
    holds images as these pixels.
    """
    folder = job.optional_channel("cache")
    if folder is None:
        return []
    found = [Cache(path.parent) for path in locate_all(folder, job.scratch, HEAD)]
    if not found:
        raise MissingInputError(f"no {HEAD} below the channel 'cache' ({folder}): give the output of prepare")
    for cache in found:
        if job.place.local_rank == 0:
            cache.verify()
        by = cache.head.decoder
        if by != DECODER:
            log.warning("%s was decoded by %s, not by this %s: pixels may differ", cache.folder, by, DECODER)
    fitting = [cache for cache in found if pixels in (None, cache.pixels)]
    if not fitting:
        raise SettingsError(
            f"the cache in {found[0].folder} holds images {found[0].pixels.in_words}, and these settings take them "
            f"{pixels.in_words}: run prepare with the same data.store_size and data.scaled_decoding, or leave it out"
        )
    return fitting


def cache_folder(settings: Settings) -> Path | None:
    """Where caches are made on first use: `data.cache`; `auto` is beside the runs in a run of this machine, else nowhere."""
    chosen = settings.data.cache
    if chosen == "auto":
        # Where the platform has folders of its own, a run is a title, and no such folder is there.
        told = settings.run and not is_url(settings.runs) and Path(settings.runs).is_dir()
        return Path(settings.runs) / CACHES if told else None
    if is_url(chosen):
        raise SettingsError(
            f"data.cache={chosen} is a folder of this machine, no URL; prepare makes a cache that is kept at one"
        )
    return None if chosen in ("", "off") else Path(chosen)
