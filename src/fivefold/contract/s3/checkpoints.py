"""Checkpoints in a store: sent while the training goes on, and brought back at its start."""

import logging
import os
import queue
import re
import secrets
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from fivefold.contract.files import sha256
from fivefold.contract.s3.client import Download, Store
from fivefold.contract.s3.urls import Url
from fivefold.errors import FivefoldError

log = logging.getLogger("fivefold")

CHECKPOINTS_KEPT = 2
CHECKPOINT = re.compile(r"\d+\.[0-9a-f]{64}\.pt")
SECONDS_FOR_LAST_CHECKPOINT = 25.0
"""A stopped process waits so long for its last checkpoint to go up; the one before is there."""


class CheckpointSync:
    """Checkpoints of a URL: `<digest of the key>/<number>.<SHA-256>.pt`, sent by a thread while the training goes on.

    Each is an object of its own, so it is whole or not there, and its name tells its digest.
    """

    def __init__(self, store: Store, url: Url, folder: Path) -> None:
        self._store, self._url, self._folder = store, url, folder
        self._there: list[Url] = []
        self._queue: queue.SimpleQueue[tuple[Path, Url] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def restore(self, own: Path) -> set[str]:
        """Brings the newest of a key, `own` being their folder here; damaged ones are told and left. All keys' names."""
        every = self._store.below(self._url)
        here = self._at(own)
        found = [each for each in every if each.url.parent == here and CHECKPOINT.fullmatch(each.url.name)]
        self._there = [each.url for each in found]
        for each in found[-CHECKPOINTS_KEPT:]:
            number, digest, _ = each.url.name.split(".")
            path = own / f"{number}.pt"
            self._store.download([Download(each, path)], f"checkpoint {each.url}")
            if sha256(path) != digest:
                log.warning("the checkpoint %s is damaged: the one before it is taken", each.url)
                path.unlink()
        return {each.url.below(self._url).split("/")[0] for each in every}

    def send(self, path: Path) -> None:
        """Has a checkpoint sent, in the background; one that still waits to be is left out for it."""
        copy = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:  # the training removes its own when two newer ones are there
            os.link(path, copy)
        except OSError:  # a file system without links
            shutil.copyfile(path, copy)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()
        self._queue.put((copy, self._at(path.parent) / path.name))

    def forget(self, own: Path) -> None:
        """Removes a key's checkpoints, once its stage is done."""
        self.close()
        self._store.delete([found.url for found in self._store.below(self._at(own))])

    def close(self) -> None:
        """Waits for what is being sent, for a while."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(SECONDS_FOR_LAST_CHECKPOINT)
            if self._thread.is_alive():
                log.warning("the last checkpoint is not at %s yet: the next run goes on from the one before", self._url)
            self._thread = None

    def _at(self, folder: Path) -> Url:
        return self._url / folder.relative_to(self._folder).as_posix()

    def _work(self) -> None:
        while (newest := self._newest()) is not None:
            copy, url = newest
            try:
                url = url.parent / f"{Path(url.name).stem}.{sha256(copy)}.pt"
                self._store.write_file(copy, url)
                self._there.append(url)
                self._store.delete(self._there[:-CHECKPOINTS_KEPT])
                del self._there[:-CHECKPOINTS_KEPT]
            except (FivefoldError, OSError) as error:
                log.warning("a checkpoint could not be kept at %s, the next one is tried again: %s", url, error)
            with suppress(OSError):
                copy.unlink()

    def _newest(self) -> tuple[Path, Url] | None:
        """The last of what waits; None at the end."""
        found = self._queue.get()
        while found is not None and not self._queue.empty():
            following = self._queue.get()
            if following is None:
                self._queue.put(None)
                break
            with suppress(OSError):
                found[0].unlink()
            found = following
        return found
