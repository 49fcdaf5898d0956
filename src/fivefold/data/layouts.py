"""Finding one's way in a data folder: wrappers, train/ and test/, class folders, tables."""

import logging
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fivefold.contract.spelling import plain_name
from fivefold.csv_tables import ID_NAMES, CsvFile, parse_csv
from fivefold.data.images import is_image
from fivefold.data.store import ImageStore
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.predictions import sample

log = logging.getLogger("fivefold")

TRAIN_FOLDERS = ("train", "training")
EVAL_FOLDERS = ("test", "testing", "eval", "evaluation")
IMAGE_FOLDERS = ("images",)
HELD_OUT = {*EVAL_FOLDERS, "valid", "val", "validation", "pred", "unlabeled", "unlabelled"}
SPLIT_FOLDERS = {*TRAIN_FOLDERS, *HELD_OUT}
OF_ANY_PART = {"", "set", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "jpg", "jpeg", "png"}
"""What a folder's name may say beside its word of SPLIT_FOLDERS without saying of what it is a part."""
DEEPEST = 8
ODD_PATH = r"(?:^|/)\.{0,2}(?:/|$)|^[A-Za-z]:"
"""Paths that are not plain: empty, absolute, with a drive, or with `.` or `..` or nothing between slashes."""
TRIED_PATHS = 64


class Part(NamedTuple):
    """What a folder's name says of it: the `word` of SPLIT_FOLDERS, and of what it is a part (empty: of everything)."""

    word: str
    whole: tuple[str, ...]


def parts_of(folders: Collection[str]) -> dict[str, Part]:
    """The folders called as a part of a split, by one word of SPLIT_FOLDERS.

    ("test", ("seg",)) for Seg_Test, ("train", ()) for train-images.
    """
    parts = {}
    for folder in folders:
        words = re.split(r"[_\-\s]+", folder.lower())
        named_as = [word for word in words if word in SPLIT_FOLDERS]
        if len(named_as) == 1:
            parts[folder] = Part(named_as[0], tuple(w for w in words if w not in SPLIT_FOLDERS | OF_ANY_PART))
    return parts


def named(folders: Collection[str], special: Sequence[str]) -> list[str]:
    """The folders called as one of `special`, then those with it in their name beside another part of the same.

    Those are seg_test beside seg_train, and test_images, which says of nothing else; test tube is none.
    """
    parts = parts_of(folders)
    wholes = Counter(part.whole for part in parts.values())
    meant = [folder for folder, (word, whole) in parts.items() if word in special and (not whole or wholes[whole] > 1)]
    plain = [folder for folder in folders if folder.lower() in special]
    return list(dict.fromkeys([*plain, *meant]))


def _train_folder(folders: Collection[str], nested: Collection[str]) -> str | None:
    """The folder to train on where the folders are parts of a split, not classes: it has folders, or all are parts."""
    parts = parts_of(folders)
    wholes = Counter(part.whole for part in parts.values())
    all_parts = len(parts) == len(folders)
    for folder in named(folders, TRAIN_FOLDERS):
        if folder in nested or (all_parts and (len(parts) == 1 or wholes[parts[folder].whole] > 1)):
            return folder
    return None


def class_level(names: Sequence[str]) -> str:
    """The prefix below which each folder is a class: past a wrapper around everything, and past train/."""
    level = ""
    while True:
        inside = [name[len(level) :] for name in names if name.startswith(level)]
        folders = Counter(name.partition("/")[0] for name in inside if "/" in name)
        nested = {name.partition("/")[0] for name in inside if name.count("/") > 1}
        train = _train_folder(folders, nested)
        if train:
            others = [name for name in folders if name != train]
            if others:
                log.info("data: %s%s/ is used; left out: %s", level, train, sample(others))
            level += f"{train}/"
        elif len(folders) == 1 and folders.total() == len(inside) and nested:
            level += f"{next(iter(folders))}/"
        else:
            return level


def held_out(folders: Collection[str]) -> list[str]:
    """The folders that are no classes but parts of a split, as a test/ beside classes."""
    lower = {folder.lower() for folder in folders}  # "valid" beside "invalid" is a class
    parts = parts_of(sorted(folders)).items()
    return [folder for folder, (word, whole) in parts if word in HELD_OUT and not whole and f"in{word}" not in lower]


