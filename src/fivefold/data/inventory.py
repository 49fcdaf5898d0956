"""What lies in a store: its images, and every other file under the reason why it is none."""

import logging
import posixpath
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from unicodedata import normalize

from fivefold.contract.files import DANGLING, EMPTY, HIDDEN, SYSTEM
from fivefold.data.images import IMAGE_SUFFIXES, is_image
from fivefold.data.store import ImageStore

log = logging.getLogger("fivefold")

UNUSED = ("not in the table", "in no class folder")
UNREAD = {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".tga"} - IMAGE_SUFFIXES
"""Suffixes of images that nothing here decodes."""
ASKED = (*UNREAD, DANGLING, "without suffix")
"""Reasons to leave out what gets an answer where each image is to have one."""
_BESIDE = ".db .docx .h5 .html .ini .ipynb .json .jsonl .log .mat .md .npy .npz .parquet .pdf .pkl .pth .py .tsv .txt .xml .yaml .yml"
NO_IMAGES = {HIDDEN, SYSTEM, EMPTY, *UNUSED, *_BESIDE.split()}
"""Reasons to leave out what is no image that somebody wants to be used: suffixes of what lies beside images, and others."""


@dataclass(frozen=True)
class Inventory:
    """Names in a store: `images` by their suffix; those of all other files by the reason to leave them out."""

    images: list[str]
    left_out: Mapping[str, list[str]]

    @property
    def asked(self) -> list[str]:
        """The names, sorted, of the images and of what is called like one or without a suffix."""
        return sorted(self.images + [name for reason in ASKED for name in self.left_out.get(reason, [])])

    def counts(self, used: Collection[str] = (), unused: str = "") -> dict[str, int]:
        """How many files are left out, by reason; images that are not `used` under the reason `unused`, if that is given."""
        counts = {reason: len(names) for reason, names in sorted(self.left_out.items()) if reason != EMPTY}
        there = {normalize("NFC", name) for name in self.images if unused}
        rest = len(there.difference(normalize("NFC", name) for name in used)) if there else 0
        return {reason: count for reason, count in (counts | {unused: rest}).items() if count}


def take_inventory(store: ImageStore) -> Inventory:
    """Every file of a store. Tables (.csv) are left to those who read them."""
    left_out: dict[str, list[str]] = {}
    names = store.names(left_out)
    for name in (name for name in names if not is_image(name) and not name.lower().endswith(".csv")):
        left_out.setdefault(posixpath.splitext(name)[1].lower() or "without suffix", []).append(name)
    return Inventory([name for name in names if is_image(name)], left_out)


def may_be_images(reasons: Collection[str]) -> bool:
    """Whether there may be images among what is left out for these reasons."""
    return not NO_IMAGES.issuperset(reasons)


def in_words(counts: Mapping[str, int]) -> str:
    """`4 .heic, 2 hidden`, with what would help."""
    hint = " (pip install 'fivefold[heif]' reads HEIC)" if {".heic", ".heif"} & counts.keys() else ""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) + hint


def log_left_out(counts: Mapping[str, int], where: object) -> None:
    """Logs what is left out in one line: a warning where there may be images in it."""
    if counts:
        level = logging.WARNING if may_be_images(counts) else logging.INFO
        log.log(level, "data: left out of %s: %s", where, in_words(counts))
