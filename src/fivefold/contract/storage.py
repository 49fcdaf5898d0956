"""Channels and outputs at `s3://bucket/prefix`, as folders of this process.

A channel is fetched when it is first asked for. Of an output what its stages left there is fetched at the start, so a
stage that has nothing to do finds its record, and written files are sent when it ends (`attempts` says how they lie).
Checkpoints go up while the training goes on, and come back at its start.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fivefold.contract.files import check_space, one_at_a_time, read_json, tree_files
from fivefold.contract.s3 import attempts
from fivefold.contract.s3.attempts import FILES, START, Attempt, Stored
from fivefold.contract.s3.urls import Url
from fivefold.contract.stages import RECORD
from fivefold.errors import DataError, MissingInputError, SettingsError

if TYPE_CHECKING:
    from fivefold.contract.s3.checkpoints import CheckpointSync
    from fivefold.contract.s3.client import Store

log = logging.getLogger("fivefold")

SECONDS_TO_ABANDON = 86_400.0
"""An attempt without a marker that nobody has written to for so long is removed."""

MAX_KEY_BYTES, OUR_KEY_BYTES = 1024, 300
"""Bytes of the longest key of S3, and how many of them the name of an attempt and of a file in it may take."""
MAX_NAME_BYTES = 255
"""Bytes of the longest file name of common file systems."""

KINDS = ("in", "out", "checkpoints")
SCRATCH = "fivefold-"
"""How the names of folders begin that a process has for itself."""
PLACE = re.compile(rf"[^\s'\"(]*/{SCRATCH}\w+/(?:{'|'.join(KINDS)})/")


PASSWORD = re.compile(r"(?<=://)[^\s/'\"]+@")
"""What stands before the host in a URL: a user, a password, a key."""


def shown(text: str) -> str:
    """A message with the URLs that paths in it stand for, and without the passwords of URLs."""
    return PASSWORD.sub("***@", PLACE.sub("s3://", text))


@dataclass
class Output:
    """An output's URL, its folder here, and the state of the files that were there at the start."""

    url: Url
    path: Path
    fetched: Mapping[Path, tuple[int, int]]
    replaced: list[Attempt] = field(default_factory=list)


