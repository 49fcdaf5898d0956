"""Files on their way to and from a store, by boto3's transfer manager, which moves large ones in parts."""

import hashlib
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3transfer.futures import TransferFuture
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber

from fivefold.contract.files import sha256
from fivefold.contract.s3.urls import Url


@dataclass(frozen=True)
class Object:
    """What a listing says of an object: its bytes, its entity tag, and when it was put there (seconds since 1970)."""

    url: Url
    size: int
    etag: str
    modified: float


class Transfer(ABC):
    """One file on its way from or to `url`, of `size` bytes."""

    url: Url
    size: int

    @abstractmethod
    def start(self, manager: TransferManager, watchers: list[BaseSubscriber]) -> TransferFuture:
        """Sets it on its way."""

    def problem(self) -> str:
        """What is wrong with what has arrived, in words; empty where nothing is known to be."""
        return ""


class Download(Transfer):
    """An object to a file; `digest`: its SHA-256, where somebody knows it."""

    def __init__(self, source: Object, path: Path, digest: str | None = None) -> None:
        self.source, self.path, self.digest = source, path, digest
        self.url, self.size = source.url, source.size

    def start(self, manager: TransferManager, watchers: list[BaseSubscriber]) -> TransferFuture:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        watchers = [*watchers, _Known(self.source)]
        return manager.download(self.url.bucket, self.url.key, str(self.path), subscribers=watchers)

    def problem(self) -> str:
        found = self.path.stat().st_size
        if found == self.size and (self.digest is None or sha256(self.path) == self.digest):
            return ""
        self.path.unlink()
        return "other bytes than were written" if found == self.size else f"{found} of its {self.size} bytes"


class Upload(Transfer):
    """A file to an object, which `ReadBack` then has to confirm."""

    def __init__(self, path: Path, url: Url) -> None:
        self.path, self.url, self.size = path, url, path.stat().st_size

    def start(self, manager: TransferManager, watchers: list[BaseSubscriber]) -> TransferFuture:
        return manager.upload(str(self.path), self.url.bucket, self.url.key, subscribers=watchers)


class ReadBack(Transfer):
    """An object that was written from a file, read again, to nothing but a digest."""

    def __init__(self, path: Path, url: Url) -> None:
        self.url, self.size = url, path.stat().st_size
        self._sink = _Sink()

    def start(self, manager: TransferManager, watchers: list[BaseSubscriber]) -> TransferFuture:
        self._sink = _Sink()
        return manager.download(self.url.bucket, self.url.key, self._sink, subscribers=watchers)

    def digest(self) -> str:
        """The SHA-256 of what was read."""
        return self._sink.sha256.hexdigest()


class Moved(BaseSubscriber):
    """Counts the bytes that all transfers of a round have moved; fewer than before where one starts over."""

    def __init__(self) -> None:
        self._bytes, self._lock = 0, threading.Lock()

    def on_progress(self, future: TransferFuture, bytes_transferred: int, **_: Any) -> None:
        with self._lock:
            self._bytes += bytes_transferred

    def take(self) -> int:
        """The bytes since the last call."""
        with self._lock:
            taken, self._bytes = self._bytes, 0
        return taken


class _Known(BaseSubscriber):
    """Tells a download what the listing knows, so that no request asks for it, and another object in its place is refused."""

    def __init__(self, source: Object) -> None:
        self._source = source

    def on_queued(self, future: TransferFuture, **_: Any) -> None:
        future.meta.provide_transfer_size(self._source.size)
        future.meta.provide_object_etag(self._source.etag)


class _Sink:
    """A file that keeps nothing of what is written to it but its digest."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
