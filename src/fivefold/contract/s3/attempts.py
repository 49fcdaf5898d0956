"""How outputs lie in a store: a stage writes over nothing, and what it left half-done counts for nothing.

Its files go up below `attempt-<stage>-<time>-<id>/` of the output's URL, and a marker last: its record, `stage.json`, or
`files.json` where the record has its place in another folder. The marker names the files with their digests. Whoever
reads takes, of each stage, the newest attempt that has a marker, and just its files; so a killed writer is never taken
for a whole one, and two (a retried pod beside its dying twin) never mix. Seen from a reader attempts do not show: a
file has the path that it had where the stage wrote it.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.contract.files import below
from fivefold.contract.s3.urls import Url
from fivefold.contract.stages import CLASSES, ENSEMBLE, FOLDS, HOLDOUT, MODEL, OOF, PREDICTIONS, RECORD, WEIGHTS
from fivefold.errors import DataError, RetryableError

if TYPE_CHECKING:
    from fivefold.contract.s3.client import Object, Store

log = logging.getLogger("fivefold")

FILES = "files.json"
MARKERS = (RECORD, FILES)
OF_STAGES = {CLASSES, ENSEMBLE, FOLDS, HOLDOUT, MODEL, OOF, PREDICTIONS, RECORD, WEIGHTS}
"""Files that a later stage would take for a stage's own."""
START = "attempt-"
NAME = re.compile(START + r"([a-z]+(?:-[a-z]+)*)-\d{8}T\d{6}-[0-9a-f]{8}")


@dataclass(frozen=True)
class Attempt:
    """The objects that one run of a stage put below a URL, by their names there."""

    url: Url
    objects: Mapping[str, "Object"]

    @property
    def stage(self) -> str:
        """The stage's name, from the attempt's own."""
        found = NAME.fullmatch(self.url.name)
        assert found, self.url
        return found.group(1)

    @property
    def marker(self) -> "Object | None":
        """The object that says that the attempt is whole."""
        return next((self.objects[name] for name in MARKERS if name in self.objects), None)


@dataclass(frozen=True)
class Stored:
    """A file as a reader sees it: its name below the URL that is read, its object, and its SHA-256 where that is known."""

    name: str
    object: "Object"
    digest: str | None = None


def new_name(stage: str) -> str:
    """A name that no other attempt has."""
    return f"{START}{stage}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def sorted_out(url: Url, objects: Iterable["Object"]) -> tuple[dict[str, "Object"], list[Attempt]]:
    """The objects below a URL by their names: those of no attempt, and the attempts, whole or not. Hidden ones are left out."""
    plain: dict[str, Object] = {}
    attempts: dict[Url, dict[str, Object]] = {}
    for found in objects:
        name = found.url.below(url)
        parts = name.split("/")
        if not parts[-1] or is_hidden(name):
            continue  # the marks that consoles leave for folders, and hidden files, which no stage reads
        at = next((at for at, part in enumerate(parts[:-1]) if NAME.fullmatch(part)), None)
        if at is None:
            plain[name] = found
        else:
            folder = url / "/".join(parts[: at + 1])
            attempts.setdefault(folder, {})["/".join(parts[at + 1 :])] = found
    return plain, [Attempt(folder, held) for folder, held in attempts.items()]


def is_hidden(name: str) -> bool:
    """Whether a file below a URL, or a folder that it lies in, has a name that starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def visible(store: "Store", url: Url, objects: Iterable["Object"]) -> list[Stored]:
    """The files that a reader of `url` sees, sorted by name; of the files that stages read none that was put beside a whole attempt.

    Raises DataError for names that no file can have, RetryableError where an attempt is being replaced just now.
    """
    objects = list(objects)
    names = [each.url.below(url) for each in objects]
    folders = {name.rpartition("/")[0] for name in names if not name.endswith("/")}
    marked = [name for name in names if name.endswith("/") and not is_hidden(name)]
    if empty := [name for name in marked if not any(f"{folder}/".startswith(name) for folder in folders)]:
        log.warning("%s: folders without any object: %s", url, ", ".join(sorted(empty)[:5]))
    if hidden := sum(is_hidden(each.url.below(url)) for each in objects):
        log.info("left out of %s: %d hidden", url, hidden)
    plain, attempts = sorted_out(url, objects)
    seen = {name: Stored(name, found) for name, found in plain.items()}
    owned = {each.url.parent for each in attempts if each.marker}
    if left := sorted(name for name in seen if (url / name).parent in owned and (url / name).name in OF_STAGES):
        log.warning("%s: not of the finished stage there, and left out: %s", url, ", ".join(left))
    seen = {name: stored for name, stored in seen.items() if name not in left}
    whole = sorted((each for each in attempts if each.marker), key=lambda each: each.url.parent)
    for folder, group in groupby(whole, key=lambda each: each.url.parent):
        inside = folder.below(url)
        prefix = f"{inside}/" if folder != url else ""
        newest = {each.stage: each for each in sorted(group, key=_moment)}
        for at, attempt in enumerate(sorted(newest.values(), key=_moment)):
            for stored in _files(store, attempt):
                # as where several stages write to one folder: the first's record is stage.json
                name = f"{attempt.stage}.{RECORD}" if stored.name == RECORD and at else stored.name
                seen[prefix + name] = Stored(prefix + name, stored.object, stored.digest)
    _check_names(seen, url)
    return [seen[name] for name in sorted(seen)]


def marker(record: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """A marker's bytes: the record, with the SHA-256 of each file of the attempt."""
    return (json.dumps({**record, "files": dict(files)}, indent=2, ensure_ascii=False) + "\n").encode()


def _moment(attempt: Attempt) -> tuple[float, Url]:
    assert attempt.marker
    return attempt.marker.modified, attempt.url


def _files(store: "Store", attempt: Attempt) -> list[Stored]:
    """The files of a whole attempt, the record too, as its marker tells them."""
    found = attempt.marker
    assert found
    try:
        files = dict(json.loads(store.read(found.url))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{found.url} is no marker of a finished stage: run it again, or remove {attempt.url}"
        ) from error
    if absent := sorted(set(files) - set(attempt.objects)):
        raise RetryableError(
            f"{attempt.url} has no {absent[0]}, which {found.url.name} names: its stage is running again, or somebody "
            "removed it; try again later, or run the stage again"
        )
    every = [Stored(name, attempt.objects[name], str(digest)) for name, digest in files.items()]
    return [*every, Stored(RECORD, found)] if found.url.name == RECORD else every


def _check_names(seen: Mapping[str, Stored], url: Url) -> None:
    folders = {name[:at] for name in seen for at, letter in enumerate(name) if letter == "/"}
    for name in seen:
        below(Path("/folder"), name)
        if {"", "."} & set(name.split("/")) or "\0" in name or name in folders:
            raise DataError(
                f"{url / name} cannot be a file's name: it is empty in part, or the name of a folder too; rename it"
            )
