"""Objects of S3, or of a store that speaks its protocol: listed, moved in parallel and in parts, and checked when moved.

Credentials, region and endpoint come by boto3's own chain (`AWS_ENDPOINT_URL_S3` names another store); none is logged.
The service checks the SHA-256 of what it is sent. What is read is checked by boto3, and by the digest of a marker.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
from s3transfer.futures import TransferFuture
from s3transfer.manager import TransferManager
from s3transfer.subscribers import BaseSubscriber

from fivefold.contract.files import disk_is_full, sha256
from fivefold.contract.s3.urls import Url
from fivefold.errors import FivefoldError, MissingInputError, RetryableError, SettingsError
from fivefold.progress import track
from fivefold.stopping import poll

log = logging.getLogger("fivefold")
T = TypeVar("T")

MAX_ATTEMPTS = 7
"""How often a call is tried; with the waits between, a store may be away for about half a minute."""
MAX_WAIT = 12.0
"""Seconds between two tries, at most."""
CONCURRENCY = 16
READ_TIMEOUT = 15
"""A call that hears nothing for so many seconds has failed."""
PARTS = TransferConfig(
    multipart_threshold=8 << 20, multipart_chunksize=8 << 20, max_concurrency=CONCURRENCY, num_download_attempts=1
)
"""From 8 MiB on files move in parts of that size."""
SECONDS_BETWEEN_LOOKS = 0.05
CHECKSUM = {"ChecksumAlgorithm": "SHA256"}
QUIET = ("boto3", "botocore", "s3transfer", "urllib3")
"""Loggers that would write down signed requests at the level of debugging."""
REFUSED = {
    "AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "AccountProblem", "Forbidden", "403",
}  # fmt: skip
NO_CREDENTIALS = (
    CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSOError, TokenRetrievalError,
)  # fmt: skip
ABSENT = {"NoSuchBucket", "NoSuchKey", "NotFound", "404"}
ARCHIVED = {"GLACIER", "DEEP_ARCHIVE"}
"""Storage classes whose objects must be restored before anybody can read them."""
TRANSIENT = {
    "BadDigest", "XAmzContentSHA256Mismatch", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException",
    "RequestTimeTooSkewed", "PreconditionFailed",
}  # fmt: skip


@dataclass(frozen=True)
class Object:
    """An object of a listing: its bytes, its entity tag, and when it was put there (seconds since 1970)."""

    url: Url
    size: int
    etag: str
    modified: float
    storage_class: str = ""


@dataclass(frozen=True)
class Download:
    """An object to a file; `digest`: its SHA-256, where somebody knows it."""

    source: Object
    path: Path
    digest: str | None = None

    @property
    def url(self) -> Url:
        return self.source.url

    @property
    def size(self) -> int:
        return self.source.size

    def start(self, manager: TransferManager) -> TransferFuture:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return manager.download(self.url.bucket, self.url.key, str(self.path), subscribers=[_Listed(self.source)])

    def check(self) -> None:
        """Removes a file that is not the object, with a RetryableError."""
        size = self.path.stat().st_size
        if size != self.size or (self.digest is not None and sha256(self.path) != self.digest):
            self.path.unlink()
            raise RetryableError(f"{self.url} arrived damaged: {size} of {self.size} bytes, or another SHA-256")


@dataclass(frozen=True)
class Upload:
    """A file to an object."""

    path: Path
    url: Url

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def start(self, manager: TransferManager) -> TransferFuture:
        return manager.upload(str(self.path), self.url.bucket, self.url.key, extra_args=CHECKSUM)

    def check(self) -> None:
        """The service has checked the bytes."""


class Store:
    """What the stages do with objects. All errors are of ours, and name the URL."""

    def __init__(self) -> None:
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = _connect()

    def below(self, url: Url) -> list[Object]:
        """The objects below a URL, sorted by key.

        Raises MissingInputError where there is no such bucket.
        """
        return self._list(url, f"{url.key}/" if url.key else "")

    def starting(self, url: Url, start: str) -> list[Object]:
        """The objects below a URL whose names there start so."""
        return self._list(url, (url / start).key)

    def find(self, url: Url) -> Object | None:
        """The object of just this key."""
        return next((found for found in self._list(url, url.key, most=1) if found.url == url), None)

    def find_archived(self, objects: Iterable[Object]) -> Object | None:
        """Return the first object that is archived and not restored, or None."""
        for each in objects:
            if each.storage_class in ARCHIVED:
                call = partial(self._client.head_object, Bucket=each.url.bucket, Key=each.url.key)
                if 'ongoing-request="false"' not in self._retry(each.url, call).get("Restore", ""):
                    return each
        return None

    def read(self, url: Url) -> bytes:
        """All bytes of a small object."""
        return self._retry(url, lambda: self._client.get_object(Bucket=url.bucket, Key=url.key)["Body"].read())

    def write(self, url: Url, content: bytes) -> None:
        """A small object in one request, so it is whole or not there."""
        self._retry(url, lambda: self._client.put_object(Bucket=url.bucket, Key=url.key, Body=content, **CHECKSUM))

    def delete(self, urls: Iterable[Url]) -> None:
        """Removes objects, one by one, as not every store can remove several; those that are not there any more are fine."""
        for url in urls:
            self._retry(url, lambda url=url: self._client.delete_object(Bucket=url.bucket, Key=url.key))

    def download(self, downloads: Sequence[Download], label: str) -> None:
        """Fetches objects to files; each is whole or not there."""
        self._transfer(downloads, label)

    def upload(self, files: Sequence[tuple[Path, Url]], label: str) -> dict[Url, str]:
        """Writes files to objects; the SHA-256 of each."""
        digests = {url: sha256(path) for path, url in files}
        self._transfer([Upload(path, url) for path, url in files], label)
        return digests

    def write_file(self, path: Path, url: Url) -> None:
        """A file to an object, its parts side by side, without progress."""
        self._retry(
            url, lambda: self._client.upload_file(str(path), url.bucket, url.key, ExtraArgs=CHECKSUM, Config=PARTS)
        )

    def _list(self, url: Url, start: str, most: int = 0) -> list[Object]:
        def pages() -> list[Object]:
            paginator = self._client.get_paginator("list_objects_v2")
            limit = {"PaginationConfig": {"MaxItems": most}} if most else {}
            objects = []
            for page in paginator.paginate(Bucket=url.bucket, Prefix=start, **limit):
                poll()
                objects += [_object(url.bucket, entry) for entry in page.get("Contents", [])]
            return objects

        return self._retry(url, pages)

    def _retry(self, url: Url, call: Callable[[], T]) -> T:
        """What `call` returns, tried again after a RetryableError; between two tries the process can be stopped."""
        for attempt in range(MAX_ATTEMPTS):
            poll()
            try:
                return call()
            except Exception as error:
                ours = as_ours(error, url)
                if not isinstance(ours, RetryableError) or attempt + 1 == MAX_ATTEMPTS:
                    raise ours from (None if ours is error else error)
                log.log(logging.WARNING if ours is error else logging.DEBUG, "%s; tried again", ours)
            _wait(attempt)
        raise AssertionError("a last attempt returns or raises")

    def _transfer(self, transfers: Sequence[Download | Upload], label: str) -> None:
        """Moves all, several at a time; after a failure those that are left are tried again."""
        left = list(reversed(transfers))

        def move() -> None:
            # Leaving the manager by an error cancels what has not begun.
            with TransferManager(self._client, PARTS) as manager:
                futures = {transfer: transfer.start(manager) for transfer in reversed(left)}
                total = sum(transfer.size for transfer in futures)
                for transfer in track(list(futures), total, label, bytes_of=lambda transfer: transfer.size):
                    while not futures[transfer].done():
                        poll()
                        time.sleep(SECONDS_BETWEEN_LOOKS)
                    try:
                        futures[transfer].result()
                    except Exception as error:
                        raise as_ours(error, transfer.url) from error
                    transfer.check()
                    left.pop()

        if transfers:
            self._retry(transfers[0].url, move)


class _Listed(BaseSubscriber):
    """Gives a download what the listing knows, so that no request asks for it, and another object in its place is refused."""

    def __init__(self, source: Object) -> None:
        self._source = source

    def on_queued(self, future: TransferFuture, **_: Any) -> None:
        future.meta.provide_transfer_size(self._source.size)
        future.meta.provide_object_etag(self._source.etag)


def as_ours(error: Exception, url: Url) -> FivefoldError:
    """The error of ours that a failed call for `url` amounts to."""
    if isinstance(error, FivefoldError):
        return error
    if disk_is_full(error):
        return RetryableError(f"no space left for {url}: free some, then run the same command again")
    if isinstance(error, ParamValidationError):
        return SettingsError(f"{url} cannot be a place in a store: {' '.join(str(error).split())}")
    if isinstance(error, NO_CREDENTIALS):
        return SettingsError(
            f"{url}: no credentials for it ({error}); set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or give this machine or pod a role"
        )
    if isinstance(error, ClientError):
        return _refusal(error, url)
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
        return _refusal(error.__context__, url)
    if isinstance(error, S3DownloadFailedError):
        return RetryableError(f"{url} changed while it was read, the same command may succeed later")
    if isinstance(error, BotoCoreError | RetriesExceededError | S3UploadFailedError | OSError):
        return RetryableError(
            f"{url}: the store cannot be reached or broke off, the same command may succeed later: {error}"
        )
    if isinstance(error, ValueError):  # an endpoint that is no URL
        return SettingsError(f"{url}: {error}; check AWS_ENDPOINT_URL_S3")
    return FivefoldError(f"{url}: unexpected {type(error).__name__}: {error}")


def _refusal(error: ClientError, url: Url) -> FivefoldError:
    details = error.response.get("Error", {})
    code, status = str(details.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    words = f"{code} {details.get('Message', '')}".strip()
    if code in REFUSED or status == 403:
        return SettingsError(
            f"{url}: access refused ({words}); the credentials in use need s3:ListBucket, s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:AbortMultipartUpload there"
        )
    if code == "NoSuchBucket":
        return MissingInputError(f"{url}: there is no bucket {url.bucket!r}")
    if code == "InvalidObjectState":
        return MissingInputError(f"{url} is archived; restore it (aws s3api restore-object), then run the same command")
    if code in ABSENT:
        return RetryableError(f"{url} went away while it was read, as when its stage runs again: try once more")
    if code in TRANSIENT or status >= 500 or status == 429:
        return RetryableError(f"{url}: the store is busy or broken, the same command may succeed later: {words}")
    return SettingsError(f"{url}: the store refuses it: {words}")


def _object(bucket: str, entry: dict[str, Any]) -> Object:
    modified, storage_class = entry["LastModified"].timestamp(), entry.get("StorageClass", "")
    return Object(Url(bucket, entry["Key"]), entry["Size"], entry["ETag"], modified, storage_class)


def _wait(attempt: int) -> None:
    """Backs off, longer each time, by a random part of it so that many clients do not come back together."""
    until = time.monotonic() + min(MAX_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
    while time.monotonic() < until:
        poll()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _connect() -> Any:
    try:
        session = boto3.session.Session()
        # Tries are ours: boto3's own spend a quota of 35 within seconds, and a signal would wait for all of them.
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=2 * CONCURRENCY,
            user_agent_extra="fivefold",
        )
        client = session.client("s3", config=config)
        if "amazonaws" not in client.meta.endpoint_url:
            # other stores seldom have a host name for each bucket
            client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(
            f"no client for s3:// ({error}); check AWS_PROFILE, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3"
        ) from error
    return client
