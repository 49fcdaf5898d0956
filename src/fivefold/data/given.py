"""What a user hands over to be predicted: an image, a folder, a zip, a table of paths, or images in memory."""

import logging
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from fivefold.contract.files import MOST_OF_AN_ARCHIVE, read_file
from fivefold.contract.spelling import is_sample, plain_name
from fivefold.csv_tables import PATH_NAMES, TRUE_CLASS_NAMES, CsvFile, plain_names
from fivefold.data.inventory import log_left_out, take_inventory
from fivefold.data.layouts import TRIED_PATHS, csvs, guess_paths, match_names, open_table
from fivefold.data.store import GIB, FolderStore, ImageStore, ZipStore, open_store
from fivefold.errors import DataError, MissingInputError
from fivefold.predictions import sample

log = logging.getLogger("fivefold")

SUBMISSION = "submission.csv"


@dataclass(frozen=True)
class AnywhereStore:
    """Files anywhere on this machine, by the paths that a user wrote."""

    root: Path = Path()

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str | os.PathLike[str]) -> bytes:
        """The bytes of one file; a DataError for what is none, or too large."""
        try:
            return read_file(self.root / name)
        except (OSError, ValueError, TypeError) as error:  # a null character in it, or bytes for a path
            raise DataError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True, eq=False)
class HandedStore:
    """Things handed over in memory, by a name each: paths, bytes of image files, or Pillow's images.

    With a `folder`, paths count from there, and those that lead out of it are refused.
    """

    things: Mapping[str, Any]
    folder: Path | None = None

    def read(self, name: str) -> bytes:
        """The bytes of one thing as an image file; a DataError for what is no image, or lies outside the folder."""
        thing = self.things[name]
        if isinstance(thing, str | os.PathLike):
            return AnywhereStore().read(thing) if self.folder is None else self._read_below(self.folder, thing)
        if isinstance(thing, bytes | bytearray | memoryview):
            return bytes(thing)
        if isinstance(thing, Image.Image):
            return _encoded(thing)
        raise DataError(f"{type(thing).__name__} is neither a path, nor bytes, nor an image of Pillow's")

    @staticmethod
    def _read_below(folder: Path, name: str | os.PathLike[str]) -> bytes:
        try:
            path = (folder / name).resolve()
        except (OSError, ValueError, TypeError) as error:  # a null character in it, or bytes for a path
            raise DataError(f"{name} cannot be read: {error}") from error
        if not path.is_relative_to(folder.resolve()):
            raise DataError(f"{name} lies outside {folder}")
        return AnywhereStore().read(path)


@dataclass(frozen=True)
class Given:
    """N images: where they lie, their paths there, what the user calls them, and their true classes, "" if unknown."""

    store: ImageStore | AnywhereStore | HandedStore
    paths: Sequence[str]
    shown: Sequence[str]
    truth: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)


def read_given(
    path: Path,
    base_path: str = "",
    path_column: str = "",
    label_column: str = "",
    max_unpacked_gib: float = MOST_OF_AN_ARCHIVE / GIB,
) -> Given:
    """The images at `path`: one image, a table of paths, or a folder or .zip of either.

    A table's paths count from `base_path`, else from its own folder or the working directory,
    whichever has more of the first ones; where a folder or .zip is given, what is not there is looked for by its name
    in all of it. A table without a column of paths may have one of names of images beside it. That an image is there
    and whole is not looked at.
    Raises MissingInputError where nothing is, and DataError for a folder without images or a table without paths.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        store = FolderStore(path.parent)
        table = open_table(store, path.name)
        named = path_column or table.column("", PATH_NAMES) or guess_paths(table, store, ()) or ""
        search = not path_column and table.column("", PATH_NAMES) is None
        return _table(store, table, base_path, named, label_column, search)
    if path.is_file() and path.suffix.lower() != ".zip":
        return Given(AnywhereStore(), [str(path)], [str(path)], [""])
    store = open_store(path, max_unpacked_gib)
    names = [name for name in csvs(store, "") if name.lower() != SUBMISSION and not is_sample(name)]
    usable = [table for table in (open_table(store, name) for name in names) if table.column(path_column, PATH_NAMES)]
    if len(usable) > 1:
        raise DataError(f"several tables in {path}: {sample([t.name for t in usable])}; name one of them as the images")
    if usable:
        return _table(store, usable[0], base_path, path_column, label_column, search=not base_path)
    stock = take_inventory(store)
    names = stock.asked
    log_left_out(stock.counts(), path)
    if not names:
        raise DataError(f"no images below {path}, nor a CSV with their paths")
    return Given(store, names, names, [""] * len(names))


def with_folders_as_truth(given: Given, classes: Sequence[str]) -> Given:
    """`given`, with each image's folder as its true class where all lie in folders called like classes."""
    folders = [plain_name(posixpath.basename(posixpath.dirname(path))) for path in given.paths]
    if any(given.truth) or not set(folders) <= set(classes):
        return given
    log.info("every image lies in a folder that is called like a class, so that is taken as its true class")
    return Given(given.store, given.paths, given.shown, folders)


def check_truth(given: Given, classes: Sequence[str]) -> None:
    """Raises a DataError for true classes that are none of the model's."""
    known = {"", *classes}
    rows = [name for name in given.truth if name not in known]
    if rows:
        raise DataError(
            f"{len(rows)} of {len(given)} rows have true classes that the model does not know: {sample(sorted(set(rows)))}; "
            f"it knows {sample(list(classes))}; leave such cells empty to have these rows predicted and not scored"
        )


def _table(
    images: FolderStore | ZipStore, table: CsvFile, base_path: str, path_column: str, label_column: str, search: bool
) -> Given:
    path = table.must_have(path_column, PATH_NAMES, "data.path_column")
    label = table.column(label_column, TRUE_CLASS_NAMES)
    frame = table.read([name for name in (path, label) if name])
    truth = plain_names(frame[label]).tolist() if label else [""] * len(frame)
    if isinstance(images, ZipStore):
        store, bases = images, [base_path or posixpath.dirname(table.name)]
    else:
        store, bases = AnywhereStore(), [base_path] if base_path else [str(images.root), ""]
        if base_path and not Path(base_path).is_dir():
            raise MissingInputError(f"data.base_path={base_path}: there is no such folder")
    paths = frame[path].str.strip().str.replace("\\", "/", regex=False).tolist()
    base = max(bases, key=lambda base: sum(_there(store, posixpath.join(base, name)) for name in paths[:TRIED_PATHS]))
    places = [posixpath.join(base, name) for name in paths]
    if absent := [row for row, name in enumerate(places) if search and not _there(store, name)]:
        meant = match_names([paths[row] for row in absent], images.names(), ())
        for row in (row for row in absent if len(meant[paths[row]]) == 1):
            (name,) = meant[paths[row]]
            places[row] = name if store is images else str(images.root / name)
    return Given(store, places, frame[path].tolist(), truth)


def _there(store: ImageStore | AnywhereStore, name: str) -> bool:
    try:
        return store.exists(name)
    except (DataError, ValueError):
        return False


def _encoded(image: Image.Image) -> bytes:
    """A Pillow image as a file without loss, its orientation kept."""
    content = BytesIO()
    try:
        plain = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
        plain.save(content, "PNG", exif=image.getexif().tobytes())
    except Exception as error:  # a file that Pillow opened is decoded only now, and may turn out to be broken
        raise DataError(f"the image cannot be decoded: {error}") from error
    return content.getvalue()
