"""Folds as timm reads them: `fold-K/train` and `fold-K/validation` of class folders, of links to the photographs.

`python -m benchmarks.fold_folders PHOTOS TARGET FOLDS` divides them by scikit-learn's StratifiedKFold, as one who has no
tool for it would.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    from sklearn.model_selection import StratifiedKFold

    photos, target, folds = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    paths = sorted(str(path.relative_to(photos)) for path in photos.glob("*/*"))
    labels = [path.split("/")[0] for path in paths]
    parts = StratifiedKFold(folds, shuffle=True, random_state=42).split(paths, labels)
    for fold, (training, validation) in enumerate(parts):
        link(photos, target / f"fold-{fold}", [paths[at] for at in training], [paths[at] for at in validation])
    return 0


def link(photos: Path, folder: Path, training: Iterable[str], validation: Iterable[str]) -> Path:
    """Links below `folder` to the photographs at these paths, each `CLASS/NAME`; the folder."""
    for part, paths in (("train", training), ("validation", validation)):
        for path in paths:
            place = folder / part / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(photos / path)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
