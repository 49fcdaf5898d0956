"""Client of S3 and of stores with S3's protocol: list, transfer in parallel and in parts, and verify objects.

Credentials, region and endpoint come from boto3's chain (`AWS_ENDPOINT_URL_S3` names another store), and are never logged.
The service checks the SHA-256 of uploads. boto3, and the digests in a marker, verify downloads.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
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
from fivefold.log import log
from fivefold.progress import interruptible, track
from fivefold.signals import raise_if_stopped

T = TypeVar("T")

MAX_ATTEMPTS = 7
"""Attempts per call. With the waits between them, a store may be unavailable for about half a minute."""
MAX_BACKOFF_S = 12.0
"""Maximum seconds between two attempts."""
MAX_CONCURRENCY = 16
READ_TIMEOUT_S = 15
"""A call fails if no data arrive for this many seconds."""
TRANSFER_CONFIG = TransferConfig(
    multipart_threshold=8 << 20, multipart_chunksize=8 << 20, max_concurrency=MAX_CONCURRENCY, num_download_attempts=1
)
"""Files of 8 MiB or more are transferred in parts of 8 MiB."""
POLL_INTERVAL_S = 0.05
CHECKSUM = {"ChecksumAlgorithm": "SHA256"}
ARCHIVE_CLASSES = {"GLACIER", "DEEP_ARCHIVE"}
QUIET_LOGGERS = ("boto3", "botocore", "s3transfer", "urllib3")
"""Loggers that would log signed requests at level DEBUG."""
ACCESS_CODES = {"ExpiredToken", "InvalidToken"}
"""Codes of refused credentials whose status is not 403."""
NO_CREDENTIALS = (
    CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSOError, TokenRetrievalError,
)  # fmt: skip
RETRYABLE_CODES = {
    "BadDigest", "XAmzContentSHA256Mismatch", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException",
    "RequestTimeTooSkewed", "PreconditionFailed",
}  # fmt: skip


@dataclass(frozen=True)
class S3Object:
    """An object of a listing: size in bytes, entity tag, modification time in seconds since 1970, storage class."""

    url: Url
    size: int
    etag: str
    modified: float
    storage_class: str = ""


@dataclass(frozen=True)
class Download(BaseSubscriber):
    """Download an object to a file. `digest` is its SHA-256, if known."""

    source: S3Object
    path: Path
    digest: str | None = None

    @property
    def url(self) -> Url:
        return self.source.url

    def start(self, manager: TransferManager) -> TransferFuture:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return manager.download(self.url.bucket, self.url.key, str(self.path), subscribers=[self])

    def on_queued(self, future: TransferFuture, **_: Any) -> None:
        """Pass size and entity tag of the listing: this saves a request, and a replaced object fails."""
        future.meta.provide_transfer_size(self.source.size)
        future.meta.provide_object_etag(self.source.etag)

    def check(self) -> None:
        """Remove the file and raise a RetryableError if it differs from the object."""
        size = self.path.stat().st_size
        if size != self.source.size or (self.digest is not None and sha256(self.path) != self.digest):
            self.path.unlink()
            raise RetryableError(f"{self.url} arrived damaged: {size} of {self.source.size} bytes, or other content")


@dataclass(frozen=True)
class Upload:
    """Upload a file to an object."""

    path: Path
    url: Url

    def start(self, manager: TransferManager) -> TransferFuture:
        return manager.upload(str(self.path), self.url.bucket, self.url.key, extra_args=CHECKSUM)


class S3Client:
    """The operations on objects that stages need. All errors are FivefoldErrors with the URL."""

    def __init__(self) -> None:
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = _connect()

    def list_objects(self, url: Url, start: str = "") -> list[S3Object]:
        """Return the objects below a URL whose relative names start with `start`, sorted by key.

        Raise a MissingInputError if the bucket does not exist.
        """
        return self._list(url, f"{url.key}/{start}" if url.key else start)

    def head(self, url: Url) -> S3Object | None:
        """Return the object with exactly this key, or None."""
        return next((item for item in self._list(url, url.key, limit=1) if item.url == url), None)

    def check_archived(self, objects: Iterable[S3Object]) -> None:
        """Raise a MissingInputError for an object that is archived and not restored."""
        for item in objects:
            if item.storage_class in ARCHIVE_CLASSES:
                call = partial(self._client.head_object, Bucket=item.url.bucket, Key=item.url.key)
                if 'ongoing-request="false"' not in self._retry(item.url, call).get("Restore", ""):
                    raise _archived(item.url)

    def read(self, url: Url) -> bytes:
        """Return all bytes of a small object."""
        return self._retry(url, lambda: self._client.get_object(Bucket=url.bucket, Key=url.key)["Body"].read())

    def write(self, url: Url, content: bytes) -> None:
        """Write a small object in one request, so that it is complete or absent."""
        self._retry(url, lambda: self._client.put_object(Bucket=url.bucket, Key=url.key, Body=content, **CHECKSUM))

    def delete(self, urls: Iterable[Url]) -> None:
        """Delete objects one by one, because not every store can delete several at once. Ignore missing ones."""
        for url in urls:
            self._retry(url, lambda url=url: self._client.delete_object(Bucket=url.bucket, Key=url.key))

    def transfer(self, transfers: Sequence[Download | Upload], label: str) -> None:
        """Transfer files in parallel; after a failure retry those that have not arrived. Each is complete or absent."""
        remaining = dict.fromkeys(transfers)

        def finish(transfer: Download | Upload, future: TransferFuture) -> None:
            try:
                future.result()
            except Exception as error:
                raise to_store_error(error, transfer.url) from error
            if isinstance(transfer, Download):  # the service checks uploads
                transfer.check()
            del remaining[transfer]

        def move() -> None:
            futures: dict[Download | Upload, TransferFuture] = {}
            try:
                # if an error leaves the manager, it cancels transfers that have not started
                with TransferManager(self._client, TRANSFER_CONFIG) as manager:
                    futures |= {transfer: transfer.start(manager) for transfer in remaining}
                    for transfer in track(futures, len(futures), label):
                        while not futures[transfer].done():
                            raise_if_stopped()
                            time.sleep(POLL_INTERVAL_S)
                        finish(transfer, futures[transfer])
            except RetryableError:
                for transfer in futures.keys() & remaining:
                    with suppress(Exception):
                        finish(transfer, futures[transfer])
                raise

        if transfers:
            self._retry(transfers[0].url, move, remaining)

    def _list(self, url: Url, prefix: str, limit: int | None = None) -> list[S3Object]:
        def read_pages() -> list[S3Object]:
            paginator = self._client.get_paginator("list_objects_v2")
            pages = paginator.paginate(Bucket=url.bucket, Prefix=prefix, PaginationConfig={"MaxItems": limit})
            return [_object(url.bucket, entry) for page in interruptible(pages) for entry in page.get("Contents", [])]

        return self._retry(url, read_pages)

    def _retry(self, url: Url, call: Callable[[], T], remaining: Sized = ()) -> T:
        """Return what `call` returns; retry after a RetryableError. A signal stops the process between two attempts.

        An attempt that made `remaining` shorter does not count: only a store without progress is given up.
        """
        attempt, before = 0, len(remaining)
        while True:
            raise_if_stopped()
            try:
                return call()
            except Exception as error:
                known = to_store_error(error, url)
                if len(remaining) < before:
                    attempt, before = 0, len(remaining)
                if not isinstance(known, RetryableError) or attempt + 1 == MAX_ATTEMPTS:
                    raise known from (None if known is error else error)
                log.log(logging.WARNING if known is error else logging.DEBUG, "%s; trying again", known)
            _back_off(attempt)
            attempt += 1


def to_store_error(error: Exception, url: Url) -> FivefoldError:
    """Return the FivefoldError for a failed call for `url`."""
    if isinstance(error, FivefoldError):
        return error
    if isinstance(error, ClientError):
        return _error_of_response(error, url)
    if disk_is_full(error):
        return RetryableError(f"no space left for {url}: free some, then run the same command again")
    if isinstance(error, NO_CREDENTIALS):
        return SettingsError(
            f"{url}: no credentials ({error}); set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or assign a role to this machine or pod"
        )
    if isinstance(error, S3DownloadFailedError):
        return RetryableError(f"{url} changed during the download, the same command may succeed later")
    if isinstance(error, ParamValidationError | ValueError):
        return SettingsError(f"{url}: {' '.join(str(error).split())}; check this URL and AWS_ENDPOINT_URL_S3")
    if isinstance(error, BotoCoreError | RetriesExceededError | OSError):
        return RetryableError(
            f"{url}: the store is unreachable or closed the connection, the same command may succeed later: {error}"
        )
    return FivefoldError(f"{url}: unexpected {type(error).__name__}: {error}")


def _error_of_response(error: ClientError, url: Url) -> FivefoldError:
    details = error.response.get("Error", {})
    code, status = str(details.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    message = f"{code} {details.get('Message', '')}".strip()
    if code == "InvalidObjectState":
        return _archived(url)
    if code in ACCESS_CODES or status == 403:
        return SettingsError(
            f"{url}: access refused ({message}); the credentials in use need s3:ListBucket, s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:AbortMultipartUpload there"
        )
    if code == "NoSuchBucket":
        return MissingInputError(f"{url}: the bucket {url.bucket!r} does not exist")
    if code in RETRYABLE_CODES or status in (404, 429) or status >= 500:
        return RetryableError(
            f"{url}: the store failed or the object has gone, the same command may succeed later: {message}"
        )
    return SettingsError(f"{url}: the store rejects the request: {message}")


def _archived(url: Url) -> MissingInputError:
    return MissingInputError(f"{url} is archived; restore it (aws s3api restore-object), then run the same command")


def _object(bucket: str, entry: dict[str, Any]) -> S3Object:
    modified, storage_class = entry["LastModified"].timestamp(), entry.get("StorageClass", "")
    return S3Object(Url(bucket, entry["Key"]), entry["Size"], entry["ETag"], modified, storage_class)


def _back_off(attempt: int) -> None:
    """Wait with exponential backoff and random jitter, so that many clients do not retry at the same time."""
    until = time.monotonic() + min(MAX_BACKOFF_S, 2.0**attempt) * random.uniform(0.5, 1.0)
    while time.monotonic() < until:
        raise_if_stopped()
        time.sleep(POLL_INTERVAL_S)


def _connect() -> Any:
    try:
        session = boto3.session.Session()
        # `_retry` retries: boto3 would use up its quota of 35 retries within seconds, and delay signals until then
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=2 * MAX_CONCURRENCY,
            user_agent_extra="fivefold",
        )
        client = session.client("s3", config=config)
        if "amazonaws" not in client.meta.endpoint_url:
            # other stores rarely have a host name per bucket
            client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(
            f"cannot create a client for s3:// ({error}); check AWS_PROFILE, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3"
        ) from error
    return client
