"""Names as people spell them: of classes, and of the truth and the sample submission that lie beside images."""

import posixpath
import unicodedata
from collections.abc import Iterable

TRUTHS = ("gt.csv", "ground_truth.csv")
SAMPLE = "sample_submission.csv"
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u180e\u200b\u200e\u200f\u2060\ufeff"))
"""Characters that take no room and say nothing; the joiners of Persian, of India's scripts and of emoji are none."""

SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
"""Choose how the character before them is drawn."""
WIDE = frozenset(map(chr, range(0xFF01, 0xFF5F)))
"""Latin letters, digits and signs as wide as those of Chinese."""


def plain_name(name: str) -> str:
    """The name of a class or group as the split stage has it: NFC, without the blanks around it and without INVISIBLE ones."""
    return unicodedata.normalize("NFC", name.translate(INVISIBLE).strip())


def look(name: str) -> str:
    """What is the same for names that look the same: no character without a width, and one blank for any."""
    shown = [letter for letter in name if unicodedata.category(letter) != "Cf" and letter not in SELECTORS]
    return " ".join("".join(unicodedata.normalize("NFKC", c) if c in WIDE else c for c in shown).split())


def is_sample(name: str) -> bool:
    """Whether a file is a sample submission: sample_submission.csv, sampleSubmission.csv and the like, in any folder."""
    return _spelt(name) == _spelt(SAMPLE)


def is_truth(name: str) -> bool:
    """Whether a file is called as a ground truth is: gt.csv, ground_truth.csv, GT.csv and the like, in any folder."""
    return _spelt(name) in map(_spelt, TRUTHS)


def truth_among(names: Iterable[str]) -> str | None:
    """Of the names of files the ground truth, gt.csv before ground_truth.csv, and as these are spelt before others."""
    spelt = [_spelt(truth) for truth in TRUTHS]
    found = [
        (spelt.index(_spelt(name)), posixpath.basename(name) not in TRUTHS, name) for name in names if is_truth(name)
    ]
    return min(found, default=(0, False, None))[-1]


def _spelt(name: str) -> str:
    """`samplesubmission.csv` for `a/Sample-Submission.csv`."""
    return posixpath.basename(name).lower().translate(str.maketrans("", "", "_- "))
