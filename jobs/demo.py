"""`python -m jobs demo [KEY=VALUE...]`: the whole pipeline on the 1,797 scanned digits of scikit-learn.

The digits are written as 8×8 PNG files below data/demo, once; then `submit` runs the recipe `demo`
on them as the run `demo`. Further KEY=VALUE are submit's: settings, parallel=, runs=, --dry-run.
"""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fivefold.contract.files import atomic, read_json, write_json
from fivefold.progress import track
from fivefold.settings import normal_key

from . import submit

log = logging.getLogger("fivefold")

DATA = Path("data/demo")
MARKER = "written.json"
FORMAT = 1
"""Raised when the files change, so that older ones are written anew."""


def main(arguments: Sequence[str]) -> int:
    """Writes the digits where they are not there yet, and submits the run; submit's exit code."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__.strip()}\n\n{submit.usage()}")
        return 0
    write_digits(DATA)
    own = f"recipe=demo run=demo train={DATA / 'train'} eval={DATA / 'test'}"
    return submit.main(merged(own.split(), arguments))


def merged(own: Sequence[str], given: Sequence[str]) -> list[str]:
    """The demo's own arguments, but for those that the user gives otherwise."""
    keys = {normal_key(text.split("=", 1)[0]) for text in given}
    return [*(text for text in own if text.split("=", 1)[0] not in keys), *given]


def write_digits(folder: Path) -> None:
    """Writes train/<digit>/NNNN.png (80 %) and test/ with test.csv, sample_submission.csv and gt.csv (20 %)."""
    if (folder / MARKER).is_file() and read_json(folder / MARKER) == {"format": FORMAT}:
        return
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=42, stratify=digits.target)
    names = {int(row): f"train/{digits.target[row]}/{row:04d}.png" for row in train}
    names |= {int(row): f"test/TEST_{number:05d}.png" for number, row in enumerate(test)}
    for row, name in track(names.items(), len(names), "writing digits"):
        write_png(folder / name, images[row])
    write_tables(folder / "test", [str(digits.target[row]) for row in test])
    write_json(folder / MARKER, {"format": FORMAT})
    log.info("wrote %d training and %d test images to %s", len(train), len(test), folder)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes a grey image [H, W] uint8, always with the same bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def write_tables(folder: Path, labels: Sequence[str]) -> None:
    """The tables of a competition's download: what to predict, in which columns, and the truth."""
    ids = [f"TEST_{number:05d}" for number in range(len(labels))]
    classes = sorted(set(labels))
    write_csv(folder / "test.csv", ["ID", "img_path"], ([name, f"./{name}.png"] for name in ids))
    write_csv(folder / "sample_submission.csv", ["ID", *classes], ([name, *["0.0"] * len(classes)] for name in ids))
    write_csv(folder / "gt.csv", ["ID", "label"], zip(ids, labels, strict=True))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