@dataclass
class Remote:
    """The URLs of one job, and their folders below `scratch`; a job that has none has nothing to do here.

    To be used as a context: on leaving it the last checkpoint goes up.
    """

    scratch: Path
    channels: dict[Path, Url] = field(default_factory=dict)
    waiting: dict[Path, list[Stored]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    checkpoints: "CheckpointSync | None" = None

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()

    @cached_property
    def store(self) -> "Store":
        """The client; boto3 is loaded where a URL is given, and nowhere else."""
        from fivefold.contract.s3.client import Store

        return Store()

    def channel(self, url: Url) -> Path:
        """The path that the object or the prefix will have once `fetch` is called.

        Raises MissingInputError where nothing is there.
        """
        _check_names(url, url.key)
        path = self._place("in", url)
        self.waiting[path] = self._found(url)
        self.channels[path] = url
        return path

    def names(self, url: Url) -> list[str]:
        """The names of the files below a URL; of one object the empty one. Errors as for `channel`."""
        return [each.name for each in self._found(url)]

    def fetch(self, path: Path, only: tuple[str, ...] = ("",)) -> None:
        """Brings what a channel's path stands for, unless it is there; `only` the files whose names end in one of these.

        Processes that share `scratch` fetch in turns, and none what another one has brought.
        """
        if path in self.waiting:
            with one_at_a_time(self.scratch):
                wanted = [each for each in self.waiting.pop(path) if each.name.endswith(only)]
                stored = [each for each in wanted if not (path / each.name if each.name else path).exists()]
                self._download(stored, path, str(self.channels[path]))

    def source(self, path: Path) -> str | None:
        """The URL that a channel's path stands for; None for a path of this machine."""
        return str(self.channels[path]) if path in self.channels else None

    def output(self, url: Url) -> Path:
        """The folder that stands for an output's URL, with what finished stages left there.

        Raises SettingsError where nothing may be written there, or removed.
        """
        _check_length(url)
        path = self._place("out", url)
        if any(output.url == url for output in self.outputs):
            return path
        self._probe(url)
        path.mkdir(parents=True, exist_ok=True)
        stored = attempts.visible(self.store, url, self.store.starting(url, START))
        self._download(stored, path, str(url))
        self.outputs.append(Output(url, path, {path / each.name: _state(path / each.name) for each in stored}))
        return path

    def begin(self, stage: str) -> None:
        """Takes back the markers of this stage's earlier attempts, records first: from here on they do not count."""
        for output in self.outputs:
            found = attempts.sorted_out(output.url, self.store.starting(output.url, START))[1]
            output.replaced = [attempt for attempt in found if attempt.stage == stage and attempt.marker]
        taken = [each.marker.url for output in self.outputs for each in output.replaced if each.marker]
        if taken:  # where there is no URL at all, not even boto3 is imported
            self.store.delete(sorted(taken, key=lambda url: url.name != RECORD))

    def publish(self, stage: str, record: Path, made: Sequence[Path]) -> None:
        """Sends what the stage wrote, its record last of all; then removes the attempts that this one replaces.

        `made` are the files that the record names.
        """
        facts = read_json(record)
        name = attempts.new_name(stage)
        # the folder of the record is the last
        for output in sorted(self.outputs, key=lambda output: output.path == record.parent):
            files = self._written(output, record, made)
            urls = {output.url / name / path.relative_to(output.path).as_posix(): path for path in files}
            digests = self.store.upload([(path, url) for url, path in urls.items()], f"to {output.url}")
            named = {url.below(output.url / name): digest for url, digest in digests.items()}
            marker = RECORD if output.path == record.parent else FILES
            self.store.write(output.url / name / marker, attempts.marker(facts, named))
            log.info("%s: %d files at %s", stage, len(files), output.url / name)
        for output in self.outputs:
            self._remove_old(output, stage, name)

    def keep_checkpoints(self, url: Url) -> Path:
        """The folder that stands for a URL of checkpoints; errors as for `output`."""
        _check_length(url)
        self._probe(url)
        path = self._place("checkpoints", url)
        path.mkdir(parents=True, exist_ok=True)
        from fivefold.contract.s3.checkpoints import CheckpointSync

        self.checkpoints = CheckpointSync(self.store, url, path)
        return path

    def keep(self, path: Path) -> None:
        """Has a checkpoint that was just written sent, in the background."""
        if self.checkpoints is not None:
            self.checkpoints.send(path)

    def restore(self, own: Path) -> set[str]:
        """Brings the newest checkpoints of a key into its folder; the names of other keys' ones."""
        return set() if self.checkpoints is None else self.checkpoints.restore(own)

    def forget(self, own: Path) -> None:
        """Removes a key's checkpoints, once its stage is done."""
        if self.checkpoints is not None:
            self.checkpoints.forget(own)

    def _probe(self, url: Url) -> None:
        probe = url / f".probe.{secrets.token_hex(4)}"
        self.store.write(probe, b"probe")
        self.store.delete([probe])

    def _found(self, url: Url) -> list[Stored]:
        if url.key and (one := self.store.find(url)):
            return [Stored("", one)]
        found = attempts.visible(self.store, url, self.store.below(url))
        if not found:
            raise MissingInputError(f"{url}: nothing is there, and no finished stage has written there")
        return found

    def _place(self, kind: str, url: Url) -> Path:
        return self.scratch / kind / url.bucket / url.key

    def _download(self, stored: Sequence[Stored], path: Path, label: str) -> None:
        if not stored:
            return
        from fivefold.contract.s3.client import Download

        if archived := self.store.find_archived(each.object for each in stored):
            raise MissingInputError(
                f"{archived.url} is archived (storage class {archived.storage_class}); restore it and the others below {label} "
                "(aws s3api restore-object), then run the same command"
            )
        for each in stored:
            _check_names(each.object.url, each.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path.parent, sum(each.object.size for each in stored))
        files = [Download(each.object, path / each.name if each.name else path, each.digest) for each in stored]
        self.store.download(files, f"from {label}")

    def _written(self, output: Output, record: Path, made: Sequence[Path]) -> list[Path]:
        """The files in an output's folder that are the stage's own: new ones, changed ones, and those that its record names."""
        inner = [
            other.path for other in self.outputs if other.path != output.path and other.path.is_relative_to(output.path)
        ]
        return [
            path
            for path in tree_files(output.path)
            if path != record
            and not any(path.is_relative_to(other) for other in inner)
            and (path in made or output.fetched.get(path) != _state(path))
        ]

    def _remove_old(self, output: Output, stage: str, own: str) -> None:
        """Removes the objects of replaced attempts, and of those that were left half-done long ago."""
        found = attempts.sorted_out(output.url, self.store.starting(output.url, START))[1]
        replaced = {each.url for each in output.replaced}
        long_ago = time.time() - SECONDS_TO_ABANDON
        for each in found:
            newest = max(item.modified for item in each.objects.values())
            abandoned = each.stage == stage and each.marker is None and newest <= long_ago
            if each.url.name != own and (each.url in replaced or abandoned):
                self.store.delete(held.url for held in each.objects.values())


def _check_length(url: Url) -> None:
    """Raise a SettingsError if the keys below `url` would be longer than S3 allows."""
    if len(url.key.encode()) > MAX_KEY_BYTES - OUR_KEY_BYTES:
        raise SettingsError(
            f"{url}: this key has {len(url.key.encode())} bytes, and {MAX_KEY_BYTES - OUR_KEY_BYTES} are the most that leave room "
            "for the files below it; give a shorter prefix"
        )
    _check_names(url, url.key)


def _check_names(url: Url, key: str) -> None:
    """Raise a DataError if a part of `key` is longer than a file name may be."""
    for name in key.split("/"):
        if len(name.encode()) > MAX_NAME_BYTES:
            raise DataError(
                f"{url}: {name[:40]!r}… is longer than {MAX_NAME_BYTES} bytes, which no file system stores; rename it"
            )


def _state(path: Path) -> tuple[int, int]:
    """What tells whether a file was written since: its moment and its node."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino
