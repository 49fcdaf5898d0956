"""`python -m jobs trace PATH [--check]`: where an artifact came from, back to the images.

PATH is a file that a stage wrote, its folder, or its stage.json, here or at s3://. With --check every
digest on the way is taken again: outputs, what each stage read, and the images behind the split.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fivefold.contract import lineage, storage
from fivefold.contract.lineage import Made
from fivefold.contract.s3.urls import Url, is_url, parse
from fivefold.contract.stages import CLASSES, FOLDS, RECORD
from fivefold.contract.storage import SCRATCH, Remote
from fivefold.data.folds import read_folds
from fivefold.data.store import ImageStore, open_store
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
        reach = Reach(Path(scratch), everything="--check" in arguments)
        made = lineage.traced(lineage.find_record(reach.path(paths[0])), reach)
        print(storage.shown("\n".join(tree(made))))
        if "--check" in arguments:
            check(made, Path(scratch))
    return 0


class Reach:
    """Finds the places that records name, at s3:// too, of which it fetches the records alone or everything."""

    def __init__(self, scratch: Path, everything: bool) -> None:
        self._remote, self._everything = Remote(scratch), everything
        self._known: dict[str, Path | None] = {}

    def __call__(self, folder: Path, places: Sequence[str]) -> Path | None:
        """The place of a channel whose record lies in `folder`; None where it is gone."""
        if not is_url(places[1]):
            return lineage.nearest(folder, places)
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


def tree(made: Made) -> list[str]:
    """A line or some for the record, then those of all that it read, indented below it; each record is described once."""
    lines = [shown(made.path.parent), *about(made)]
    return [f"{made.name}: {lines[0]}", *(f"   {line}" for line in lines[1:]), *branches(made, {made.path})]


def branches(made: Made, told: set[Path]) -> list[str]:
    """What lies below a record, channel by channel."""
    leaves: list[tuple[str, Made | None]] = []
    for channel, (place, behind) in made.read.items():
        leaves += [(f"{channel} <- {each.name}: {shown(each.path.parent)}", each) for each in behind]
        leaves += [] if behind else [(f"{channel}: {shown(place) if place else 'no longer there'}", None)]
    lines = []
    for at, (line, step) in enumerate(leaves):
        branch, beside = ("└─ ", "   ") if at == len(leaves) - 1 else ("├─ ", "│  ")
        known = step is not None and step.path in told
        lines.append(branch + line + (" (above)" if known else ""))
        if step is not None and not known:
            told.add(step.path)
            lines += [f"{beside}   {more}" for more in about(step)]
            lines += [beside + more for more in branches(step, told)]
    return lines


def shown(path: Path) -> str:
    """A path as seen from here where it lies below."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def about(made: Made) -> list[str]:
    """When a record was made, with what, and how good it was."""
    facts, packages = made.facts, made.facts.get("packages", {})
    metrics = [f"{name} {value:g}" for name, value in facts["metrics"].items() if isinstance(value, int | float)]
    made_with = f"code {facts.get('code', 'unknown')}, torch {packages.get('torch', 'unknown')}"
    first = f"{facts.get('finished', '')}, key {facts['key'][:12]}, {made_with}, {facts.get('wall_seconds', 0):.0f} s"
    return [first, *([", ".join(metrics)] if metrics else [])]


def check(made: Made, scratch: Path) -> None:
    """Takes every digest again; a DataError with all that differs."""
    steps = list(lineage.everything(made))
    found: list[str] = []
    for number, step in enumerate(track(steps, len(steps), "records")):
        folder = scratch / str(number)
        folder.mkdir()
        found += lineage.problems(step, folder)
        found += changed_images(step) if step.name == "split" else []
    if found:
        raise DataError(f"{len(found)} differences: {'; '.join(found[:10])}")
    print(f"all as it was: {len(steps)} records, their outputs and inputs")


def changed_images(split: Made) -> list[str]:
    """The images that are no longer those that the split saw; none where the records themselves tell what is gone."""
    place, folder = split.read["train"][0], split.path.parent / split.facts["roots"]["output"]
    if place is None or not (folder / FOLDS).is_file():
        return []
    table, store = read_folds(folder / FOLDS, folder / CLASSES), open_store(place)
    pairs = zip(table.paths.to_pylist(), table.sha256.to_pylist(), strict=True)
    return [
        wrong for path, digest in track(pairs, len(table), "images") if (wrong := changed_image(store, path, digest))
    ]


def changed_image(store: ImageStore, path: str, digest: str | None) -> str:
    """What is wrong with an image, in words; empty where nothing is, or where the split opened none."""
    try:
        same = digest is None or hashlib.sha256(store.read(path)).hexdigest() == digest
    except FivefoldError as error:
        return str(error)
    return "" if same else f"{path} is not the file that the split saw"
