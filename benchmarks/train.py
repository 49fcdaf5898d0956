"""`train-fold` from JPEGs ÷ the same model and step on a batch that lies ready: what loading costs.

A is the stage itself as a process; what counts is its training passes from the second epoch on, loader, mixing and all
that the loop does between two steps included. B is the update alone, of a loop built of the same settings, again and again on
one batch of floats, in the precision and memory format that A had.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case, case, images_of, split_of
from benchmarks.clocks import rate
from benchmarks.options import Options
from benchmarks.pairs import Spread, in_turns, run
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
    turns = in_turns(
        lambda: train_fold(found, photos, split, options),
        lambda fold: alone(found, fold["manner"], photos, split, options),
        options.pairs,
        f"train {name}",
    )
    ratios = [a["images_per_second"] / b["images_per_second"] for a, b in turns]
    said = Spread.of([a["stage_says"] for a, _ in turns])
    return ratio(name, ratios, **beside(turns, "alone"), stage_json=said)


def beside(turns: list[tuple[Told, Told]], other: str) -> dict[str, Any]:
    """Images a second and seconds of the processor an image of both sides, and the precision that each had."""
    told: dict[str, Any] = {}
    for name, side in (("ours", 0), (other, 1)):
        told[name] = Spread.of([turn[side]["images_per_second"] for turn in turns])
        told[f"{name}_cpu_ms"] = Spread.of([1000 * turn[side]["cpu_seconds_per_image"] for turn in turns])
        told[f"{name}_precision"] = ", ".join(sorted({turn[side]["precision"] for turn in turns}))
    return told


def train_fold(found: Case, photos: Path, split: Path, options: Options) -> Told:
    """A fresh run of `train-fold FOLD=0`; its images a second from the second epoch on."""
    folder = options.fresh("runs", "train")
    channels = {
        "SM_CHANNEL_TRAIN": photos,
        "SM_CHANNEL_FOLDS": split,
        "SM_MODEL_DIR": folder / "model",
        "SM_OUTPUT_DATA_DIR": folder / "output",
        "SM_CHECKPOINT_DIR": folder / "checkpoints",
    }
    cache = f"data.cache={options.folder('caches')}"  # as folds of a run share one; the first turn makes it
    arguments = ["train-fold", "FOLD=0", cache, *found.arguments(options.device)]
    ended = run(
        ["-m", "benchmarks.watched", "epochs", *arguments],
        options.cores,
        {name: str(path) for name, path in channels.items()},
    )
    counted = ended.told["passes"][1:] or ended.told["passes"]
    said = read_json(folder / "model" / RECORD)["metrics"]["images_per_second"]
    return rate(counted) | manner_of(folder / "model") | {"stage_says": said}


def manner_of(folder: Path) -> Told:
    """The precision of a trained model; and `manner`, the settings that train another one in it and in its memory format."""
    told = read_json(folder / MODEL)
    last = told["settings"]["train"]["channels_last"]
    manner = [f"train.precision={told['precision']}", f"train.channels_last={json.dumps(last)}"]
    return {"precision": told["precision"], "manner": manner}


def alone(found: Case, manner: list[str], photos: Path, split: Path, options: Options) -> Told:
    """A fresh process of steps on a resident batch, as many as `train-fold` has that count, in its precision and format."""
    rows = found.images * 4 // 5
    steps = max(2, (found.epochs - 1) * rows // found.batch)
    return resident([*found.arguments(options.device), *manner], "update", steps, photos, split, options)


def resident(
    arguments: list[str], what: str, steps: int, photos: Path, split: Path, options: Options, **more: Any
) -> Told:
    given = {"train": str(photos), "split": str(split), "settings": arguments, "what": what, "steps": steps}
    given["decisions"] = str(options.folder("decisions"))
    return run(["-m", "benchmarks.resident", json.dumps(given | {"warm_up": WARM_UP} | more)], options.cores).told
