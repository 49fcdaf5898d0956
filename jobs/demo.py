"""`python -m jobs demo [KEY=VALUE...]`: run the whole pipeline on the 1,797 scanned digits of scikit-learn.

The first call writes the digits as 8×8 PNG files to data/demo. Then `submit` runs the recipe `demo`
on them as the run `demo`. Further KEY=VALUE are arguments of submit: settings, parallel=, runs=, --dry-run.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fivefold.contract.files import atomic
from fivefold.log import log

from . import submit

DATA = Path("data/demo")
LAST_TABLE = "gt.csv"
"""The file that is written last: if it exists, all others do."""


def main(arguments: Sequence[str]) -> int:
    """Write the digits if they are missing, and submit the run; return submit's exit code."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__.strip()}\n\n{submit.usage()}")
        return 0
    write_digits(DATA)
    defaults = ["recipe=demo", "run=demo", f"train={DATA / 'train'}", f"eval={DATA / 'test'}"]
    if any(argument.startswith("train.epochs=") for argument in arguments):
        defaults.append("train.warmup_epochs=0")  # the recipe's warm-up is longer than a short trial
    # If a key is set twice, submit uses the last value: the user's.
    return submit.main([*defaults, *arguments])


def write_digits(folder: Path) -> None:
    """Write train/<digit>/NNNN.png (80 %) and test/ with test.csv, sample_submission.csv and gt.csv (20 %)."""
    if (folder / "test" / LAST_TABLE).is_file():
        return
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=42, stratify=digits.target)
    names = {int(row): f"train/{digits.target[row]}/{row:04d}.png" for row in train}
    names |= {int(row): f"test/TEST_{number:05d}.png" for number, row in enumerate(test)}
    for row, name in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row]).save(folder / name)
    ids, labels = [f"TEST_{number:05d}" for number in range(len(test))], digits.target[test].astype(str)
    tables = {
        "test.csv": pd.DataFrame({"ID": ids, "img_path": [f"./{name}.png" for name in ids]}),
        "sample_submission.csv": pd.DataFrame(0.0, pd.Index(ids, name="ID"), sorted(set(labels))).reset_index(),
        LAST_TABLE: pd.DataFrame({"ID": ids, "label": labels}),
    }
    for name, table in tables.items():
        with atomic(folder / "test" / name) as temporary:
            table.to_csv(temporary, index=False, encoding="utf-8-sig")
    log.info("wrote %d training and %d test images to %s", len(train), len(test), folder)
