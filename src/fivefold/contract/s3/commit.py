"""Layout of outputs in a store: a stage overwrites no object, and incomplete uploads do not count.

A stage uploads its files below `attempt-<stage>-<time>-<id>/` of the output's URL, and a marker last: its record, `stage.json`,
or `files.json` if the record belongs to another folder. The marker lists the files with their digests. For each stage a reader
uses the newest attempt with a marker, and only its files. So the upload of a killed writer never counts as complete, and two
writers (a retried pod and the dying one) never mix. Attempts are invisible to readers: a file has the path that the stage gave it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fivefold.contract.s3.urls import Url, has_long_name
from fivefold.contract.stage_specs import CLASSES, ENSEMBLE, FOLDS, HOLDOUT, MODEL, OOF, PREDICTIONS, RECORD, WEIGHTS
from fivefold.errors import DataError, RetryableError
from fivefold.log import log

if TYPE_CHECKING:
    from fivefold.contract.s3.client import S3Client, S3Object

FILES = "files.json"
MARKERS = (RECORD, FILES)
STAGE_FILES = {CLASSES, ENSEMBLE, FOLDS, HOLDOUT, MODEL, OOF, PREDICTIONS, RECORD, WEIGHTS}
"""Names of files that later stages read."""
COMMIT_PREFIX = "attempt-"
COMMIT_FOLDER = re.compile(
    rf"(?P<folder>(?:[^/]+/)*?{COMMIT_PREFIX}(?P<stage>[a-z]+(?:-[a-z]+)*)-\d{{8}}T\d{{6}}-[0-9a-f]{{8}})/"
)


@dataclass(frozen=True)
class Commit:
    """The objects that one run of a stage uploaded below a URL, by their relative names."""

    url: Url
    stage: str
    objects: dict[str, "S3Object"] = field(default_factory=dict)

    @property
    def marker(self) -> "S3Object | None":
        """Return the marker object, which exists if the attempt is complete, or None."""
        return next((self.objects[name] for name in MARKERS if name in self.objects), None)


@dataclass(frozen=True)
class VisibleFile:
    """A file for readers: its name below the URL, its object, and its SHA-256 if known."""

    name: str
    object: "S3Object"
    digest: str | None = None


def group_by_commit(url: Url, objects: Iterable["S3Object"]) -> tuple[dict[str, "S3Object"], list[Commit]]:
    """Divide the objects below a URL into those outside attempts, by name, and the attempts, complete or not. Ignore hidden ones."""
    plain: dict[str, S3Object] = {}
    attempts: dict[Url, Commit] = {}
    for item in objects:
        name = item.url.relative_to(url)
        if name.endswith("/") or not name or is_hidden(name):
            continue  # placeholder objects that consoles create for folders, and hidden files
        match = COMMIT_FOLDER.match(name)
        if match is None:
            plain[name] = item
        else:
            folder = url / match["folder"]
            attempts.setdefault(folder, Commit(folder, match["stage"])).objects[name[match.end() :]] = item
    return plain, [*attempts.values()]


def is_hidden(name: str) -> bool:
    """Return whether a part of a file's relative path starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def list_visible(store: "S3Client", url: Url, objects: Iterable["S3Object"]) -> list[VisibleFile]:
    """Return the files that a reader of `url` may use, sorted by name, without stage files that are beside a complete attempt.

    Raise a DataError for names that no file can have, a RetryableError if another process is replacing an attempt.
    """
    objects = list(objects)
    names = [item.url.relative_to(url) for item in objects]
    if hidden := sum(map(is_hidden, names)):
        log.info("%s: ignored %d hidden files", url, hidden)
    folders = {name.rpartition("/")[0] for name in names if not name.endswith("/")}
    marked = [name for name in names if name.endswith("/") and not is_hidden(name)]
    if empty := [name for name in marked if not any(f"{folder}/".startswith(name) for folder in folders)]:
        log.warning("%s: folders without any object: %s", url, ", ".join(sorted(empty)[:5]))
    plain, attempts = group_by_commit(url, objects)
    finished = {item.url.parent for item in attempts if item.marker}
    if ignored := sorted(n for n in plain if (url / n).parent in finished and (url / n).name in STAGE_FILES):
        log.warning("%s: ignored files that are not from the finished stage there: %s", url, ", ".join(ignored))
    files = {name: VisibleFile(name, item) for name, item in plain.items() if name not in ignored}
    complete = sorted((item for item in attempts if item.marker), key=_time_order)
    newest = {(item.url.parent, item.stage): item for item in complete}
    for attempt in sorted(newest.values(), key=_time_order):
        prefix = f"{attempt.url.parent.relative_to(url)}/" if attempt.url.parent != url else ""
        for stored in _files(store, attempt):
            name = prefix + stored.name
            if stored.name == RECORD and name in files:  # as in a folder with several stages
                name = f"{prefix}{attempt.stage}.{RECORD}"
            files[name] = VisibleFile(name, stored.object, stored.digest)
    _check_names(files, url)
    return [files[name] for name in sorted(files)]


def commit_record(record: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """Return a marker's bytes: the record, and the SHA-256 of each file of the attempt."""
    return (json.dumps({**record, "files": dict(files)}, indent=2, ensure_ascii=False) + "\n").encode()


def _time_order(attempt: Commit) -> tuple[float, Url]:
    return attempt.marker.modified, attempt.url


def _files(store: "S3Client", attempt: Commit) -> list[VisibleFile]:
    """Return the files that the marker of a complete attempt lists, and the record."""
    marker_object = attempt.marker
    try:
        files = dict(json.loads(store.read(marker_object.url))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{marker_object.url} is not the marker of a finished stage: run the stage again, or remove {attempt.url}"
        ) from error
    if missing := sorted(set(files) - set(attempt.objects)):
        raise RetryableError(
            f"{attempt.url} has no {missing[0]}, which {marker_object.url.name} lists: its stage is running again, or someone "
            "removed the file; try again later, or run the stage again"
        )
    listed = [VisibleFile(name, attempt.objects[name], str(digest)) for name, digest in files.items()]
    return [*listed, VisibleFile(RECORD, marker_object)] if marker_object.url.name == RECORD else listed


def _check_names(files: Mapping[str, VisibleFile], url: Url) -> None:
    folders = {name[:index] for name in files for index, letter in enumerate(name) if letter == "/"}
    for name in files:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name or name in folders or has_long_name(name):
            raise DataError(
                f"{str(url / name)[:1000]} cannot be a file: a part of it is empty, '..' or too long, or also a folder; rename it"
            )
