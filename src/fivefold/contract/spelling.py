"""Names as people spell them: of classes, and of the truth and the sample submission that lie beside images."""

import posixpath
import unicodedata
from collections.abc import Iterable

TRUTHS = ("gt.csv", "ground_truth.csv")
SAMPLE = "sample_submission.csv"


def plain_name(name: str) -> str:
    """The name of a class or group as the split stage has it: NFC, without the blanks around it."""
    return unicodedata.normalize("NFC", name.strip())


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
