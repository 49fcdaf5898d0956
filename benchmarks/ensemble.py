"""`ensemble` of 5 models × 3 views, images a second ÷ the same models alone on batches that lie ready.

A is the whole stage as a process, from finding the models to the last file written, without its imports: decoding, transforms,
loading weights, blending and the submission are in it. B runs the same five networks one after the other on a batch
whose three views lie ready, as many images. The models are those of a short run that is made once.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import FOLD_COUNT, Case, case, images_of
from benchmarks.options import Options
from benchmarks.pairs import Spread, in_turns, run
from benchmarks.results import Finding, ratio

VIEWS: list[Any] = ["plain", "flip", {"name": "shift", "x": 4, "y": 4}]
IMAGES_TO_TRAIN = 100
WARM_UP = 2


def measure(options: Options) -> Iterator[Finding]:
    for name in options.chosen(CASES):
        yield of_case(name, options)


def of_case(name: str, options: Options) -> Finding:
    found = case(name, options, CASES)
    photos, models = images_of(found, options), trained(found, options)
    turns = in_turns(
        lambda: stage(photos, models, options),
        lambda _: alone(found, models, options),
        options.pairs,
        f"ensemble {name}",
    )
    rates = [(a["images"] / a["seconds"], b["images"] / b["seconds"]) for a, b in turns]
    return ratio(
        name,
        [a / b for a, b in rates],
        images=turns[0][0]["images"],
        ours=Spread.of([a for a, _ in rates]),
        alone=Spread.of([b for _, b in rates]),
        ours_cpu_ms=Spread.of([1000 * a["cpu_seconds"] / a["images"] for a, _ in turns]),
        alone_cpu_ms=Spread.of([1000 * b["cpu_seconds"] / b["images"] for _, b in turns]),
    )


def trained(found: Case, options: Options) -> Path:
    """The run with the five models, trained for an epoch of few images, once."""
    few = replace(found, images=min(IMAGES_TO_TRAIN, found.images), epochs=1)
    photos, name = images_of(few, options), f"{found.name}-{found.size}-{found.batch}"
    run(
        [
            "-m",
            "jobs",
            "submit",
            "platform=local",
            f"train={photos}",
            f"runs={options.folder('models')}",
            f"run={name}",
            "stages=split,train-fold",
            f"split.folds={FOLD_COUNT}",
            f"predict.views={json.dumps(VIEWS)}",
            *few.arguments(options.device),
        ],
        0,  # submit parts the cores among the folds itself
    )
    return options.folder("models") / name


def stage(photos: Path, models: Path, options: Options) -> dict[str, Any]:
    """A fresh run of `ensemble`: its images, and seconds without imports."""
    channels = {
        "SM_CHANNEL_MODEL": str(models),
        "SM_CHANNEL_EVAL": str(photos),
        "SM_OUTPUT_DATA_DIR": str(options.fresh("runs", "ensemble")),
    }
    arguments = ["ensemble", "ensemble.blend=mean", f"predict.device={options.device}"]
    return run(["-m", "benchmarks.watched", "stage", *arguments], options.cores, channels).told["stage"]


def alone(found: Case, models: Path, options: Options) -> dict[str, Any]:
    """A fresh process of this module: as many images through the five networks, and their seconds."""
    given = {"models": str(models), "images": found.images, "device": options.device}
    return run(["-m", "benchmarks.ensemble", json.dumps(given)], options.cores).told


def main(arguments: Sequence[str]) -> int:
    """The models alone, in this process: for each all views of a batch, as often as the images need."""
    import torch

    from benchmarks.clocks import Reading
    from fivefold.assemble import predict_batch_size
    from fivefold.inference.tta import build_views

    given = json.loads(arguments[0])
    total: dict[str, Any] = {"images": given["images"], "seconds": 0.0, "cpu_seconds": 0.0}
    with torch.inference_mode():
        for member in members(Path(given["models"]), given["device"]):
            size, runtime = predict_batch_size(member.settings), member.runtime
            batch = torch.randint(0, 256, (size, 3, *member.settings.model.size), dtype=torch.uint8)
            views = [view(runtime.images(batch)) for view in build_views(VIEWS)]
            for _ in range(WARM_UP):
                passed(member, views, size)
            begun = Reading.now()
            for start in range(0, given["images"], size):
                passed(member, views, min(size, given["images"] - start))
            for key, value in begun.since(0).items():
                total[key] += value
    print(json.dumps(total))
    return 0


def members(models: Path, device: str) -> Sequence[Any]:
    """The five, ready to predict."""
    from fivefold.contract.artifacts import ModelDir
    from fivefold.contract.files import read_json
    from fivefold.contract.stages import MODEL
    from fivefold.members import load_member

    folders = sorted(models.glob("fold-*/model"))
    return [load_member(ModelDir(path, read_json(path / MODEL)), {"device": device}) for path in folders]


def passed(member: Any, views: Sequence[Any], count: int) -> None:
    """The first `count` images of every view through the network; the last result is waited for."""
    with member.runtime.autocast():
        for view in views:
            logits = member.network(view[:count])
    float(logits.sum())


CASES = {"resnet18@224": Case("resnet18", 224, 32, 640, 1)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
