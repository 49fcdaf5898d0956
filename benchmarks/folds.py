"""All of k folds, from files to the blended predictions ÷ timm's loop as many times and its models' mean; wall seconds of everything.

Ours is `submit platform=local` of split, folds and ensemble, with all defaults of the platform. timm's is what a user of
its script does: a script that divides the images, a training process a fold one after the other, and one that predicts with
all of them, each image decoded once. Both count from the first process's start to the last one's end; decoding, imports,
validations and checkpoints are in it, and timm's settings are the best ones that `peer`'s search finds.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import FOLD_COUNT, Case, case, images_of, split_of
from benchmarks.options import Options
from benchmarks.pairs import Ended, Spread, in_turns, run
from benchmarks.peer import Setting, in_words, request, search
from benchmarks.photos import CLASSES as CLASS_COUNT
from benchmarks.results import Finding, ratio


@dataclass(frozen=True)
class Took:
    """Seconds on the wall and of the processor of all processes of one side."""

    seconds: float
    cpu_seconds: float


def measure(options: Options) -> Iterator[Finding]:
    for name in options.chosen(CASES):
        yield of_case(name, options)


def of_case(name: str, options: Options) -> Finding:
    """The ratio of seconds, theirs ÷ ours."""
    found = case(name, options, CASES)
    photos = images_of(found, options)
    best, tried = search(found, photos, split_of(photos, options), options)
    turns = in_turns(
        lambda: ours(found, photos, options),
        lambda _: theirs(found, photos, best, options),
        options.pairs,
        f"folds {name}",
    )
    took = {
        f"{who}_{what}": Spread.of([getattr(turn[side], what) for turn in turns])
        for side, who in enumerate(("ours", "timm"))
        for what in ("seconds", "cpu_seconds")
    }
    sizes = {"images": found.images, "epochs": found.epochs}
    return ratio(
        name, [b.seconds / a.seconds for a, b in turns], **sizes, timm_best=in_words(best), tried=tried, **took
    )


def ours(found: Case, photos: Path, options: Options) -> Took:
    """Seconds on the wall and of the processor of a whole run, every image predicted by the ensemble."""
    runs = options.fresh("runs", "folds")
    ended = run(
        [
            "-m",
            "jobs",
            "submit",
            "platform=local",
            f"train={photos}",
            f"eval={photos}",
            f"runs={runs}",
            "run=first",
            "stages=split,train-fold,ensemble",
            f"split.folds={FOLD_COUNT}",
            *found.arguments(options.device),
        ],
        0,  # submit parts the cores among the folds itself
    )
    return Took(ended.seconds, ended.cpu_seconds)


def theirs(found: Case, photos: Path, best: Setting, options: Options) -> Took:
    """The same of timm's: dividing, as many trainings, one prediction of every image."""
    folder = options.fresh("runs", "timm-folds")
    ended: list[Ended] = [
        run(["-m", "benchmarks.fold_folders", str(photos), str(folder), str(FOLD_COUNT)], options.cores)
    ]
    given = request(found, best, found.epochs, options)
    models = [str(folder / f"{fold}.pth") for fold in range(FOLD_COUNT)]
    for fold, model in enumerate(models):
        asked = given | {"data": str(folder / f"fold-{fold}"), "save": model}
        ended.append(run(["-m", "benchmarks.timm_loop", json.dumps(asked)], options.cores))
    asked = given | {"data": str(photos), "models": models, "classes": CLASS_COUNT, "save": str(folder / "mean.csv")}
    ended.append(run(["-m", "benchmarks.timm_loop", json.dumps(asked)], options.cores))
    return Took(sum(each.seconds for each in ended), sum(each.cpu_seconds for each in ended))


CASES = {"resnet18@64": Case("resnet18", 64, 64, 1000, 5, 128)}
