"""Sync channels, outputs and checkpoints at `s3://bucket/prefix` with local folders; `commit` describes the layout of outputs."""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fivefold.contract.files import check_space, folder_lock, read_json, sha256, tree_files
from fivefold.contract.s3 import commit
from fivefold.contract.s3.commit import COMMIT_PREFIX, FILES, VisibleFile
from fivefold.contract.s3.urls import Url
from fivefold.contract.stage_specs import RECORD
from fivefold.errors import MissingInputError, SettingsError
from fivefold.log import log

if TYPE_CHECKING:
    from fivefold.contract.s3.checkpoint_sync import CheckpointSync
    from fivefold.contract.s3.client import S3Client

STALE_AFTER_S = 86_400.0
"""An attempt without a marker is removed if nobody has written to it for this many seconds."""

MAX_KEY_BYTES = 1024 - 300
"""Bytes of the longest key of S3, without those for the names of an attempt and of a file in it."""

SCRATCH = "fivefold-"
"""Prefix of the names of temporary folders."""
LOCAL_FOLDER_PATTERN = re.compile(rf"(?<![^\s'\"(])[^\s'\"(]*/{SCRATCH}\w+/(?:in|out|checkpoints)/")

URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/'\"]+@")
"""The part before the host in a URL: a user, a password or a key."""


def with_urls(text: str) -> str:
    """Return a message with URLs in place of the local paths that represent them, and without credentials in URLs."""
    return URL_CREDENTIALS.sub("***@", LOCAL_FOLDER_PATTERN.sub("s3://", text))


@dataclass
class SyncedOutput:
    """An output's URL, its local folder, and the state of the files that were downloaded at the start."""

    url: Url
    path: Path
    fetched: Mapping[Path, tuple[int, int]]