def class_images(inside: Sequence[str], level: str, where: str) -> list[str]:
    """The images in folders that are classes, and not a test/ beside them; warns of these."""
    parts = held_out({name[len(level) :].partition("/")[0] for name in inside})
    if parts:
        log.warning(
            "data: left out of %s, as parts of a split by their names: %s; rename what is a class", where, sample(parts)
        )
    left_out = tuple(f"{level}{name}/" for name in parts)
    return [name for name in inside if not name.startswith(left_out)]


def warn_of_deeper(inside: Sequence[str], level: str, where: str) -> None:
    """Names the folders below class folders with images in several of them: these are no classes."""
    folders = [name[len(level) :].split("/")[:2] for name in inside if name.count("/", len(level)) > 1]
    below = Counter(folder for folder, _ in {tuple(pair) for pair in folders})
    deeper = sorted({"/".join(pair) for pair in folders if below[pair[0]] > 1})
    if deeper:
        log.warning(
            "data: folders inside the class folders of %s are no classes of their own: %s", where, sample(deeper)
        )


def levels(store: ImageStore, special: Sequence[str]) -> Iterator[str]:
    """Folders to look for a table in: the root, then into a folder named in `special` or a lone wrapper."""
    level = ""
    for _ in range(DEEPEST):
        yield level
        folders, files = store.listing(level)
        meant = named(folders, special)
        holds_data = any(is_image(name) or name.lower().endswith(".csv") for name in files)
        lone = folders if len(folders) == 1 and not holds_data else []
        if not (meant or lone):
            return
        level = posixpath.join(level, (meant or lone)[0])


def csvs(store: ImageStore, level: str) -> list[str]:
    return [posixpath.join(level, name) for name in store.listing(level)[1] if name.lower().endswith(".csv")]


def bases(store: ImageStore, table: str, special: Sequence[str], given: str = "") -> list[str]:
    """What the paths of the CSV `table` may count from: its folder, the root, or a `special` folder beside it.

    Or the folder `given` alone; a SettingsError if it is none of the store's.
    """
    if given:
        base = posixpath.normpath(without_root(given.replace("\\", "/"), store.root))
        if base.startswith(("/", "../")) or base == "..":
            raise SettingsError(f"data.base_path={given} lies outside {store.root}; give a folder below it")
        return ["" if base == "." else base]
    folder = posixpath.dirname(table)
    beside = named(store.listing(folder)[0], special)
    return list(dict.fromkeys([folder, "", *(posixpath.join(folder, name) for name in beside)]))


def stem(name: str) -> str:
    """`train` for `a/b/Train.csv`."""
    return posixpath.basename(name).lower().removesuffix(".csv")


def open_table(store: ImageStore, name: str) -> CsvFile:
    """The CSV `name` of a store."""
    if not store.exists(name):
        raise MissingInputError(f"no table {name} in {store.root}")
    return parse_csv(store.read(name), f"{name} in {store.root}", name)


def image_paths(
    written: pd.Series,
    table: CsvFile,
    store: ImageStore,
    bases: Sequence[str],
    check_files: bool,
    others: Collection[str] | None,
) -> pd.Series:
    """The paths `written` in a table, relative to the store's root, without the blanks around them.

    They count from the first of `bases` below which most of the first paths exist; names without a suffix get
    that of the images there. Those that are not there are looked for by name in every folder but those of the other
    parts of a split, whose words are `others`, unless that is None. The index says the rows, from 0 on. Raises a DataError for paths that
    lead out of the root, for names of several images, and with `check_files` for missing files.
    """
    paths = written.str.replace("\\", "/", regex=False).str.strip()
    for root in _spellings(store.root):
        paths = paths.str.removeprefix(root)
    paths = paths.str.replace(r"^(?:\./)+", "", regex=True)
    base, suffix = _where_most_are(paths[:TRIED_PATHS].tolist(), store, bases)
    whole = paths + suffix
    normal = f"{base}/" + whole if base else whole.copy()
    odd = whole.str.contains(ODD_PATH)
    normal[odd] = [_inside(base, path) for path in whole[odd]]
    outside = whole[normal == ""]
    if len(outside):
        raise DataError(
            f"{table}: paths that are empty or lead out of {store.root}: {sample(outside)}; "
            f"the first in row {outside.index[0] + 1} below the header"
        )
    names = store.names()
    if not check_files and (others is None or not any(map(is_image, names))):
        return normal
    there = set(names)
    absent = np.array([path not in there and not store.exists(path) for path in normal.tolist()], bool)
    if not absent.any():
        return normal
    meant = {} if others is None else match_names(paths[absent], names, others)
    taken = Counter([*(found[0] for found in meant.values() if found), *normal[~absent]])
    only = {path: found[0] for path, found in meant.items() if len(found) == 1 == taken[found[0]]}
    if only:
        where = sample(sorted({posixpath.dirname(path) for path in only.values()}))
        log.info("data: %s: %d images are found by their names, in %s", table, len(only), where)
        normal[absent] = [only.get(path, name) for path, name in zip(paths[absent], normal[absent], strict=True)]
    doubt = [f"{path!r} may mean {sample(found)}" for path, found in meant.items() if len(found) > 1]
    missing = normal[absent & ~paths.isin(list(only))].tolist()
    if missing and (check_files or doubt):
        folders = Counter(posixpath.dirname(name) or "." for name in names if is_image(name)).most_common(5)
        why = "; ".join(doubt[:3]) or f"images lie in {', '.join(f'{name} ({n:,})' for name, n in folders)}"
        raise DataError(
            f"{table} names {len(missing)} of {len(normal)} files that do not exist: {sample(missing)}; {why}; "
            "set data.path_column or data.base_path"
        )
    return normal


