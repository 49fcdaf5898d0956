"""Finding one's way in a data folder: wrappers, train/ and test/, class folders, tables."""

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from fivefold.data.images import is_image
from fivefold.data.store import ImageStore
from fivefold.data.tables import few, without_root
from fivefold.errors import SettingsError

log = logging.getLogger("fivefold")

TRAIN_FOLDERS = ("train", "training")
EVAL_FOLDERS = ("test", "testing", "eval", "evaluation")
IMAGE_FOLDERS = ("images",)
HELD_OUT = {*EVAL_FOLDERS, "valid", "val", "validation", "pred", "unlabeled", "unlabelled"}
SPLIT_FOLDERS = {*TRAIN_FOLDERS, *HELD_OUT}
OF_ANY_PART = {"", "set", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "jpg", "jpeg", "png"}
"""What a folder's name may say beside its word of SPLIT_FOLDERS without saying of what it is a part."""
DEEPEST = 8


class Part(NamedTuple):
    """What a folder's name says of it: the `word` of SPLIT_FOLDERS, and of what it is a part (empty: of everything)."""

    word: str
    whole: tuple[str, ...]


def part_of(folder: str) -> Part | None:
    """("test", ("seg",)) for Seg_Test, ("train", ()) for train-images; None for a name with none of the words, or several."""
    words = re.split(r"[_\-\s]+", folder.lower())
    found = [word for word in words if word in SPLIT_FOLDERS]
    whole = tuple(word for word in words if word not in SPLIT_FOLDERS | OF_ANY_PART)
    return Part(found[0], whole) if len(found) == 1 else None


def parts_of(folders: Collection[str]) -> dict[str, Part]:
    """What the names say of those folders that are called as a part of a split."""
    return {folder: part for folder in folders if (part := part_of(folder))}


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
                log.info("data: %s%s/ is used; left out: %s", level, train, few(others))
            level += f"{train}/"
        elif len(folders) == 1 and folders.total() == len(inside) and nested:
            level += f"{next(iter(folders))}/"
        else:
            return level


def class_images(inside: Sequence[str], level: str, where: str) -> list[str]:
    """The images in folders that are classes, and not a test/ beside them; warns of these, and of names in between."""
    folders = dict.fromkeys(name[len(level) :].partition("/")[0] for name in inside)
    parts = _held_out(folders)
    if parts:
        log.warning(
            "data: left out of %s, as parts of a split by their names: %s; rename what is a class", where, few(parts)
        )
    doubtful = [name for name in parts_of(folders) if name not in parts]
    if doubtful:
        log.warning("data: %s has classes called as parts of a split: %s; take out what is none", where, few(doubtful))
    left_out = tuple(f"{level}{name}/" for name in parts)
    return [name for name in inside if not name.startswith(left_out)]


def warn_of_deeper(inside: Sequence[str], level: str, where: str) -> None:
    """Names the folders below class folders with images in several of them: these are no classes."""
    folders = [name[len(level) :].split("/")[:2] for name in inside if name.count("/", len(level)) > 1]
    below = Counter(folder for folder, _ in {tuple(pair) for pair in folders})
    deeper = sorted({"/".join(pair) for pair in folders if below[pair[0]] > 1})
    if deeper:
        log.warning("data: folders inside the class folders of %s are no classes of their own: %s", where, few(deeper))


def _held_out(folders: Collection[str]) -> list[str]:
    """Those of class folders that are called as a part to validate or test on, and so are no classes."""
    classes = {folder.lower() for folder in folders}  # "valid" beside "invalid" is a class
    return [
        folder
        for folder, (word, whole) in parts_of(folders).items()
        if word in HELD_OUT and not whole and f"in{word}" not in classes
    ]


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


def bases(store: ImageStore, folder: str, special: Sequence[str], given: str = "") -> list[str]:
    """What the paths of a table in `folder` may count from: that folder, the root, or a `special` folder beside it.

    Or the folder `given` alone; a SettingsError if it is none of the store's.
    """
    if given:
        base = posixpath.normpath(without_root(given.replace("\\", "/"), store.root))
        if base.startswith(("/", "../")) or base == "..":
            raise SettingsError(f"data.base_path={given} lies outside {store.root}; give a folder below it")
        return ["" if base == "." else base]
    beside = named(store.listing(folder)[0], special)
    return list(dict.fromkeys([folder, "", *(posixpath.join(folder, name) for name in beside)]))


def stem(name: str) -> str:
    """`train` for `a/b/Train.csv`."""
    return posixpath.basename(name).lower().removesuffix(".csv")
