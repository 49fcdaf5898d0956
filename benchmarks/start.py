"""How soon a process is at work: from its start to the end of its first training step, to its help, to a plan.

`small` is the network of the recipe `demo`, `timm` a ResNet-18 of timm whose precision is stated,
as shipped recipes state it, `timm_probed` one whose precision a probe finds, as the first stage of a run pays it; all on a few photographs that are split already.
The clock starts before the process does and is read in it when the first step is done, so that imports, reading the
settings, hashing, decoding and building the network are all in it; the process ends there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, images_of, split_of
from benchmarks.options import Options
from benchmarks.pairs import Spread, repeated, run
from benchmarks.results import Finding

IMAGES = 100
TIMM = ("model.backbone=timm/resnet18", "model.image_size=64", "train.batch_size=32")
NETWORKS = {
    "small": ("recipe=demo",),
    "timm": (*TIMM, "train.precision=bf16"),
    "timm_probed": TIMM,
}


def measure(options: Options) -> Iterator[Finding]:
    for name in options.chosen(KINDS):
        seconds = repeated(lambda name=name: KINDS[name](name, options), options.pairs + 1, f"start {name}")[1:]
        yield Finding(name, Spread.of(seconds), {"each": " ".join(f"{each:.3f}" for each in seconds)})


def first_step(name: str, options: Options) -> float:
    """Seconds of one run up to the end of its first step."""
    photos = photographs(options)
    folder = options.fresh("runs", "start")
    channels = {
        "SM_CHANNEL_TRAIN": photos,
        "SM_CHANNEL_FOLDS": split_of(photos, options),
        "SM_MODEL_DIR": folder / "model",
        "SM_OUTPUT_DATA_DIR": folder / "output",
    }
    ended = run(
        ["-m", "benchmarks.watched", "first_step", "train-fold", "FOLD=0", *NETWORKS[name]],
        options.cores,
        {key: str(path) for key, path in channels.items()},
    )
    return ended.told["first_step"] - ended.begun


def helped(name: str, options: Options) -> float:
    return run(["-m", "jobs", "--help"], options.cores).seconds


def planned(name: str, options: Options) -> float:
    arguments = ["submit", "platform=local", "recipe=small_images", f"train={photographs(options)}", "--dry-run"]
    return run(["-m", "jobs", *arguments, f"runs={options.folder('runs')}"], options.cores).seconds


def photographs(options: Options) -> Path:
    return images_of(Case("resnet18", 64, 32, options.count or IMAGES, 1), options)


KINDS: dict[str, Any] = {
    "small": first_step,
    "timm": first_step,
    "timm_probed": first_step,
    "help": helped,
    "dry_run": planned,
}