def match_names(paths: Iterable[str], names: Iterable[str], others: Collection[str]) -> dict[str, list[str]]:
    """For each path the images whose name ends like it, in any case, with or without their suffix.

    Those in folders that are called as the words `others`, of the other parts of a split, are none.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    images = list(filter(is_image, names))
    parts = {folder: parts_of(folder.split("/")).values() for folder in set(map(posixpath.dirname, images))}
    for name in images:
        folder, file = posixpath.split(name)
        if not any(part.word in others for part in parts[folder]):
            for key in (file, posixpath.splitext(file)[0]):
                by_name[key.lower()].append(name)
    ends = {path: f"/{path.lower()}" for path in paths}
    return {
        path: [
            name
            for name in by_name.get(posixpath.basename(end), [])
            if end in (f"/{name.lower()}"[-len(end) :], posixpath.splitext(f"/{name.lower()}")[0][-len(end) :])
        ]
        for path, end in ends.items()
    }


def guess_paths(table: CsvFile, store: ImageStore, others: Collection[str], without: str = "") -> str | None:
    """The one column, but for `without`, whose first values are all different and most of them names of images there; it is logged."""
    try:
        frame = table.read([name for name in table.columns if name != without])[:TRIED_PATHS].map(str.strip)
    except DataError:  # it has no rows, say: who reads it tells
        return None
    meant = match_names(frame.to_numpy().ravel(), store.names(), others)
    named = {name: sum(len(meant[cell]) == 1 for cell in frame[name]) for name in frame if frame[name].is_unique}
    most = max(named.values(), default=0)
    good = [name for name, count in named.items() if count == most > len(frame) / 2]
    good = [name for name in good if plain_name(name).lower() in ID_NAMES] or good
    if len(good) == 1:
        log.info("data: %s: the paths are the column %r, which names the images that lie there", table, good[0])
        return good[0]
    return None


def _where_most_are(paths: Sequence[str], store: ImageStore, bases: Sequence[str]) -> tuple[str, str]:
    """The base below which most of the paths are files, and the suffix that they lack; the first base where none is."""
    suffixes = [""]
    if not any(map(is_image, paths)):
        counts = Counter(posixpath.splitext(name)[1] for name in store.names() if is_image(name))
        suffixes += [suffix for suffix, _ in counts.most_common()]

    def count(pair: tuple[str, str]) -> int:
        inside = [_inside(pair[0], path + pair[1]) for path in paths]
        return sum(path != "" and store.exists(path) for path in inside)

    return max(((base, suffix) for suffix in suffixes for base in bases), key=count)


def _inside(base: str, path: str) -> str:
    """The normal form of `path` below `base`; empty when it is empty or leads out of the root."""
    normal = posixpath.normpath(posixpath.join(base, path))
    outside = normal.startswith(("/", "../")) or normal in (".", "..") or normal[1:2] == ":"
    return "" if outside or not path.strip() else normal


def without_root(path: str, root: Path) -> str:
    """An absolute path inside `root`, however that is spelled, as a relative one; another as it is."""
    for start in _spellings(root):
        path = f"{path}/".removeprefix(start).removesuffix("/")
    return path or "."


def _spellings(root: Path) -> list[str]:
    """A folder as it is given, absolute, and where its links lead, each with a slash at its end."""
    return [f"{path}/" for path in dict.fromkeys((root, root.absolute(), root.resolve()))]
