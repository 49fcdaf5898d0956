"""Provenance of an artifact: the record of its stage, and recursively the records of that stage's inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fivefold.contract.artifacts import channel_digest
from fivefold.contract.files import read_json, sha256, tree_files
from fivefold.contract.stage_specs import RECORD, STAGES
from fivefold.errors import DataError, FivefoldError, MissingInputError

PRODUCERS = {
    "folds": ("split",),
    "model": ("train-fold", "distill", "train"),
    "predictions": ("ensemble",),
    "ensemble": ("ensemble",),
    "runs": ("ensemble", "train-fold"),
}
"""The stages whose results a channel contains. Other channels contain no stage's result."""
SIBLINGS = ("model", "output")
Resolve = Callable[[Path, Sequence[str]], Path | None]


class _RecordSchema(BaseModel):
    """The fields that tracing needs in a record."""

    model_config = ConfigDict(strict=True)
    key: str
    sources: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    roots: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    settings: dict[str, Any]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ResultNode:
    """A stage's record at `path`. `inputs` has each channel's location (None: missing) and the records of its producers."""

    path: Path
    record: Mapping[str, Any]
    inputs: Mapping[str, tuple[Path | None, tuple["ResultNode", ...]]]

    @property
    def name(self) -> str:
        return str(self.record["stage"])

    def walk(self) -> list["ResultNode"]:
        """Return this record and all records that it depends on, each once, dependencies first."""
        nodes = {
            node.path: node
            for _, dependencies in self.inputs.values()
            for dependency in dependencies
            for node in dependency.walk()
        }
        return [*nodes.values(), self]


def resolve_path(folder: Path, places: Sequence[str]) -> Path | None:
    """Return a channel's location: relative to its record's folder, else absolute; None if neither exists."""
    return next((place for place in (folder / places[0], Path(places[1])) if place.exists()), None)


def trace(path: Path, resolve: Resolve = resolve_path, seen: tuple[Path, ...] = ()) -> ResultNode:
    """Return the record at `path` with all records that it depends on. `resolve` maps a channel's recorded locations to a path."""
    path = path.resolve()
    facts = read_record(path)
    read: dict[str, tuple[Path | None, tuple[ResultNode, ...]]] = {}
    for channel, places in facts["sources"].items():
        place, producers = resolve(path.parent, places), PRODUCERS.get(channel, ())
        records = [
            record
            for record in (tree_files(place.resolve()) if place is not None and producers else [])
            if record.name.endswith(RECORD) and record not in (*seen, path)
        ]
        stages = {record: stage for record in records if (stage := read_record(record)["stage"]) in producers}
        # ignore a student beside fold models
        chosen = [record for record, stage in stages.items() if stage != "distill"] or list(stages)
        dependencies = tuple(trace(record, resolve, (*seen, path)) for record in chosen)
        read[channel] = place and place.resolve(), dependencies
    return ResultNode(path, facts, read)


def find_record(path: Path) -> Path:
    """Return the record of the stage that wrote `path`: a record, a stage's folder, its model or output, or a file in one of these.

    Raise a MissingInputError if there is none, a DataError if there are several.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; give a file or a folder that a stage wrote")
    if path.name.endswith(RECORD):
        return path
    if path.is_dir():
        records = [record for folder in (path, *(path / name for name in SIBLINGS)) for record in _find_records(folder)]
        if len(records) > 1:
            names = ", ".join(str(record) for record in records[:6])
            raise DataError(f"{path} contains results of several stages: give one of {names}")
        if records:
            return records[0]
    for folder in path.resolve().parents:
        for record in _find_records(folder):
            if _lists_output(record, path):
                return record
    raise MissingInputError(f"no record ({RECORD}) of {path}; give a stage's folder, model or output")


def read_record(path: Path) -> dict[str, Any]:
    """Return the record at `path`; raise a DataError unless it is one and has the locations of its files."""
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("stage") not in STAGES:
        raise DataError(f"{path} is not a record of a stage")
    try:
        _RecordSchema.model_validate(facts)
    except ValidationError as error:
        names = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
        raise DataError(f"{path} cannot be traced, it has no {', '.join(names)}: run its stage again") from None
    return facts


def verify(node: ResultNode, scratch: Path) -> list[str]:
    """Return the deviations from a record: missing or changed outputs, missing channels or channels with other contents."""
    places = {name: place for name, (place, _) in node.inputs.items() if place is not None}
    problems = [f"{node.path}: its channel {name!r} is missing" for name in node.inputs if name not in places]
    for name, digest in node.record["outputs"].items():
        root, _, inside = name.partition("/")
        file = node.path.parent / node.record["roots"].get(root, root) / inside
        if not file.is_file() or sha256(file) != digest:
            problems.append(f"{file}: {'changed since the stage wrote it' if file.is_file() else 'missing'}")
    for channel, digest in node.record["inputs"].items():
        if channel not in places or digest == "given":
            continue
        try:
            if channel_digest(channel, places[channel], scratch, node.record["settings"], node.name) != digest:
                problems.append(f"{node.path}: the contents of its channel {channel!r} ({places[channel]}) changed")
        except FivefoldError as error:
            problems.append(f"{node.path}: its channel {channel!r} is no longer readable: {error}")
    return problems


def _find_records(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{RECORD}")) if folder.is_dir() else []


def _lists_output(record: Path, path: Path) -> bool:
    """Return whether the record lists the file among its outputs. A folder always counts as listed."""
    outputs = {name.partition("/")[2] for name in read_record(record)["outputs"]}
    inside = path.resolve().relative_to(record.parent.resolve()).as_posix()
    names = {inside, *(inside.partition("/")[2] for name in SIBLINGS if inside.startswith(f"{name}/"))}
    return path.is_dir() or bool(names & outputs)
