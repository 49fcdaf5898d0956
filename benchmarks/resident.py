"""The model alone: steps on a batch that lies ready on the device, `python -m benchmarks.resident JSON`.

The loop is the one that `train-fold FOLD=0` builds of the same settings, photographs and split. JSON is an object of
`train`, `split`, `decisions`, `settings` (KEY=VALUE), `what` (a name of STEPS), and the number of `passes` of so many `steps` each,
which are timed after `warm_up` other steps. What it tells: the passes with their seconds; `losses` of every step where
`curve` is true.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from fivefold.replicas import BY_ITSELF

from benchmarks.clocks import Reading
from benchmarks.handmade import ByHand, Numbers
from benchmarks.turns import my_turn
from fivefold import assemble
from fivefold.choose import choose
from fivefold.contract.stages import CLASSES, FOLDS
from fivefold.data.dataset import Batch, Sample, load
from fivefold.data.folds import read_folds
from fivefold.data.store import open_store
from fivefold.recipe import Settings
from fivefold.settings import arguments_layer
from fivefold.settings import load as load_settings
from fivefold.training.loop import Loop, TrainRows
from fivefold.training.objectives import Rows
from fivefold.training.portions import rows_of

Step = Callable[[], torch.Tensor]
"""A step; the loss that it had, on the device."""


@dataclass(frozen=True)
class Resident:
    """A loop, and its first batch: uint8 images as the loader gives them."""

    loop: Loop
    settings: Settings
    samples: list[Sample]
    batch: Batch

    def rows(self, step: int = 0) -> Rows:
        """The rows normalised, on the device, mixed as they would be in this step."""
        loop, at = self.loop, (self.loop.duration.seed, 1, step, 0)
        return rows_of(self.batch, self.samples, loop.train, loop.mixing, loop.runtime, 1, at)

    def wait(self) -> None:
        if self.loop.runtime.device.type == "cuda":
            torch.cuda.synchronize()


def main(arguments: Sequence[str]) -> int:
    given = json.loads(arguments[0])
    resident = of_first_fold(given["train"], Path(given["split"]), given["settings"], Path(given["decisions"]))
    step = choose(STEPS, "step", given["what"])(resident)
    resident.loop.model.train()
    losses = [step() for _ in range(given["warm_up"])]
    told: dict[str, Any] = {"passes": []}
    for _ in range(given["passes"]):
        resident.wait()
        my_turn()
        begun = Reading.now()
        losses += [step() for _ in range(given["steps"])]
        resident.wait()
        told["passes"].append(begun.since(given["steps"] * len(resident.samples)))
    told["precision"] = assemble.precision_name(resident.loop.runtime)
    if given.get("curve"):
        told["losses"] = [float(loss) for loss in losses]
    print(json.dumps(told))
    return 0


def of_first_fold(train: str, split: Path, arguments: Sequence[str], decisions: Path) -> Resident:
    """The loop of fold 0 on as many of its images as a batch has, with its first batch.

    What is left to a probe is probed once, and found in the folder `decisions` later.
    """
    settings = load_settings([arguments_layer(arguments)])
    table = read_folds(split / FOLDS, split / CLASSES)
    rows = table.train_rows(0)[: settings.train.batch_size]
    assemble.seed_everything(settings.seed)
    network = assemble.build_classifier(settings.model, len(table.classes))
    settings = assemble.settled(settings, network, BY_ITSELF, None, decisions)
    runtime = assemble.runtime_of(settings)
    targets = assemble.one_hot(table.codes[rows], len(table.classes), runtime.device)
    images = assemble.image_set(open_store(Path(train)), table, rows, settings, training=True)
    loop = assemble.build_loop(
        "resident", network, TrainRows(images, targets), None, settings, runtime, select=False, patience=0
    )
    samples = loop.batches(1)[0]
    return Resident(loop, settings, samples, next(load(images, [samples], workers=0)))


def update(resident: Resident) -> Step:
    """The update alone, on rows that lie normalised on the device: forward, backward, the optimiser's step."""
    rows = resident.rows()
    return lambda: resident.loop.update([rows])[0].loss.detach()


def whole(resident: Resident) -> Step:
    """A whole step but for the loader: normalising, mixing, the update, what follows it."""
    numbers = count()

    def step() -> torch.Tensor:
        result = resident.loop.update([resident.rows(next(numbers))])[0]
        for call in resident.loop.after_step:
            call()
        return result.loss.detach()

    return step


def by_hand(resident: Resident, batched: bool) -> Step:
    """The same step written out by hand, on the same network and images."""
    loop, numbers = resident.loop, count()
    hand = ByHand(loop.model, loop.runtime, Numbers.of(resident.settings), batched)
    targets = loop.train.targets[resident.batch.rows.to(loop.runtime.device)]

    def step() -> torch.Tensor:
        images = loop.runtime.images(resident.batch.images)
        return hand.step(images, targets, (loop.duration.seed, 1, next(numbers), 0))

    return step


STEPS: dict[str, Callable[[Resident], Step]] = {
    "update": update,
    "whole": whole,
    "cheapest": lambda resident: by_hand(resident, batched=True),
    "straightforward": lambda resident: by_hand(resident, batched=False),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