@dataclass
class S3Sync:
    """The URLs of one job, and their local folders below `scratch`. Without URLs all methods do nothing.

    Use it as a context manager: the exit uploads the last checkpoint.
    """

    scratch: Path
    channels: dict[Path, Url] = field(default_factory=dict)
    pending: dict[Path, list[VisibleFile]] = field(default_factory=dict)
    outputs: list[SyncedOutput] = field(default_factory=list)
    checkpoints: "CheckpointSync | None" = None

    def __enter__(self) -> "S3Sync":
        return self

    def __exit__(self, *_: object) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()

    @cached_property
    def store(self) -> "S3Client":
        """Return the client. boto3 is imported only if there is a URL."""
        from fivefold.contract.s3.client import S3Client

        return S3Client()

    def channel(self, url: Url) -> Path:
        """Return the path that the object or the prefix has after `fetch`.

        Raise a MissingInputError if there is no object.
        """
        path = self._local_folder("in", url)
        self.pending[path] = self._list_visible(url)
        self.channels[path] = url
        return path

    def names(self, url: Url) -> list[str]:
        """Return the names of the files below a URL; the empty name for a single object. Errors as for `channel`."""
        return [stored.name for stored in self._list_visible(url)]

    def fetch(self, path: Path) -> None:
        """Download the missing files of a channel.

        Processes that share `scratch` download one after another, and skip files that another one has downloaded.
        """
        if path in self.pending:
            with folder_lock(self.scratch):
                stored = self.pending.pop(path)
                missing = [item for item in stored if not (path / item.name).exists()]
                self._download(missing, path, str(self.channels[path]))

    def output(self, url: Url) -> Path:
        """Return the local folder of an output's URL, with the files that finished stages left there.

        Raise a SettingsError if writing or deleting there is not allowed.
        """
        path = self._local_folder("out", url)
        if any(output.url == url for output in self.outputs):
            return path
        self._check_writable(url)
        path.mkdir(parents=True, exist_ok=True)
        stored = commit.list_visible(self.store, url, self.store.list_objects(url, COMMIT_PREFIX))
        self._download(stored, path, str(url))
        self.outputs.append(SyncedOutput(url, path, {path / item.name: _state(path / item.name) for item in stored}))
        return path

    def delete_previous(self, stage: str) -> None:
        """Delete this stage's earlier attempts, and incomplete ones older than a day; records and markers first."""
        urls = []
        for output in self.outputs:
            _, attempts = commit.group_by_commit(output.url, self.store.list_objects(output.url, COMMIT_PREFIX))
            for attempt in attempts:
                newest = max(item.modified for item in attempt.objects.values())
                if attempt.stage == stage and (attempt.marker or newest <= time.time() - STALE_AFTER_S):
                    urls += [item.url for item in attempt.objects.values()]
        if urls:  # without URLs, do not import boto3
            self.store.delete(sorted(urls, key=lambda url: (url.name != RECORD, url.name != FILES)))

    def publish(self, stage: str, record: Path, new_files: Sequence[Path]) -> None:
        """Upload the files that the stage wrote, its record last. `new_files` are the files that the record names."""
        if not self.outputs:
            return
        from fivefold.contract.s3.client import Upload

        facts = read_json(record)
        name = f"{COMMIT_PREFIX}{stage}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        # the folder of the record comes last
        for output in sorted(self.outputs, key=lambda output: output.path == record.parent):
            written = self._written(output, record, new_files)
            files = {path.relative_to(output.path).as_posix(): path for path in written}
            digests = {relative: sha256(path) for relative, path in files.items()}
            uploads = [Upload(path, output.url / name / relative) for relative, path in files.items()]
            self.store.transfer(uploads, f"to {output.url}")
            marker = RECORD if output.path == record.parent else FILES
            self.store.write(output.url / name / marker, commit.commit_record(facts, digests))
            log.info("%s: %d files at %s", stage, len(files), output.url / name)

    def checkpoint_folder(self, url: Url) -> Path:
        """Return the local folder of a URL of checkpoints. Errors as for `output`."""
        self._check_writable(url)
        path = self._local_folder("checkpoints", url)
        path.mkdir(parents=True, exist_ok=True)
        from fivefold.contract.s3.checkpoint_sync import CheckpointSync

        self.checkpoints = CheckpointSync(self.store, url, path)
        return path

    def _check_writable(self, url: Url) -> None:
        if len(url.key.encode()) > MAX_KEY_BYTES:
            raise SettingsError(f"{url}: the key has more than {MAX_KEY_BYTES} bytes; use a shorter prefix")
        probe = url / f".probe.{secrets.token_hex(4)}"
        self.store.write(probe, b"probe")
        self.store.delete([probe])

    def _list_visible(self, url: Url) -> list[VisibleFile]:
        if url.key and (object := self.store.head(url)):
            return [VisibleFile("", object)]
        files = commit.list_visible(self.store, url, self.store.list_objects(url))
        if not files:
            raise MissingInputError(f"{url}: no object exists there, and no finished stage has written there")
        return files

    def _local_folder(self, kind: str, url: Url) -> Path:
        return self.scratch / kind / url.bucket / url.key

    def _download(self, stored: Sequence[VisibleFile], path: Path, label: str) -> None:
        if not stored:
            return
        from fivefold.contract.s3.client import Download

        self.store.check_archived(item.object for item in stored)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path.parent, sum(item.object.size for item in stored))
        files = [Download(item.object, path / item.name, item.digest) for item in stored]
        self.store.transfer(files, f"from {label}")

    def _written(self, output: SyncedOutput, record: Path, recorded: Sequence[Path]) -> list[Path]:
        """Return the files in an output's folder that this stage wrote: new or changed files, and those that its record names."""
        others = [other.path for other in self.outputs if output.path in other.path.parents]
        return [
            path
            for path in tree_files(output.path)
            if path != record
            and not any(path.is_relative_to(other) for other in others)
            and (path in recorded or output.fetched.get(path) != _state(path))
        ]


def _state(path: Path) -> tuple[int, int]:
    """Return modification time and inode of a file, to detect later writes."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino
