"""`python -m jobs trace PATH [--check]`: show the origin of an artifact, back to the images.

PATH is a file that a stage wrote, its folder, or its stage.json, local or at s3://. --check recomputes every
digest: of the outputs, of each stage's inputs, and of the images of the split.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fivefold.contract import lineage
from fivefold.contract.lineage import ResultNode
from fivefold.contract.s3 import sync
from fivefold.contract.s3.sync import SCRATCH, S3Sync
from fivefold.contract.s3.urls import Url, is_url, parse
from fivefold.contract.stage_specs import CLASSES, FOLDS, RECORD
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.errors import DataError, FivefoldError, MissingInputError, SettingsError
from fivefold.progress import track
from fivefold.signals import defer_signals


def main(arguments: Sequence[str]) -> int:
    """Print the tree of records; with --check raise a DataError with all changes, or return 0 if there are none."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    paths = [argument for argument in arguments if argument != "--check"]
    if len(paths) != 1 or paths[0].startswith("-"):
        raise SettingsError("trace takes one path, e.g. python -m jobs trace runs/first/ensemble/output --check")
    with defer_signals(), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        resolver = Resolver(Path(scratch), everything="--check" in arguments)
        node = lineage.trace(lineage.find_record(resolver.path(paths[0])), resolver)
        print(sync.with_urls("\n".join(tree(node, set()))))
        if "--check" in arguments:
            check(node, Path(scratch))
    return 0


class Resolver:
    """Resolve the paths and s3:// URLs in records; from s3:// fetch only the records, or everything."""

    def __init__(self, scratch: Path, everything: bool) -> None:
        self._remote, self._everything = S3Sync(scratch), everything
        self._known: dict[str, Path | None] = {}

    def __call__(self, folder: Path, places: Sequence[str]) -> Path | None:
        """Return the path of a channel from the record in `folder`; None if it no longer exists."""
        if not is_url(places[1]):
            return lineage.resolve_path(folder, places)
        if places[1] not in self._known:
            try:
                self._known[places[1]] = self._fetch(parse(places[1], "a record"))
            except MissingInputError:
                self._known[places[1]] = None
        return self._known[places[1]]

    def path(self, text: str) -> Path:
        """Resolve the user's argument: a path, or a URL of a folder or of a file that a stage wrote."""
        if not is_url(text):
            return Path(text)
        url = parse(text, "trace")
        try:
            return self._fetch(url)
        except MissingInputError:
            return self._fetch(url.parent, url.name) / url.name

    def _fetch(self, url: Url, *files: str) -> Path:
        path = self._remote.channel(url)
        self._remote.fetch(path, only=("",) if self._everything else (RECORD, *files))
        return path


def tree(node: ResultNode, described: set[Path], label: str = "", indent: str = "") -> Iterator[str]:
    """Yield the lines of a record, then indented those of all its inputs; each record is described once."""
    repeated = node.path in described
    yield f"{indent}{label}{node.name}: {display_path(node.path.parent)}{' (above)' if repeated else ''}"
    if repeated:
        return
    described.add(node.path)
    indent += "   "
    yield from (indent + line for line in describe(node))
    for channel, (place, behind) in node.inputs.items():
        for step in behind:
            yield from tree(step, described, f"{channel} <- ", indent)
        if not behind:
            yield f"{indent}{channel}: {display_path(place) if place else 'missing'}"


def display_path(path: Path) -> str:
    """Return a path relative to the current folder if it lies below, else the absolute path."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def describe(node: ResultNode) -> list[str]:
    """Return lines with a record's time, key, versions and figures."""
    facts, packages = node.record, node.record.get("packages", {})
    metrics = [f"{name} {value:g}" for name, value in facts["metrics"].items() if isinstance(value, int | float)]
    code = f"code {facts.get('code', 'unknown')}, torch {packages.get('torch', 'unknown')}"
    first = f"{facts.get('finished', '')}, key {facts['key'][:12]}, {code}, {facts.get('wall_seconds', 0):.0f} s"
    return [first, *([", ".join(metrics)] if metrics else [])]


def check(node: ResultNode, scratch: Path) -> None:
    """Recompute every digest; raise a DataError with all differences."""
    steps = node.walk()
    problems: list[str] = []
    for number, step in enumerate(track(steps, len(steps), "records")):
        folder = scratch / str(number)
        folder.mkdir()
        problems += lineage.verify(step, folder)
        problems += changed_images(step) if step.name == "split" else []
    if problems:
        raise DataError(f"{len(problems)} differences: {'; '.join(problems[:10])}")
    print(f"unchanged: {len(steps)} records with their outputs and inputs")


def changed_images(split: ResultNode) -> list[str]:
    """Return the images that changed since the split; empty if the train channel or the split's outputs are missing."""
    place, folder = split.inputs["train"][0], split.path.parent / split.record["roots"]["output"]
    if place is None or not (folder / FOLDS).is_file():
        return []
    table = read_folds(folder / FOLDS, folder / CLASSES)
    store = open_store(place, math.inf)  # the split accepted the zip's size; records do not contain the limit
    problems = []
    for path, digest in track(
        zip(table.paths.to_pylist(), table.sha256.to_pylist(), strict=True), len(table), "images"
    ):
        try:  # without a digest the split did not open the image
            if digest is not None and hashlib.sha256(store.read(path)).hexdigest() != digest:
                problems.append(f"{path} changed since the split")
        except FivefoldError as error:
            problems.append(str(error))
    return problems
