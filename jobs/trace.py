"""`python -m jobs trace PATH [--check]`: where an artifact came from, back to the images.

PATH is a file that a stage wrote, its folder, or its stage.json, here or at s3://. With --check every
digest on the way is taken again: outputs, what each stage read, and the images behind the split.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fivefold.contract import lineage, storage
from fivefold.contract.lineage import Node
from fivefold.contract.s3.urls import Url, is_url, parse
from fivefold.contract.stages import CLASSES, FOLDS, RECORD
from fivefold.contract.storage import SCRATCH, Remote
from fivefold.data.folds import read_folds
from fivefold.data.store import open_store
from fivefold.errors import DataError, FivefoldError, MissingInputError, SettingsError
from fivefold.progress import track
from fivefold.stopping import noted


def main(arguments: Sequence[str]) -> int:
    """Prints the tree of records; with --check 0 if all is as it was, else a DataError that names what is not."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    paths = [argument for argument in arguments if argument != "--check"]
    if len(paths) != 1 or paths[0].startswith("-"):
        raise SettingsError("trace takes one path, as in: python -m jobs trace runs/first/ensemble/output --check")
    with noted(), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        resolver = Resolver(Path(scratch), everything="--check" in arguments)
        node = lineage.trace(lineage.find_record(resolver.path(paths[0])), resolver)
        print(storage.shown("\n".join(tree(node, set()))))
        if "--check" in arguments:
            check(node, Path(scratch))
    return 0


class Resolver:
    """Finds the places that records name, at s3:// too, of which it fetches the records alone or everything."""

    def __init__(self, scratch: Path, everything: bool) -> None:
        self._remote, self._everything = Remote(scratch), everything
        self._known: dict[str, Path | None] = {}

    def __call__(self, folder: Path, places: Sequence[str]) -> Path | None:
        """The place of a channel whose record lies in `folder`; None where it is gone."""
        if not is_url(places[1]):
            return lineage.resolve_path(folder, places)
        if places[1] not in self._known:
            try:
                self._known[places[1]] = self._fetched(parse(places[1], "a record"))
            except MissingInputError:
                self._known[places[1]] = None
        return self._known[places[1]]

    def path(self, given: str) -> Path:
        """What the user names: a path, or a URL of a folder or of a file that a stage wrote."""
        if not is_url(given):
            return Path(given)
        url = parse(given, "trace")
        try:
            return self._fetched(url)
        except MissingInputError:
            return self._fetched(url.parent, url.name) / url.name

    def _fetched(self, url: Url, *files: str) -> Path:
        path = self._remote.channel(url)
        self._remote.fetch(path, only=("",) if self._everything else (RECORD, *files))
        return path


def tree(node: Node, described: set[Path], label: str = "", indent: str = "") -> Iterator[str]:
    """The lines of a record, then those of all that it read, indented below it; each record is described once."""
    again = node.path in described
    yield f"{indent}{label}{node.name}: {shown(node.path.parent)}{' (above)' if again else ''}"
    if again:
        return
    described.add(node.path)
    indent += "   "
    yield from (indent + line for line in describe(node))
    for channel, (place, behind) in node.read.items():
        for step in behind:
            yield from tree(step, described, f"{channel} <- ", indent)
        if not behind:
            yield f"{indent}{channel}: {shown(place) if place else 'no longer there'}"


def shown(path: Path) -> str:
    """A path as seen from here where it lies below."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def describe(node: Node) -> list[str]:
    """When a record was made, with what, and how good it was."""
    facts, packages = node.facts, node.facts.get("packages", {})
    metrics = [f"{name} {value:g}" for name, value in facts["metrics"].items() if isinstance(value, int | float)]
    code = f"code {facts.get('code', 'unknown')}, torch {packages.get('torch', 'unknown')}"
    first = f"{facts.get('finished', '')}, key {facts['key'][:12]}, {code}, {facts.get('wall_seconds', 0):.0f} s"
    return [first, *([", ".join(metrics)] if metrics else [])]


def check(node: Node, scratch: Path) -> None:
    """Takes every digest again; a DataError with all that differs."""
    steps = node.walk()
    problems: list[str] = []
    for number, step in enumerate(track(steps, len(steps), "records")):
        folder = scratch / str(number)
        folder.mkdir()
        problems += lineage.verify(step, folder)
        problems += changed_images(step) if step.name == "split" else []
    if problems:
        raise DataError(f"{len(problems)} differences: {'; '.join(problems[:10])}")
    print(f"all as it was: {len(steps)} records, their outputs and inputs")


def changed_images(split: Node) -> list[str]:
    """The images that are no longer those that the split saw; none where the records themselves tell what is gone."""
    place, folder = split.read["train"][0], split.path.parent / split.facts["roots"]["output"]
    if place is None or not (folder / FOLDS).is_file():
        return []
    table = read_folds(folder / FOLDS, folder / CLASSES)
    store = open_store(place, math.inf)  # the split accepted the size of the zip, by a limit that no record holds
    problems = []
    for path, digest in track(
        zip(table.paths.to_pylist(), table.sha256.to_pylist(), strict=True), len(table), "images"
    ):
        try:  # where the split opened no image there is no digest
            if digest is not None and hashlib.sha256(store.read(path)).hexdigest() != digest:
                problems.append(f"{path} is not the file that the split saw")
        except FivefoldError as error:
            problems.append(str(error))
    return problems
