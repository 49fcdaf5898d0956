"""Objects of S3, or of a store that speaks its protocol: listed, moved in parallel and in parts, and checked when moved.

Credentials, region and endpoint come by boto3's own chain (`AWS_ENDPOINT_URL_S3` names another store); none is logged.
Bytes are checked by their SHA-256, never by an ETag, which of objects in parts is no digest of them; so stores without
AWS's checksums serve too.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig as FileConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from s3transfer.futures import TransferFuture
from s3transfer.manager import TransferConfig, TransferManager

from fivefold.contract.files import sha256
from fivefold.contract.s3.refusals import as_ours
from fivefold.contract.s3.transfers import Download, Moved, Object, ReadBack, Transfer, Upload
from fivefold.contract.s3.urls import Url
from fivefold.errors import FivefoldError, RetryableError, SettingsError
from fivefold.progress import track
from fivefold.stopping import poll

log = logging.getLogger("fivefold")
T = TypeVar("T")

ROUNDS = 7
"""How often a transfer is tried; with the waits between, a store may be away for about half a minute."""
LONGEST_WAIT = 12.0
AT_ONCE = 16
SECONDS_OF_SILENCE = 20
"""A call that hears nothing for so long has failed."""
PARTS_OF = 8 << 20
"""Bytes of a part, and of the smallest file that moves in parts."""
SECONDS_BETWEEN_LOOKS = 0.05
QUIET = ("boto3", "botocore", "s3transfer", "urllib3")
"""Loggers that would write down signed requests at the level of debugging."""


class Store:
    """What the stages do with objects. All errors are of ours, and name the URL."""

    def __init__(self) -> None:
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = _connected()

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

    def read(self, url: Url) -> bytes:
        """All bytes of a small object."""
        return self._persist(url, lambda: self._client.get_object(Bucket=url.bucket, Key=url.key)["Body"].read())

    def write(self, url: Url, content: bytes) -> None:
        """A small object in one request, so it is whole or not there; read again to be sure."""

        def put() -> None:
            self._client.put_object(Bucket=url.bucket, Key=url.key, Body=content)
            if self._client.get_object(Bucket=url.bucket, Key=url.key)["Body"].read() != content:
                raise RetryableError(f"{url} holds other bytes than were sent")

        self._persist(url, put)

    def delete(self, urls: Iterable[Url]) -> None:
        """Removes objects, one by one, as not every store can remove several; those that are not there any more are fine."""
        for url in urls:
            self._persist(url, lambda url=url: self._client.delete_object(Bucket=url.bucket, Key=url.key))

    def download(self, downloads: Sequence[Download], label: str) -> None:
        """Fetches objects to files; each is whole or not there."""
        self._move(downloads, label)

    def upload(self, files: Sequence[tuple[Path, Url]], label: str) -> dict[Url, str]:
        """Writes files to objects and reads them back; the SHA-256 of each."""
        digests = {url: sha256(path) for path, url in files}
        waiting = list(files)
        for _ in range(ROUNDS):
            self._move([Upload(path, url) for path, url in waiting], label)
            back = {url: ReadBack(path, url) for path, url in waiting}
            self._move(list(back.values()), f"{label}, read back")
            waiting = [(path, url) for path, url in waiting if back[url].digest() != digests[url]]
            if not waiting:
                return digests
            log.warning("%s holds other bytes than were sent: sent again", waiting[0][1])
        raise RetryableError(f"{waiting[0][1]} holds other bytes than were sent, each of {ROUNDS} times")

    def write_file(self, path: Path, url: Url) -> None:
        """A file to an object, its parts side by side, without a word; whoever reads it must know its digest."""
        config = FileConfig(multipart_threshold=PARTS_OF, multipart_chunksize=PARTS_OF, max_concurrency=AT_ONCE // 2)
        self._persist(url, lambda: self._client.upload_file(str(path), url.bucket, url.key, Config=config))

    def _list(self, url: Url, start: str, most: int = 0) -> list[Object]:
        def pages() -> list[Object]:
            paginator = self._client.get_paginator("list_objects_v2")
            limit = {"PaginationConfig": {"MaxItems": most}} if most else {}
            found = []
            for page in paginator.paginate(Bucket=url.bucket, Prefix=start, **limit):
                poll()
                found += [_object(url.bucket, entry) for entry in page.get("Contents", [])]
            return found

        return self._persist(url, pages)

    def _persist(self, url: Url, call: Callable[[], T]) -> T:
        """What `call` gives, tried again while it fails as it need not the next time."""
        for attempt in range(ROUNDS):
            poll()
            try:
                return call()
            except Exception as error:
                told = as_ours(error, url)
                if not isinstance(told, RetryableError) or attempt + 1 == ROUNDS:
                    raise told from error
                log.debug("%s; tried again", told)
            _wait(attempt)
        raise AssertionError("a last round returns or raises")

    def _move(self, transfers: Sequence[Transfer], label: str) -> None:
        """Moves all, several at a time; those that fail are tried again. Raises what the first of the rest failed by."""
        waiting = list(transfers)
        for attempt in range(ROUNDS):
            failed = self._round(waiting, label)
            if not failed:
                return
            lost = next((error for _, error in failed if not isinstance(error, RetryableError)), None)
            if lost or attempt + 1 == ROUNDS:
                error = lost or failed[0][1]
                more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
                raise type(error)(f"{error}{more}") from error
            waiting = [transfer for transfer, _ in failed]
            log.warning("%s: %d of %d are tried again: %s", label, len(waiting), len(transfers), failed[0][1])
            _wait(attempt)

    def _round(self, transfers: Sequence[Transfer], label: str) -> list[tuple[Transfer, FivefoldError]]:
        """Moves each once; those that failed."""
        moved = Moved()
        config = TransferConfig(
            multipart_threshold=PARTS_OF,
            multipart_chunksize=PARTS_OF,
            max_request_concurrency=AT_ONCE,
            num_download_attempts=1,
        )
        failed: list[tuple[Transfer, FivefoldError]] = []

        def steps(manager: TransferManager) -> Iterator[int]:
            under_way: dict[TransferFuture, Transfer] = {}
            for transfer in transfers:
                under_way[transfer.start(manager, [moved])] = transfer
                yield moved.take()
            while under_way:
                for future in [future for future in under_way if future.done()]:
                    transfer = under_way.pop(future)
                    if error := _outcome(future, transfer):
                        failed.append((transfer, error))
                yield moved.take()
                time.sleep(SECONDS_BETWEEN_LOOKS if under_way else 0)

        with TransferManager(self._client, config) as manager:  # which cancels the rest when an error leaves it
            for _ in track(steps(manager), sum(transfer.size for transfer in transfers), label, bytes_of=int):
                pass  # the work is in the steps
        return failed


def _outcome(future: TransferFuture, transfer: Transfer) -> FivefoldError | None:
    """What a transfer that has ended failed by."""
    try:
        future.result()
        problem = transfer.problem()
    except Exception as error:
        return as_ours(error, transfer.url)
    return RetryableError(f"{transfer.url} arrived with {problem}") if problem else None


def _object(bucket: str, entry: dict[str, Any]) -> Object:
    return Object(Url(bucket, entry["Key"]), entry["Size"], entry["ETag"], entry["LastModified"].timestamp())


def _wait(attempt: int) -> None:
    """Backs off, longer each time, by a random part of it so that many clients do not come back together."""
    until = time.monotonic() + min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
    while time.monotonic() < until:
        poll()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _connected() -> Any:
    try:
        session = boto3.session.Session()
        # Tries are ours, since between two of them a signal is looked for; a call that is under way is waited for.
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=SECONDS_OF_SILENCE,
            max_pool_connections=2 * AT_ONCE,
            request_checksum_calculation="when_required",
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
