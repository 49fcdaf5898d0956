"""Upload checkpoints to a store during training, and download them at its start."""

import os
import queue
import re
import secrets
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from fivefold.contract.files import sha256
from fivefold.contract.s3.client import Download, S3Client, Upload
from fivefold.contract.s3.urls import Url
from fivefold.errors import FivefoldError
from fivefold.log import log

MAX_CHECKPOINTS = 2
CHECKPOINT = re.compile(r"\d+\.[0-9a-f]{64}\.pt")
LAST_UPLOAD_TIMEOUT_S = 25.0
"""A stopped process waits this long for the upload of its last checkpoint. The store has the one before."""


class CheckpointSync:
    """Checkpoints below a URL: `<digest of the key>/<number>.<SHA-256>.pt`. A thread uploads them during training.

    Each checkpoint is one object, so it is complete or absent. Its name contains its SHA-256.
    """

    def __init__(self, store: S3Client, url: Url, folder: Path) -> None:
        self._store, self._url, self._folder = store, url, folder
        self._sent: list[Url] = []
        self._waiting: queue.Queue[tuple[Path, Url] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def restore(self, key_folder: Path) -> set[str]:
        """Download the newest checkpoints of a key to its folder `key_folder`; warn about and skip damaged ones. Return all keys' names."""
        objects = self._store.list_objects(self._url)
        prefix = self._url_of(key_folder)
        checkpoints = [item for item in objects if item.url.parent == prefix and CHECKPOINT.fullmatch(item.url.name)]
        self._sent = [item.url for item in checkpoints]
        for item in checkpoints[-MAX_CHECKPOINTS:]:
            number, digest, _ = item.url.name.split(".")
            path = key_folder / f"{number}.pt"
            self._store.transfer([Download(item, path)], f"checkpoint {item.url}")
            if sha256(path) != digest:
                log.warning("the checkpoint %s is damaged: using the one before it", item.url)
                path.unlink()
        return {item.url.relative_to(self._url).split("/")[0] for item in objects}

    def upload_async(self, path: Path) -> None:
        """Upload a checkpoint in the background. It replaces one that still waits for its upload."""
        copy = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:  # the training removes the original after two newer checkpoints
            os.link(path, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, copy)
        with suppress(queue.Empty):
            if replaced := self._waiting.get_nowait():
                replaced[0].unlink(missing_ok=True)
        self._waiting.put((copy, self._url_of(path.parent)))
        if self._thread is None:
            self._thread = threading.Thread(target=self._upload_waiting, name="checkpoints", daemon=True)
            self._thread.start()

    def delete(self, key_folder: Path) -> None:
        """Delete a key's checkpoints after its stage is done."""
        self.close()
        self._store.delete([checkpoint.url for checkpoint in self._store.list_objects(self._url_of(key_folder))])

    def close(self) -> None:
        """Wait for the running and the waiting upload, at most LAST_UPLOAD_TIMEOUT_S seconds."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join(LAST_UPLOAD_TIMEOUT_S)
            if thread.is_alive():
                log.warning(
                    "the last checkpoint is not uploaded to %s: a new run resumes from the one before", self._url
                )

    def _url_of(self, folder: Path) -> Url:
        return self._url / folder.relative_to(self._folder).as_posix()

    def _upload_waiting(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            copy, folder = waiting
            try:
                url = folder / f"{copy.name.split('.')[1]}.{sha256(copy)}.pt"
                self._store.transfer([Upload(copy, url)], f"to {url}")
                self._sent.append(url)
                self._store.delete(self._sent[:-MAX_CHECKPOINTS])
                del self._sent[:-MAX_CHECKPOINTS]
            except (FivefoldError, OSError) as error:
                log.warning("a checkpoint could not be uploaded to %s: %s; the next one will be tried", folder, error)
            copy.unlink(missing_ok=True)
