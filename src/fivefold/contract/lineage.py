"""Where an artifact came from: the record of the stage that made it, and those of all that the stage read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fivefold.contract.artifacts import channel_digest
from fivefold.contract.files import read_json, sha256, tree_files
from fivefold.contract.stages import RECORD, STAGES
from fivefold.errors import DataError, FivefoldError, MissingInputError

PRODUCERS = {
    "folds": ("split",),
    "model": ("train-fold", "distill", "train"),
    "predictions": ("ensemble",),
    "ensemble": ("ensemble",),
    "runs": ("ensemble", "train-fold"),
}
"""The stages whose results a channel holds; what the other channels hold no stage has made."""
SIBLINGS = ("model", "output")
Resolve = Callable[[Path, Sequence[str]], Path | None]


class _Fields(BaseModel):
    """What a record must hold to be traced."""

    model_config = ConfigDict(strict=True)
    key: str
    sources: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    roots: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    settings: dict[str, Any]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A stage's record at `path`, and by channel what it read: the place (None: gone) and the records of its producers."""

    path: Path
    facts: Mapping[str, Any]
    read: Mapping[str, tuple[Path | None, tuple["Node", ...]]]

    @property
    def name(self) -> str:
        return str(self.facts["stage"])

    def walk(self) -> list["Node"]:
        """The record and all behind it, each once, the ones that were read first."""
        nodes = {node.path: node for _, behind in self.read.values() for below in behind for node in below.walk()}
        return [*nodes.values(), self]


def resolve_path(folder: Path, places: Sequence[str]) -> Path | None:
    """A channel's place: as seen from its record's folder, else the absolute one; None where neither is there."""
    return next((place for place in (folder / places[0], Path(places[1])) if place.exists()), None)


def trace(path: Path, resolve: Resolve = resolve_path, seen: tuple[Path, ...] = ()) -> Node:
    """The record at `path` with all behind it; `resolve` finds the place of a channel from what a record says of it."""
    path = path.resolve()
    facts = read_record(path)
    read: dict[str, tuple[Path | None, tuple[Node, ...]]] = {}
    for channel, places in facts["sources"].items():
        place, producers = resolve(path.parent, places), PRODUCERS.get(channel, ())
        records = [
            record
            for record in (tree_files(place.resolve()) if place is not None and producers else [])
            if record.name.endswith(RECORD) and record not in (*seen, path)
        ]
        stages = {record: stage for record in records if (stage := read_record(record)["stage"]) in producers}
        # a student that lies beside fold models is none of them
        chosen = [record for record, stage in stages.items() if stage != "distill"] or list(stages)
        behind = tuple(trace(record, resolve, (*seen, path)) for record in chosen)
        read[channel] = place and place.resolve(), behind
    return Node(path, facts, read)


def find_record(path: Path) -> Path:
    """The record of the stage that made `path`: a record, a stage's folder, its model or output, or a file in one of these.

    Raises MissingInputError where there is none, and DataError where there are several.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; give a file or a folder that a stage has made")
    if path.name.endswith(RECORD):
        return path
    if path.is_dir():
        records = [record for folder in (path, *(path / name for name in SIBLINGS)) for record in _records_in(folder)]
        if len(records) > 1:
            names = ", ".join(str(record) for record in records[:6])
            raise DataError(f"several stages made what lies in {path}: give one of {names}")
        if records:
            return records[0]
    for folder in path.resolve().parents:
        for record in _records_in(folder):
            if _lists_output(record, path):
                return record
    raise MissingInputError(f"no stage left a record ({RECORD}) of {path}; give a stage's folder, model or output")


def read_record(path: Path) -> dict[str, Any]:
    """The record at `path`; a DataError unless it is one, and says where all that it names lay."""
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("stage") not in STAGES:
        raise DataError(f"{path} is no record of a stage")
    try:
        _Fields.model_validate(facts)
    except ValidationError as error:
        names = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
        raise DataError(f"{path} cannot be traced, it has no {', '.join(names)}: run its stage again") from None
    return facts


def verify(node: Node, scratch: Path) -> list[str]:
    """What is not as the record says: outputs that are missing or changed, channels that hold something else."""
    places = {name: place for name, (place, _) in node.read.items() if place is not None}
    problems = [f"{node.path}: its channel {name!r} is no longer there" for name in node.read if name not in places]
    for name, digest in node.facts["outputs"].items():
        root, _, inside = name.partition("/")
        file = node.path.parent / node.facts["roots"].get(root, root) / inside
        if not file.is_file() or sha256(file) != digest:
            problems.append(f"{file}: {'changed since it was made' if file.is_file() else 'missing'}")
    for channel, digest in node.facts["inputs"].items():
        if channel not in places or digest == "given":
            continue
        try:
            if channel_digest(channel, places[channel], scratch, node.facts["settings"], node.name) != digest:
                problems.append(f"{node.path}: its channel {channel!r} ({places[channel]}) holds something else now")
        except FivefoldError as error:
            problems.append(f"{node.path}: its channel {channel!r} cannot be read any more: {error}")
    return problems


def _records_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{RECORD}")) if folder.is_dir() else []


def _lists_output(record: Path, path: Path) -> bool:
    """Whether the record names the file among its outputs; a folder stands for all that is in it."""
    outputs = {name.partition("/")[2] for name in read_record(record)["outputs"]}
    inside = path.resolve().relative_to(record.parent.resolve()).as_posix()
    names = {inside, *(inside.partition("/")[2] for name in SIBLINGS if inside.startswith(f"{name}/"))}
    return path.is_dir() or bool(names & outputs)
