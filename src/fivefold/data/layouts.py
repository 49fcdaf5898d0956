"""Finding one's way in a data folder: wrappers, train/ and test/, class folders, tables."""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence

from fivefold.data.images import is_image
from fivefold.data.store import ImageStore
from fivefold.data.tables import few
from fivefold.errors import SettingsError

log = logging.getLogger("fivefold")

TRAIN_FOLDERS = ("train", "training")
EVAL_FOLDERS = ("test", "eval", "evaluation")
IMAGE_FOLDERS = ("images",)
SAMPLE_SUBMISSION = "sample_submission"
SPLIT_FOLDERS = {*TRAIN_FOLDERS, *EVAL_FOLDERS, "valid", "val", "validation", "unlabeled"}
DEEPEST = 8


def class_level(names: Sequence[str]) -> str:
    """The prefix below which each folder is a class: past a wrapper around everything, and past train/."""
    level = ""
    while True:
        inside = [name[len(level) :] for name in names if name.startswith(level)]
        folders = Counter(name.partition("/")[0] for name in inside if "/" in name)
        nested = {name.partition("/")[0] for name in inside if name.count("/") > 1}
        train = next((name for name in folders if name.lower() in TRAIN_FOLDERS), None)
        others = [name for name in folders if name != train]
        if train and (train in nested or all(name.lower() in SPLIT_FOLDERS for name in others)):
            if others:
                log.info("data: %s%s/ is used; left out: %s", level, train, few(others))
            level += f"{train}/"
        elif len(folders) == 1 and folders.total() == len(inside) and nested:
            level += f"{next(iter(folders))}/"
        else:
            return level


def levels(store: ImageStore, special: Sequence[str]) -> Iterator[str]:
    """Folders to look for a table in: the root, then into a folder named in `special` or a lone wrapper."""
    level = ""
    for _ in range(DEEPEST):
        yield level
        folders, files = store.listing(level)
        named = [name for name in folders if name.lower() in special]
        holds_data = any(is_image(name) or name.lower().endswith(".csv") for name in files)
        lone = folders if len(folders) == 1 and not holds_data else []
        if not (named or lone):
            return
        level = posixpath.join(level, (named or lone)[0])


def csvs(store: ImageStore, level: str) -> list[str]:
    return [posixpath.join(level, name) for name in store.listing(level)[1] if name.lower().endswith(".csv")]


def bases(store: ImageStore, folder: str, special: Sequence[str], given: str = "") -> list[str]:
    """What the paths of a table in `folder` may count from: that folder, the root, or a `special` folder beside it.

    Or the folder `given` alone; a SettingsError if it is none of the store's.
    """
    if given:
        base = posixpath.normpath(given.replace("\\", "/").removeprefix(f"{store.root}/"))
        if base.startswith(("/", "../")) or base == "..":
            raise SettingsError(f"data.base_path={given} lies outside {store.root}; give a folder below it")
        return ["" if base == "." else base]
    beside = [name for name in store.listing(folder)[0] if name.lower() in special]
    return list(dict.fromkeys([folder, "", *(posixpath.join(folder, name) for name in beside)]))


def stem(name: str) -> str:
    """`train` for `a/b/Train.csv`."""
    return posixpath.basename(name).lower().removesuffix(".csv")
