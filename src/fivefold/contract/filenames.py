"""Normalize class names, and recognize the file names of ground truth and sample submissions."""

import posixpath
import unicodedata
from collections.abc import Iterable

GROUND_TRUTH_NAMES = ("gt.csv", "ground_truth.csv")
SAMPLE_SUBMISSION = "sample_submission.csv"
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u180e\u200b\u200e\u200f\u2060\ufeff"))
"""Characters without a width or a meaning. The joiners of Persian, of India's scripts and of emoji are not among them."""

VARIATION_SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
"""They select the glyph of the character before them."""
FULLWIDTH = frozenset(map(chr, range(0xFF01, 0xFF5F)))
"""Latin letters, digits and punctuation in the width of Chinese characters."""


def normalize_class_name(name: str) -> str:
    """Return the name of a class or group as the split stage writes it: NFC, stripped, without INVISIBLE characters."""
    return unicodedata.normalize("NFC", name.translate(INVISIBLE).strip())


def visual_form(name: str) -> str:
    """Return a text that is equal for names that look equal: no zero-width characters, one space for any whitespace."""
    visible = [letter for letter in name if unicodedata.category(letter) != "Cf" and letter not in VARIATION_SELECTORS]
    return " ".join("".join(unicodedata.normalize("NFKC", c) if c in FULLWIDTH else c for c in visible).split())


def is_sample_submission(name: str) -> bool:
    """Return whether a file is a sample submission by its name: sample_submission.csv, sampleSubmission.csv etc., in any folder."""
    return _canonical(name) == _canonical(SAMPLE_SUBMISSION)


def is_ground_truth(name: str) -> bool:
    """Return whether a file is a ground truth by its name: gt.csv, ground_truth.csv, GT.csv etc., in any folder."""
    return _canonical(name) in map(_canonical, GROUND_TRUTH_NAMES)


def pick_ground_truth_file(names: Iterable[str]) -> str | None:
    """Return the ground truth among file names: gt.csv before ground_truth.csv, exact spellings before others; None without one."""
    order = [_canonical(truth) for truth in GROUND_TRUTH_NAMES]
    matches = [
        (order.index(_canonical(name)), posixpath.basename(name) not in GROUND_TRUTH_NAMES, name)
        for name in names
        if is_ground_truth(name)
    ]
    return min(matches, default=(0, False, None))[-1]


def _canonical(name: str) -> str:
    """Return `samplesubmission.csv` for `a/Sample-Submission.csv`."""
    return posixpath.basename(name).lower().translate(str.maketrans("", "", "_- "))
