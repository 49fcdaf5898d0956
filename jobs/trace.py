"""`python -m jobs trace PATH [--check]`: show the origin of an artifact, back to the images.

PATH is a file that a stage wrote, its folder, or its stage.json, local or at s3://. --check recomputes every
digest: of each stage's outputs and inputs, and so of the images.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fivefold.contract.artifacts import changed_outputs, channel_digest
from fivefold.contract.files import tree_files
from fivefold.contract.record import read_record
from fivefold.contract.s3.sync import SCRATCH, S3Sync, with_urls
from fivefold.contract.s3.urls import Url, is_url, parse
from fivefold.contract.stage_specs import RECORD
from fivefold.errors import DataError, FivefoldError, MissingInputError, SettingsError
from fivefold.signals import defer_signals

PRODUCERS = {
    "folds": ("split",),
    "model": ("train-fold", "distill", "train"),
    "predictions": ("ensemble",),
    "ensemble": ("ensemble",),
    "runs": ("ensemble", "train-fold"),
}
"""The stages whose results a channel contains. Other channels contain no stage's result."""


def main(arguments: Sequence[str]) -> int:
    """Print the tree of records; with --check raise a DataError with all changes, or return 0 if there are none."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    paths = [argument for argument in arguments if argument != "--check"]
    if len(paths) != 1 or paths[0].startswith("-"):
        raise SettingsError("trace takes one path, e.g. python -m jobs trace runs/first/ensemble/output --check")
    with defer_signals(), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        tracer = Tracer(Path(scratch), check="--check" in arguments)
        tracer.show(tracer.find_record(paths[0]))
        if tracer.problems:
            raise DataError(f"{len(tracer.problems)} differences: {'; '.join(tracer.problems[:10])}")
        if tracer.check:
            print(f"unchanged: {len(tracer.shown)} records with their outputs and inputs")
    return 0


class Tracer:
    """Follow records to the records of their inputs. From s3:// fetch only the records, or with `check` everything."""

    def __init__(self, scratch: Path, check: bool) -> None:
        self.scratch, self.check = scratch, check
        self.shown: set[Path] = set()
        self.problems: list[str] = []
        self._remote = S3Sync(scratch)
        self._fetched: dict[str, Path | None] = {}

    def find_record(self, text: str) -> Path:
        """Return the record of the stage that wrote the file or folder at a path or URL.

        Raise a MissingInputError if there is none, a DataError if a folder has several.
        """
        path = Path(text) if not is_url(text) else self._fetch_file_or_folder(parse(text, "trace"))
        if path.name.endswith(RECORD) and path.exists():
            return path
        folders = [path, path / "model", path / "output"] if path.is_dir() else path.resolve().parents
        records = [record for folder in folders for record in sorted(folder.glob(f"*{RECORD}"))]
        if not path.is_dir():
            records = [r for r in records if any(Path(name).name == path.name for name in read_record(r)["outputs"])]
        if not path.exists() or not records:
            raise MissingInputError(f"no record ({RECORD}) of {path}; give a stage's folder, or a file that it wrote")
        if path.is_dir() and len(records) > 1:
            raise DataError(f"{path} has the records of several stages: give one of {', '.join(map(str, records))}")
        return records[0]

    def show(self, path: Path, label: str = "", indent: str = "") -> None:
        """Print the lines of a record, then indented those of all its inputs; each record is described once."""
        path = path.resolve()
        record, repeated = read_record(path), path in self.shown
        suffix = " (above)" if repeated else ""
        print(with_urls(f"{indent}{label}{record['stage']}: {display_path(path.parent)}{suffix}"))
        if repeated:
            return
        self.shown.add(path)
        print(*(f"{indent}   {line}" for line in describe_record(record)), sep="\n")
        channels = {name: self._resolve(path.parent, places) for name, places in record["sources"].items()}
        for name, place in channels.items():
            producers = self._producers(name, place, path)
            for producer in producers:
                self.show(producer, f"{name} <- ", f"{indent}   ")
            if not producers:
                print(with_urls(f"{indent}   {name}: {display_path(place) if place else 'missing'}"))
        if self.check:
            self.problems += [f"{path}: {problem}" for problem in self._changes(path, record, channels)]

    def _producers(self, channel: str, place: Path | None, path: Path) -> list[Path]:
        """Return the records in a channel whose stages made it, except `path`, and without a student beside fold models."""
        if place is None or channel not in PRODUCERS:
            return []
        records = [file for file in tree_files(place.resolve()) if file.name.endswith(RECORD) and file != path]
        stages = {file: read_record(file)["stage"] for file in records}
        stages = {file: stage for file, stage in stages.items() if stage in PRODUCERS[channel]}
        return [file for file, stage in stages.items() if stage != "distill"] or list(stages)

    def _resolve(self, folder: Path, places: Sequence[str]) -> Path | None:
        """Return a channel's place: its URL, relative to its record's `folder`, or absolute; None if it is missing."""
        if not is_url(places[1]):
            return next((place for place in (folder / places[0], Path(places[1])) if place.exists()), None)
        if places[1] not in self._fetched:
            try:
                self._fetched[places[1]] = self._fetch(parse(places[1], "a record"))
            except MissingInputError:
                self._fetched[places[1]] = None
        return self._fetched[places[1]]

    def _fetch_file_or_folder(self, url: Url) -> Path:
        try:
            return self._fetch(url)
        except MissingInputError:
            return self._fetch(url.parent, url.name) / url.name

    def _fetch(self, url: Url, *files: str) -> Path:
        path = self._remote.channel(url)
        self._remote.fetch(path, only=("",) if self.check else (RECORD, *files))
        return path

    def _changes(self, path: Path, record: Mapping[str, Any], channels: Mapping[str, Path | None]) -> Iterator[str]:
        """Yield the differences from a record: of its outputs and of its channels."""
        roots = {name: path.parent / place for name, place in record["roots"].items()}
        yield from (f"{name} is missing or changed" for name in changed_outputs(record["outputs"], roots))
        yield from (f"its channel {name!r} is missing" for name, place in channels.items() if place is None)
        for name, digest in record["inputs"].items():
            if (place := channels.get(name)) is None or digest == "given":
                continue
            try:
                scratch = Path(tempfile.mkdtemp(dir=self.scratch))
                if channel_digest(name, place, scratch, record["settings"], record["stage"]) != digest:
                    yield f"the contents of its channel {name!r} ({place}) changed"
            except FivefoldError as error:
                yield f"its channel {name!r} is no longer readable: {error}"


def display_path(path: Path) -> str:
    """Return a path relative to the current folder if it lies below, else the absolute path."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def describe_record(record: Mapping[str, Any]) -> list[str]:
    """Return lines with a record's time, key, versions and figures."""
    metrics = [f"{name} {value:g}" for name, value in record["metrics"].items() if isinstance(value, int | float)]
    code = f"code {record['code']}, torch {record['packages'].get('torch')}"
    first = f"{record.get('finished', '')}, key {record['key'][:12]}, {code}, {record.get('wall_seconds', 0):.0f} s"
    return [first, *([", ".join(metrics)] if metrics else [])]
