"""Where an artifact came from: the record of the stage that made it, and those of all that the stage read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fivefold.contract.artifacts import channel_digest
from fivefold.contract.files import read_json, sha256, tree_files
from fivefold.contract.stages import RECORD, STAGES
from fivefold.errors import DataError, FivefoldError, MissingInputError

MAKERS = {
    "folds": ("split",),
    "model": ("train-fold", "distill", "train"),
    "predictions": ("ensemble",),
    "ensemble": ("ensemble",),
    "runs": ("ensemble", "train-fold"),
}
"""The stages whose results a channel holds; of the other channels nobody here made anything."""
NEIGHBOURS = ("model", "output")
Reach = Callable[[Path, Sequence[str]], Path | None]


def _is_table(value: Any, of: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


NEEDED: dict[str, Callable[[Any], bool]] = {
    "key": _is_text,
    "sources": partial(_is_table, of=lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_text, v))),
    "roots": partial(_is_table, of=_is_text),
    "inputs": partial(_is_table, of=_is_text),
    "outputs": partial(_is_table, of=_is_text),
    "settings": _is_table,
    "metrics": _is_table,
}
"""What a record must hold to be traced, each with what tells whether it is that."""


@dataclass(frozen=True)
class Made:
    """A stage's record at `path`, and what it read by channel: the places, and the records of those who made it.

    A place that is gone is None.
    """

    path: Path
    facts: Mapping[str, Any]
    read: Mapping[str, tuple[Path | None, tuple["Made", ...]]]

    @property
    def name(self) -> str:
        return str(self.facts["stage"])


def nearest(folder: Path, places: Sequence[str]) -> Path | None:
    """A channel's place: as seen from its record's folder, else the absolute one; None where neither is there."""
    return next((there for there in (folder / places[0], Path(places[1])) if there.exists()), None)


def traced(path: Path, reach: Reach = nearest, seen: tuple[Path, ...] = ()) -> Made:
    """The record at `path` with all behind it; `reach` finds the place of a channel from what a record says of it."""
    path = path.resolve()
    facts = read_record(path)
    read: dict[str, tuple[Path | None, tuple[Made, ...]]] = {}
    for channel, places in dict(facts["sources"]).items():
        place = reach(path.parent, places)
        makers = MAKERS.get(channel, ())
        behind = records_below(place.resolve()) if place is not None and makers else []
        stages = {each: read_record(each)["stage"] for each in behind if each not in (*seen, path)}
        made = [each for each, stage in stages.items() if stage in makers]
        # a student that lies beside fold models is none of them
        made = [each for each in made if stages[each] != "distill"] or made
        read[channel] = place and place.resolve(), tuple(traced(each, reach, (*seen, path)) for each in made)
    return Made(path, facts, read)


def find_record(path: Path) -> Path:
    """The record of the stage that made `path`: a record, a stage's folder, its model or output, or a file in one of these.

    Raises MissingInputError where there is none, and DataError where there are several.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; give a file or a folder that a stage has made")
    if path.name.endswith(RECORD):
        return path
    if path.is_dir():
        found = [each for folder in (path, *(path / name for name in NEIGHBOURS)) for each in records_in(folder)]
        if len(found) > 1:
            names = ", ".join(str(each) for each in found[:6])
            raise DataError(f"several stages made what lies in {path}: give one of {names}")
        if found:
            return found[0]
    for folder in path.resolve().parents:
        found = [each for each in records_in(folder) if has_made(each, path)]
        if found:
            return found[0]
    raise MissingInputError(f"no stage left a record ({RECORD}) of {path}; give a stage's folder, model or output")


def has_made(record: Path, path: Path) -> bool:
    """Whether the record names the file among its outputs; a folder stands for all that is in it."""
    outputs = {name.partition("/")[2] for name in read_record(record)["outputs"]}
    inside = path.resolve().relative_to(record.parent.resolve()).as_posix()
    names = {inside, *(inside.partition("/")[2] for name in NEIGHBOURS if inside.startswith(f"{name}/"))}
    return path.is_dir() or bool(names & outputs)


def records_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{RECORD}")) if folder.is_dir() else []


def records_below(folder: Path) -> list[Path]:
    return [path for path in tree_files(folder) if path.name.endswith(RECORD)]


def read_record(path: Path) -> dict[str, Any]:
    """The record at `path`; a DataError unless it is one, and says where all that it names lay."""
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("stage") not in STAGES:
        raise DataError(f"{path} is no record of a stage")
    if lacking := [name for name, fits in NEEDED.items() if not fits(facts.get(name))]:
        raise DataError(f"{path} cannot be traced, it has no {', '.join(lacking)}: run its stage again")
    return facts


def everything(made: Made) -> Iterator[Made]:
    """The record and all behind it, each once, the ones that were read first."""
    done: set[Path] = set()

    def walk(step: Made) -> Iterator[Made]:
        for _, behind in step.read.values():
            for each in behind:
                yield from walk(each)
        if step.path.resolve() not in done:
            done.add(step.path.resolve())
            yield step

    return walk(made)


def problems(made: Made, scratch: Path) -> list[str]:
    """What is not as the record says: outputs that are missing or changed, channels that hold something else."""
    gone = [name for name, (place, _) in made.read.items() if place is None]
    found = [f"{made.path}: its channel {name!r} is no longer there" for name in gone]
    for name, digest in made.facts["outputs"].items():
        root, _, inside = name.partition("/")
        file = made.path.parent / made.facts["roots"].get(root, root) / inside
        if not file.is_file() or sha256(file) != digest:
            found.append(f"{file}: {'missing' if not file.is_file() else 'changed since it was made'}")
    for channel, digest in made.facts["inputs"].items():
        folder, _ = made.read.get(channel, (None, ()))
        if folder is None or digest == "given":
            continue
        try:
            changed = channel_digest(channel, folder, scratch, made.facts["settings"]) != digest
        except FivefoldError as error:
            found.append(f"{made.path}: its channel {channel!r} cannot be read any more: {error}")
            continue
        if changed:
            found.append(f"{made.path}: its channel {channel!r} ({folder}) holds something else now")
    return found
