"""Open the images that a user passes for prediction: an image, a folder, a zip, a CSV of paths, or images in memory."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from fivefold.config.schema import Data
from fivefold.contract.filenames import is_sample_submission, normalize_class_name
from fivefold.contract.files import read_file
from fivefold.csv_tables import PATH_NAMES, TRUE_CLASS_NAMES, CsvFile, normalize_names
from fivefold.data.readers.layout_detection import MAX_PROBED_PATHS, guess_paths, list_csvs, match_names, open_table
from fivefold.data.readers.stores import FolderStore, ImageStore, ZipStore, log_ignored, open_store, take_inventory
from fivefold.errors import DataError, MissingInputError
from fivefold.log import log
from fivefold.predictions import preview

SUBMISSION = "submission.csv"


@dataclass(frozen=True, eq=False)
class InMemoryStore:
    """Items passed in memory, each with a name: paths, bytes of image files, or Pillow images.

    With a `folder`, paths are relative to it, and paths outside it are rejected.
    """

    items: Mapping[str, Any]
    folder: Path | None = None
    caches: Sequence[Any] = ()

    def read(self, name: str) -> bytes:
        """Return one item as the bytes of an image file; raise a DataError if it is not an image, or outside the folder."""
        thing = self.items[name]
        if isinstance(thing, bytes | bytearray | memoryview):
            return bytes(thing)
        if isinstance(thing, Image.Image):
            return _encode(thing)
        if not isinstance(thing, str | os.PathLike):
            raise DataError(f"{type(thing).__name__} is neither a path, nor bytes, nor a Pillow image")
        try:
            path = Path(thing) if self.folder is None else (self.folder / thing).resolve()
            if self.folder and not path.is_relative_to(self.folder.resolve()):
                raise DataError(f"{thing} is outside {self.folder}")
            return read_file(path)
        except (OSError, ValueError, TypeError) as error:  # for a null character in the path, or a path of bytes
            raise DataError(f"{thing} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class UserImages:
    """N images: their store, their paths in it, their names as the user wrote them, and their true classes, "" if unknown."""

    store: ImageStore | InMemoryStore
    paths: Sequence[str]
    names: Sequence[str]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)


def read_user_images(path: Path, data: Data = Data()) -> UserImages:  # noqa: B008
    """Open the images at `path`: one image, a CSV of paths, or a folder or .zip of either.

    Paths in a CSV are relative to `data.image_root`, else to its own folder or the working directory, whichever contains
    more of the first ones; in a folder or .zip, missing files are searched by name everywhere. A CSV passed as a file may
    lack a known path column if one column has the names of images beside it. The images themselves are not checked here.
    Raise MissingInputError if nothing exists at `path`, and DataError for a folder without images or a CSV without paths.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        store = FolderStore(path.parent)
        table = open_table(store, path.name)
        known = data.path_column or table.column("", PATH_NAMES)
        return _read_table(store, table, data, known or guess_paths(table, store, ()) or "", search=not known)
    if path.is_file() and path.suffix.lower() != ".zip":
        return UserImages(InMemoryStore({str(path): path}), [str(path)], [str(path)], [""])
    store = open_store(path, data.max_unpacked_gib)
    names = [name for name in list_csvs(store, "") if name.lower() != SUBMISSION and not is_sample_submission(name)]
    tables = [open_table(store, name) for name in names]
    usable = [table for table in tables if table.column(data.path_column, PATH_NAMES)]
    if len(usable) > 1:
        raise DataError(f"several tables in {path}: {preview([t.name for t in usable])}; pass one of them instead")
    if usable:
        return _read_table(store, usable[0], data, data.path_column, search=not data.image_root)
    stock = take_inventory(store)
    names = stock.expected_images
    log_ignored(stock.counts(), path)
    if not names:
        raise DataError(f"no images below {path}, nor a CSV with their paths")
    return UserImages(store, names, names, [""] * len(names))


def labels_from_folders(images: UserImages, classes: Sequence[str]) -> UserImages:
    """Return `images` with each image's folder as its true class, if there are no true classes and all folders are class names."""
    folders = [normalize_class_name(posixpath.basename(posixpath.dirname(path))) for path in images.paths]
    if any(images.labels) or not set(folders) <= set(classes):
        return images
    log.info("every image is in a folder named as a class; using the folder names as true classes")
    return replace(images, labels=folders)


def check_labels(images: UserImages, classes: Sequence[str]) -> None:
    """Raise a DataError for true classes that the model does not have."""
    known = {"", *classes}
    if unknown := [name for name in images.labels if name not in known]:
        raise DataError(
            f"{len(unknown)} of {len(images)} rows have true classes that the model does not have: "
            f"{preview(sorted(set(unknown)))}; leave such cells empty to predict these rows without scoring them"
        )


def _read_table(
    images: FolderStore | ZipStore, table: CsvFile, data: Data, path_column: str, search: bool
) -> UserImages:
    path = table.require_column(path_column, PATH_NAMES, "data.path_column")
    label = table.column(data.label_column, TRUE_CLASS_NAMES)
    frame = table.read([name for name in (path, label) if name])
    truth = normalize_names(frame[label]).tolist() if label else [""] * len(frame)
    is_zip, image_root = isinstance(images, ZipStore), data.image_root
    bases = [image_root or posixpath.dirname(table.name)] if is_zip or image_root else [str(images.root), ""]
    if image_root and not is_zip and not Path(image_root).is_dir():
        raise MissingInputError(f"data.image_root={image_root}: no such folder")

    def exists(name: str) -> bool:
        try:
            return images.exists(name) if is_zip else Path(name).is_file()
        except DataError:  # it leads out of the zip
            return False

    paths = frame[path].str.strip().str.replace("\\", "/", regex=False).tolist()
    probed = paths[:MAX_PROBED_PATHS]
    base = max(bases, key=lambda base: sum(exists(posixpath.join(base, name)) for name in probed))
    resolved = [posixpath.join(base, name) for name in paths]
    if missing := [row for row, name in enumerate(resolved) if search and not exists(name)]:
        matches = match_names([paths[row] for row in missing], images.names(), ())
        for row in (row for row in missing if len(matches[paths[row]]) == 1):
            (name,) = matches[paths[row]]
            resolved[row] = name if is_zip else str(images.root / name)
    store = images if is_zip else InMemoryStore(dict(zip(resolved, resolved, strict=True)))
    return UserImages(store, resolved, frame[path].tolist(), truth)


def _encode(image: Image.Image) -> bytes:
    """Return a Pillow image as a lossless image file with its orientation."""
    content = BytesIO()
    try:
        converted = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
        converted.save(content, "PNG", exif=image.getexif().tobytes())
    except Exception as error:  # Pillow decodes lazily, so a broken file fails only here
        raise DataError(f"the image cannot be decoded: {error}") from error
    return content.getvalue()
