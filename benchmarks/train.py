"""`train-fold` from JPEGs ÷ the same model and step on a batch that lies ready: what loading costs.

A is the stage itself as a process; what counts is its training passes from the second epoch on, loader, mixing and all
that the loop does between two steps included. B is the update alone, of a loop built of the same settings, again and again on
one batch of floats, in the precision and memory format that A has: as many steps a pass. Both live side by side and take
turns, a pass each; the ratio of a pair is the median of neighbouring passes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case, case, images_of, split_of
from benchmarks.clocks import counted, rate, ratio_of_rounds
from benchmarks.options import Options
from benchmarks.pairs import Call, Ended, Spread, repeated, run, side_by_side
from benchmarks.results import Finding, ratio
from fivefold.contract.files import read_json
from fivefold.contract.stages import MODEL, RECORD

WARM_UP = 3
Told = dict[str, Any]


def measure(options: Options) -> Iterator[Finding]:
    for name in options.chosen(CASES):
        yield against_resident(name, CASES, options)


def against_resident(name: str, table: Mapping[str, Case], options: Options) -> Finding:
    """The ratio of one case, in turns."""
    found = case(name, options, table)
    photos = images_of(found, options)
    split = split_of(photos, options)
    manner = manner_of(found, photos, split, options)
    settings = [*found.arguments(options.device), *manner]
    steps = -(-found.images * 4 // 5 // found.batch)

    def pair() -> tuple[Told, Told]:
        stage = train_fold(settings, photos, split, options)
        alone = resident(settings, "update", (found.epochs, steps), photos, split, options)
        return told_by(*side_by_side(stage, alone, options.cores), options)

    turns = repeated(pair, options.pairs, f"train {name}")
    said = Spread.of([ours["stage_says"] for ours, _ in turns])
    return ratio(
        name, [ratio_of_rounds(*turn) for turn in turns], **beside(turns, "alone"), manner=manner, stage_json=said
    )


def beside(turns: list[tuple[Told, Told]], other: str) -> dict[str, Any]:
    """Images a second and seconds of the processor an image of both sides, and the precision that each had."""
    told: dict[str, Any] = {}
    for name, side in (("ours", 0), (other, 1)):
        rates = [rate(counted(turn[side])) for turn in turns]
        told[name] = Spread.of([each["images_per_second"] for each in rates])
        told[f"{name}_cpu_ms"] = Spread.of([1000 * each["cpu_seconds_per_image"] for each in rates])
        told[f"{name}_precision"] = ", ".join(sorted({turn[side]["precision"] for turn in turns}))
    return told


def train_fold(settings: list[str], photos: Path, split: Path, options: Options) -> Call:
    """A fresh run of `train-fold FOLD=0`, whose passes are watched."""
    folder = options.fresh("runs", "train")
    channels = {
        "SM_CHANNEL_TRAIN": photos,
        "SM_CHANNEL_FOLDS": split,
        "SM_MODEL_DIR": folder / "model",
        "SM_OUTPUT_DATA_DIR": folder / "output",
        "SM_CHECKPOINT_DIR": folder / "checkpoints",
    }
    cache = f"data.cache={options.folder('caches')}"  # as folds of a run share one
    return Call(
        ["-m", "benchmarks.watched", "epochs", "train-fold", "FOLD=0", cache, *settings],
        {name: str(path) for name, path in channels.items()},
    )


def manner_of(found: Case, photos: Path, split: Path, options: Options) -> list[str]:
    """The settings of precision and memory format that `train-fold` decides for, of an epoch of it; the cache is there then."""
    call = train_fold(replace(found, epochs=1).arguments(options.device), photos, split, options)
    run(call.arguments, options.cores, call.variables)
    told = read_json(options.folder("runs", "train") / "model" / MODEL)
    last = told["settings"]["train"]["channels_last"]
    return [f"train.precision={told['precision']}", f"train.channels_last={json.dumps(last)}"]


def told_by(ours: Ended, other: Ended, options: Options) -> tuple[Told, Told]:
    """What the passes of `train-fold` and of the process beside it told, and `stage_says`, what the record of the run says of them."""
    folder = options.folder("runs", "train") / "model"
    said = {"stage_says": read_json(folder / RECORD)["metrics"]["images_per_second"]}
    return ours.told | said | {"precision": read_json(folder / MODEL)["precision"]}, other.told


def resident(
    settings: list[str],
    what: str,
    size: tuple[int, int],
    photos: Path,
    split: Path,
    options: Options,
    **more: Any,
) -> Call:
    """A fresh process of steps on a resident batch; `size`: passes, and steps of each."""
    passes, steps = size
    given = {"train": str(photos), "split": str(split), "settings": settings, "what": what}
    given |= {"passes": passes, "steps": steps, "decisions": str(options.folder("decisions")), "warm_up": WARM_UP}
    return Call(["-m", "benchmarks.resident", json.dumps(given | more)])
