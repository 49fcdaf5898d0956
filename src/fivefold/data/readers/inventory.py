"""Inventory of a store: its images, and all other files by the reason why Fivefold ignores them."""

import logging
import posixpath
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from unicodedata import normalize

from fivefold.contract.files import DANGLING, EMPTY, HIDDEN, SYSTEM
from fivefold.data.image_io import IMAGE_SUFFIXES, is_image
from fivefold.data.readers.stores import ImageStore

log = logging.getLogger("fivefold")

UNUSED = ("not in the table", "in no class folder")
UNREAD = {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".tga"} - IMAGE_SUFFIXES
"""Suffixes of image formats that Fivefold cannot decode."""
ANSWERED_REASONS = (*UNREAD, DANGLING, "without suffix")
"""Reasons for ignoring files that still get a row if every input needs a result (as in `predict`)."""
_OTHERS = ".db .docx .h5 .html .ini .ipynb .json .jsonl .log .mat .md .npy .npz .parquet .pdf .pkl .pth .py .tsv .txt .xml .yaml .yml"
NON_IMAGE_REASONS = {HIDDEN, SYSTEM, EMPTY, *UNUSED, *_OTHERS.split()}
"""Reasons for ignoring files that are certainly not images to use: suffixes common beside images, and others."""


@dataclass(frozen=True)
class Inventory:
    """Names of the files in a store: `images` by suffix, and `left_out` by the reason for ignoring them."""

    images: list[str]
    left_out: Mapping[str, list[str]]

    @property
    def asked(self) -> list[str]:
        """Return the sorted names of the images, of undecodable or broken ones, and of files without a suffix."""
        return sorted(self.images + [name for reason in ANSWERED_REASONS for name in self.left_out.get(reason, [])])

    def counts(self, used: Collection[str] = (), unused: str = "") -> dict[str, int]:
        """Count the ignored files by reason; images that are not in `used` count under the reason `unused`, if it is set."""
        counts = {reason: len(names) for reason, names in sorted(self.left_out.items()) if reason != EMPTY}
        names = {normalize("NFC", name) for name in self.images if unused}
        rest = len(names.difference(normalize("NFC", name) for name in used)) if names else 0
        return {reason: count for reason, count in (counts | {unused: rest}).items() if count}


def take_inventory(store: ImageStore) -> Inventory:
    """List every file of a store. CSV files are in neither group: their readers list them."""
    left_out: dict[str, list[str]] = {}
    names = store.names(left_out)
    for name in (name for name in names if not is_image(name) and not name.lower().endswith(".csv")):
        left_out.setdefault(posixpath.splitext(name)[1].lower() or "without suffix", []).append(name)
    return Inventory([name for name in names if is_image(name)], left_out)


def may_be_images(reasons: Collection[str]) -> bool:
    """Return whether files ignored for these reasons may be images."""
    return not NON_IMAGE_REASONS.issuperset(reasons)


def in_words(counts: Mapping[str, int]) -> str:
    """Return `4 .heic, 2 hidden`, with a hint on what to install."""
    hint = " (pip install 'fivefold[heif]' adds HEIC support)" if {".heic", ".heif"} & counts.keys() else ""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) + hint


def log_left_out(counts: Mapping[str, int], where: object) -> None:
    """Log the ignored files in one line, as a warning if some may be images."""
    if counts:
        level = logging.WARNING if may_be_images(counts) else logging.INFO
        log.log(level, "data: ignored files in %s: %s", where, in_words(counts))
