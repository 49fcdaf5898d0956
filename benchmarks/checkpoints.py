"""What checkpoints cost: epochs of one training that are followed by one, and epochs that are not, in turns.

    python benchmarks/checkpoints.py DATA.zip [RECIPE] [PAIRS]

DATA is any training data that `split` takes, RECIPE a recipe's name or file (small_images), PAIRS how many pairs of
epochs are timed (7) after two that are not. Printed as JSON: the median of the pairs' ratios with their spread, and
how long one takes to gather and to write. Compare nothing between two runs: leave the machine alone while it runs.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fivefold import assemble
from fivefold.data.folds import FoldTable, read_folds
from fivefold.data.store import open_store
from fivefold.recipe import Settings
from fivefold.settings import arguments_layer, load
from fivefold.training.loop import Loop, TrainRows, ValidRows, fit
from fivefold.training.resume import Checkpoints, captured

WARM_UP = 2


def main(arguments: Sequence[str]) -> int:
    """Splits the data, trains fold 0 for as many epochs as are needed, and prints the figures."""
    if not 1 <= len(arguments) <= 3 or arguments[0].startswith("-"):
        print(__doc__)
        return 64
    data, recipe, pairs = Path(arguments[0]), *(list(arguments[1:]) + ["small_images", "7"][len(arguments) - 1 :])
    epochs = WARM_UP + 2 * int(pairs)
    settings = load([arguments_layer([f"recipe={recipe}", f"train.epochs={epochs}", "train.patience=0"])])
    with tempfile.TemporaryDirectory() as work:
        loop = first_fold(data, split(data, recipe, Path(work)), settings)
        kept = InTurns(Path(work) / "checkpoints")
        fit(replace(loop, checkpoints=kept))
    print(json.dumps({"recipe": recipe, **about(), **figures(kept, seconds_to_gather(loop))}, indent=1))
    return 0


class InTurns(Checkpoints):
    """Writes a checkpoint after every second epoch alone; `ended` is when each epoch was over with what followed it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(folder)
        self.ended: list[float] = []
        self.seconds: list[float] = []
        self.bytes = 0

    def save(self, state: Mapping[str, Any]) -> None:
        begun = time.perf_counter()
        if self.writes(len(self.ended)):
            super().save(state)
            self.seconds.append(time.perf_counter() - begun)
            self.bytes = max(path.stat().st_size for path in self.folder.iterdir())
        self.ended.append(time.perf_counter())

    @staticmethod
    def writes(epoch: int) -> bool:
        """Whether this epoch (from 0) is followed by one: within the pairs first yes, no, then no, yes, and so on."""
        pair, second = divmod(epoch - WARM_UP, 2)
        return pair % 2 == second


def figures(kept: InTurns, gathering: float) -> dict[str, Any]:
    epochs = [after - before for before, after in zip(kept.ended, kept.ended[1:], strict=False)][WARM_UP - 1 :]
    ratios = []
    for first in range(0, len(epochs), 2):
        written, not_written = sorted((first, first + 1), key=lambda at: not kept.writes(at + WARM_UP))
        ratios.append(epochs[written] / (epochs[not_written] - gathering))
    return {
        "pairs": len(ratios),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in sorted(ratios)],
        "epoch_seconds_median": round(statistics.median(epochs), 3),
        "write_seconds_median": round(statistics.median(kept.seconds), 4),
        "gather_seconds": round(gathering, 4),
        "megabytes": round(kept.bytes / 1e6, 1),
    }


def seconds_to_gather(loop: Loop) -> float:
    """How long the states of all parts take to be named: the loop does it after each epoch, written or not."""
    begun = time.perf_counter()
    captured(loop.parts, loop.runtime.device)
    return time.perf_counter() - begun


def split(data: Path, recipe: str, work: Path) -> FoldTable:
    environment = os.environ | {"SM_CHANNEL_TRAIN": str(data), "SM_OUTPUT_DATA_DIR": str(work / "split")}
    subprocess.run([sys.executable, "-m", "jobs", "split", f"recipe={recipe}"], env=environment, check=True)
    return read_folds(work / "split" / "folds.parquet", work / "split" / "classes.json")


def first_fold(data: Path, table: FoldTable, settings: Settings) -> Loop:
    """The loop that `train-fold FOLD=0` would run, with random weights at the start and nothing that watches it."""
    store, runtime = open_store(data), assemble.runtime_of(settings)
    assemble.seed_everything(settings.seed)
    network = assemble.build_classifier(settings.model, len(table.classes))
    train, valid = table.train_rows(0), table.valid_rows(0)
    targets = assemble.one_hot(table.codes[train], len(table.classes), runtime.device)
    return assemble.build_loop(
        "fold 0",
        network,
        TrainRows(assemble.image_set(store, table, train, settings, training=True), targets),
        ValidRows(assemble.image_set(store, table, valid, settings, training=False), table.codes[valid]),
        settings,
        runtime,
        select=True,
        patience=0,
    )


def about() -> dict[str, Any]:
    return {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
