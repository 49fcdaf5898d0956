"""Detect the layout of a data folder: wrapper folders, train/ and test/, class folders, and CSV tables."""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.filenames import normalize_class_name
from fivefold.csv_tables import ID_NAMES, CsvFile, parse_csv
from fivefold.data.image_io import is_image
from fivefold.data.readers.stores import ImageStore, is_outside
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.log import log
from fivefold.predictions import preview

TRAIN_FOLDERS = ("train", "training")
EVAL_FOLDERS = ("test", "testing", "eval", "evaluation")
IMAGE_FOLDERS = ("images",)
HELD_OUT = {*EVAL_FOLDERS, "valid", "val", "validation", "pred", "unlabeled", "unlabelled"}
SPLIT_FOLDERS = {*TRAIN_FOLDERS, *HELD_OUT}
GENERIC_WORDS = {
    "", "set", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "jpg", "jpeg", "png",
}  # fmt: skip
"""Words beside one of SPLIT_FOLDERS in a folder's name that do not name a data set of its own."""
MAX_PROBED_PATHS = 64


def split_folders(folders: Iterable[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Map the folders whose name contains exactly one word of SPLIT_FOLDERS to that word and the words of their data set.

    ("test", ("seg",)) for Seg_Test, ("train", ()) for train-images.
    """
    parts = {}
    for folder in folders:
        words = re.split(r"[_\-\s]+", folder.lower())
        named_as = [word for word in words if word in SPLIT_FOLDERS]
        if len(named_as) == 1:
            parts[folder] = named_as[0], tuple(word for word in words if word not in SPLIT_FOLDERS | GENERIC_WORDS)
    return parts


def folders_named(folders: Collection[str], special: Sequence[str]) -> list[str]:
    """Return the folders named exactly as one of `special`, then those with such a word that are part of a split.

    The latter are seg_test beside seg_train, and test_images, which names no data set; "test tube" is not included.
    """
    parts = split_folders(folders)
    datasets = Counter(dataset for _, dataset in parts.values())
    by_word = [f for f, (word, dataset) in parts.items() if word in special and (not dataset or datasets[dataset] > 1)]
    by_name = [folder for folder in folders if folder.lower() in special]
    return list(dict.fromkeys([*by_name, *by_word]))


def class_level(names: Sequence[str]) -> str:
    """Return the prefix below which each folder is a class, skipping folders that wrap everything, and train/."""
    level = ""
    while True:
        inside = [name[len(level) :] for name in names if name.startswith(level)]
        folders = Counter(name.partition("/")[0] for name in inside if "/" in name)
        nested = {name.partition("/")[0] for name in inside if name.count("/") > 1}
        are_parts = len(split_folders(folders)) == len(folders)
        train = next((name for name in folders_named(folders, TRAIN_FOLDERS) if are_parts or name in nested), None)
        if train:
            others = [name for name in folders if name != train]
            if others:
                log.info("data: using %s%s/; ignoring %s", level, train, preview(others))
            level += f"{train}/"
        elif len(folders) == 1 and folders.total() == len(inside) and nested:
            level += f"{next(iter(folders))}/"
        else:
            return level


def held_out_folders(folders: Collection[str]) -> list[str]:
    """Return the folders that are parts of a split, not classes, such as a test/ beside classes."""
    lower = {folder.lower() for folder in folders}  # "valid" beside "invalid" is a class
    parts = split_folders(sorted(folders)).items()
    return [f for f, (word, dataset) in parts if word in HELD_OUT and not dataset and f"in{word}" not in lower]


def class_images(inside: Sequence[str], level: str, where: str) -> list[str]:
    """Return the images in class folders; warn about ignored folders, such as a test/ beside the classes.

    Also warn about class folders with several subfolders of images: these are not classes.
    """
    parts = held_out_folders({name[len(level) :].partition("/")[0] for name in inside})
    if parts:
        hint = "rename folders that are classes"
        log.warning("data: ignored in %s, as their names mark parts of a split: %s; %s", where, preview(parts), hint)
    left_out = tuple(f"{level}{name}/" for name in parts)
    images = [name for name in inside if not name.startswith(left_out)]
    subfolders = {tuple(name[len(level) :].split("/")[:2]) for name in images if name.count("/", len(level)) > 1}
    counts = Counter(folder for folder, _ in subfolders)
    if nested := sorted("/".join(pair) for pair in subfolders if counts[pair[0]] > 1):
        log.warning("data: subfolders of the class folders of %s are not separate classes: %s", where, preview(nested))
    return images


def search_levels(store: ImageStore, special: Sequence[str]) -> Iterator[str]:
    """Yield the folders to search for a CSV: the root, then repeatedly a folder named in `special`, or a single wrapper folder."""
    level = ""
    while True:
        yield level
        folders, files = list_folder(store, level)
        holds_data = any(is_image(name) or name.lower().endswith(".csv") for name in files)
        inner = folders_named(folders, special) or (folders if len(folders) == 1 and not holds_data else [])
        if not inner:
            return
        level = posixpath.join(level, inner[0])


def list_folder(store: ImageStore, folder: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files directly in `folder` ("" is the root)."""
    prefix = f"{folder}/" if folder else ""
    inside = {name[len(prefix) :].partition("/")[:2] for name in store.names() if name.startswith(prefix)}
    return tuple(sorted(name for name, slash in inside if bool(slash) == is_folder) for is_folder in (True, False))


def list_csvs(store: ImageStore, level: str) -> list[str]:
    return [posixpath.join(level, name) for name in list_folder(store, level)[1] if name.lower().endswith(".csv")]


def stem(name: str) -> str:
    """Return `train` for `a/b/Train.csv`."""
    return posixpath.basename(name).lower().removesuffix(".csv")


def open_table(store: ImageStore, name: str) -> CsvFile:
    """Open the CSV `name` of a store."""
    if not store.exists(name):
        raise MissingInputError(f"no table {name} in {store.root}")
    return parse_csv(store.read(name), f"{name} in {store.root}", name)


def image_paths(
    raw_paths: pd.Series,
    table: CsvFile,
    store: ImageStore,
    special: Sequence[str],
    others: Collection[str],
    check_files: bool = True,
    image_root: str = "",
) -> pd.Series:
    """Return the paths `raw_paths` in a CSV (its index counts rows from 0), relative to the store's root, without outer spaces.

    They are relative to `image_root`, or else to the table's folder, the root, or a `special` folder beside the table,
    whichever contains most of the first paths; names without a suffix get the suffix of the images there. Without
    `image_root`, paths of no file are searched by name in all folders except the other parts of a split (`others`).
    Raise a DataError for paths that leave the root, names that match several images, and, with `check_files`, missing files.
    """
    paths = raw_paths.str.replace("\\", "/", regex=False).str.strip()
    for root in _root_prefixes(store.root):
        paths = paths.str.removeprefix(root)
    paths = paths.str.replace(r"^(?:\./)+", "", regex=True)
    bases = _candidate_roots(store, table.name, special, image_root)
    base, suffix = _best_base(paths[:MAX_PROBED_PATHS].tolist(), store, bases)
    normal = paths.map(lambda path: _normalize(base, path + suffix))
    outside = paths[normal == ""]
    if len(outside):
        raise DataError(
            f"{table}: paths that are empty or outside {store.root}: {preview(outside)}; "
            f"the first in row {outside.index[0] + 1} below the header"
        )
    names = store.names()
    if not check_files and (image_root or not any(map(is_image, names))):
        return normal
    existing = set(names)
    absent = np.array([path not in existing and not store.exists(path) for path in normal.tolist()], bool)
    if not absent.any():
        return normal
    matches = {} if image_root else match_names(paths[absent], names, others)
    uses = Counter([*(hits[0] for hits in matches.values() if hits), *normal[~absent]])
    unique = {path: hits[0] for path, hits in matches.items() if len(hits) == 1 == uses[hits[0]]}
    if unique:
        where = preview(sorted({posixpath.dirname(path) for path in unique.values()}))
        log.info("data: %s: matched %d images by file name, in %s", table, len(unique), where)
        normal[absent] = [unique.get(path, name) for path, name in zip(paths[absent], normal[absent], strict=True)]
    ambiguous = [f"{path!r} may mean {preview(hits)}" for path, hits in matches.items() if len(hits) > 1]
    missing = normal[absent & ~paths.isin(list(unique))].tolist()
    if missing and (check_files or ambiguous):
        folders = Counter(posixpath.dirname(name) or "." for name in names if is_image(name)).most_common(5)
        why = "; ".join(ambiguous[:3]) or f"images are in {', '.join(f'{name} ({n:,})' for name, n in folders)}"
        raise DataError(
            f"{table} names {len(missing)} of {len(normal)} files that do not exist: {preview(missing)}; {why}; "
            "set data.path_column or data.image_root"
        )
    return normal


def match_names(paths: Iterable[str], names: Iterable[str], others: Collection[str]) -> dict[str, list[str]]:
    """Map each path to the images whose path ends with it, ignoring case, with or without suffix.

    Images in folders of the other parts of a split, named by the words `others`, are excluded.
    """
    by_name: dict[str, list[tuple[str, str]]] = defaultdict(list)
    images = list(filter(is_image, names))
    parts = {folder: split_folders(folder.split("/")).values() for folder in set(map(posixpath.dirname, images))}
    for name in images:
        if not any(word in others for word, _ in parts[posixpath.dirname(name)]):
            whole = f"/{name.lower()}"
            for form in (whole, posixpath.splitext(whole)[0]):
                by_name[posixpath.basename(form)].append((form, name))
    ends = {path: f"/{path.lower()}" for path in paths}
    return {
        path: [name for form, name in by_name.get(posixpath.basename(end), []) if form.endswith(end)]
        for path, end in ends.items()
    }


def guess_paths(table: CsvFile, store: ImageStore, others: Collection[str], without: str = "") -> str | None:
    """Return the only column except `without` whose first values are unique and mostly names of existing images; log it."""
    try:
        frame = table.read([name for name in table.columns if name != without])[:MAX_PROBED_PATHS].map(str.strip)
    except DataError:  # for example, it has no rows; the later read reports this
        return None
    matches = match_names(frame.to_numpy().ravel(), store.names(), others)
    counts = {name: sum(len(matches[cell]) == 1 for cell in frame[name]) for name in frame if frame[name].is_unique}
    best = max(counts.values(), default=0)
    candidates = [name for name, count in counts.items() if count == best > len(frame) / 2]
    candidates = [name for name in candidates if normalize_class_name(name).lower() in ID_NAMES] or candidates
    if len(candidates) == 1:
        log.info("data: %s: the paths are the column %r, which names existing images", table, candidates[0])
        return candidates[0]
    return None


def _candidate_roots(store: ImageStore, table: str, special: Sequence[str], image_root: str) -> list[str]:
    """Return the folders that paths in the CSV `table` may be relative to: its own, the root, or a `special` folder beside it.

    With `image_root`, return only that folder; raise a SettingsError if it is outside the store.
    """
    if image_root:
        path = f"{image_root}/".replace("\\", "/")
        for prefix in _root_prefixes(store.root):
            path = path.removeprefix(prefix)
        base = posixpath.normpath(path)
        if base != "." and is_outside(base):
            raise SettingsError(f"data.image_root={image_root} is outside {store.root}; set a folder inside it")
        return ["" if base == "." else base]
    folder = posixpath.dirname(posixpath.normpath(table))
    beside = folders_named(list_folder(store, folder)[0], special)
    return list(dict.fromkeys([folder, "", *(posixpath.join(folder, name) for name in beside)]))


def _best_base(paths: Sequence[str], store: ImageStore, bases: Sequence[str]) -> tuple[str, str]:
    """Return the base with the most existing paths, and the suffix that the paths lack; if none exists, the first base."""
    suffixes = [""]
    if not any(map(is_image, paths)):
        counts = Counter(posixpath.splitext(name)[1] for name in store.names() if is_image(name))
        suffixes += [suffix for suffix, _ in counts.most_common()]

    def count(pair: tuple[str, str]) -> int:
        inside = [_normalize(pair[0], path + pair[1]) for path in paths]
        return sum(path != "" and store.exists(path) for path in inside)

    return max(((base, suffix) for suffix in suffixes for base in bases), key=count)


def _normalize(base: str, path: str) -> str:
    """Return the normalized path of `path` below `base`; "" if it is empty or leaves the root."""
    normal = posixpath.normpath(posixpath.join(base, path))
    return "" if is_outside(normal) or not path.strip() else normal


def _root_prefixes(root: Path) -> list[str]:
    """Return a folder as written, as an absolute path, and with symbolic links resolved, each with a trailing slash."""
    return [f"{path}/" for path in dict.fromkeys((root, root.absolute(), root.resolve()))]
