"""Checkpoints in a store: sent while the training goes on, and brought back at its start."""

import logging
import os
import re
import secrets
import shutil
import threading
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
        self._sent: list[Url] = []
        self._lock = threading.Lock()
        self._waiting: tuple[Path, Url] | None = None
        self._thread: threading.Thread | None = None

    def restore(self, own: Path) -> set[str]:
        """Brings the newest of a key, `own` being their folder here; damaged ones are told and left. All keys' names."""
        every = self._store.below(self._url)
        here = self._at(own)
        found = [each for each in every if each.url.parent == here and CHECKPOINT.fullmatch(each.url.name)]
        self._sent = [each.url for each in found]
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
        with self._lock:
            replaced, self._waiting = self._waiting, (copy, self._at(path.parent))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
        if replaced is not None:
            replaced[0].unlink(missing_ok=True)

    def forget(self, own: Path) -> None:
        """Removes a key's checkpoints, once its stage is done."""
        self.close()
        self._store.delete([found.url for found in self._store.below(self._at(own))])

    def close(self) -> None:
        """Waits for what is being sent, for a while."""
        thread = self._thread
        if thread is not None:
            thread.join(SECONDS_FOR_LAST_CHECKPOINT)
            if thread.is_alive():
                log.warning("the last checkpoint is not at %s yet: the next run goes on from the one before", self._url)

    def _at(self, folder: Path) -> Url:
        return self._url / folder.relative_to(self._folder).as_posix()

    def _work(self) -> None:
        """Sends what waits, until nothing does."""
        while (waiting := self._take()) is not None:
            copy, folder = waiting
            try:
                url = folder / f"{copy.name.split('.')[1]}.{sha256(copy)}.pt"
                self._store.write_file(copy, url)
                self._sent.append(url)
                self._store.delete(self._sent[:-CHECKPOINTS_KEPT])
                del self._sent[:-CHECKPOINTS_KEPT]
            except (FivefoldError, OSError) as error:
                log.warning("a checkpoint could not be kept at %s, the next one is tried again: %s", folder, error)
            copy.unlink(missing_ok=True)

    def _take(self) -> tuple[Path, Url] | None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
            if waiting is None:
                self._thread = None
            return waiting
