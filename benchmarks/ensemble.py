"""`ensemble` of 5 models × 3 views: images/s ÷ those of the same models alone on resident batches.

Side A is the whole stage as a process, from finding the models to the last file, without its imports. Side B runs the same five
networks one after the other on one batch and its three views, which are ready in memory, for as many images. A short run trains the
models once.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from benchmarks.processes import Call, Timer, rate, repeat, run, spread
from benchmarks.results import Finding, ratio_finding
from benchmarks.workloads import FOLD_COUNT, Workload, photographs, workload

VIEWS: list[Any] = ["plain", "flip", {"name": "shift", "x": 4, "y": 4}]
IMAGES_TO_TRAIN = 100
WORKLOADS = {"resnet18@224": Workload("resnet18", 224, 32, 640, 1)}


def measure(options: Options) -> Iterator[Finding]:
    for name in options.select(list(WORKLOADS)):
        work = workload(name, options, WORKLOADS)
        photos, models = photographs(options, work.images), train_models(work, options)
        request = {"models": str(models), "images": work.images, "device": options.device}
        alone = Call(["-m", "benchmarks.ensemble", json.dumps(request)])
        pairs = repeat(
            lambda photos=photos, models=models, alone=alone: (
                run(stage(photos, models, options), options.cores).output["passes"],
                run(alone, options.cores).output["passes"],
            ),
            options.pairs,
            f"ensemble {name}",
        )
        rates = {side: [rate(pair[s]) for pair in pairs] for s, side in enumerate(("ours", "alone"))}
        ratios = [ours / alone for ours, alone in zip(*rates.values(), strict=True)]
        yield ratio_finding(name, ratios, **{side: spread(values) for side, values in rates.items()})


def train_models(work: Workload, options: Options) -> Path:
    """Return the folder of a run with five models. Train them once, each for one epoch on few images."""
    few = replace(work, images=min(IMAGES_TO_TRAIN, work.images), epochs=1)
    name = f"{work.name}-{work.size}-{work.batch}"
    arguments = ["-m", "jobs", "submit", "platform=local", f"train={photographs(options, few.images)}", f"run={name}"]
    arguments += [f"runs={options.folder('models')}", "stages=split,train-fold", f"split.folds={FOLD_COUNT}"]
    arguments += [f"predict.tta={json.dumps(VIEWS)}", *few.settings()]
    run(Call(arguments), 0)  # submit divides the cores among the folds itself
    return options.folder("models") / name


def stage(photos: Path, models: Path, options: Options) -> Call:
    """Return the call that times the stage `ensemble`."""
    channels = {
        "SM_CHANNEL_MODEL": str(models),
        "SM_CHANNEL_EVAL": str(photos),
        "SM_OUTPUT_DATA_DIR": str(options.empty_folder("runs", "ensemble")),
    }
    arguments = ["ensemble", "ensemble.blend=mean", f"predict.device={options.device}"]
    return Call(["-m", "benchmarks.instrumented_stage", "stage", *arguments], channels)


def run_models(request: dict[str, Any]) -> list[dict[str, float]]:
    """Run every model on all views of a resident batch until all images are done; return the passes."""
    import torch

    from fivefold.build import predict_batch_size
    from fivefold.contract.artifacts import ModelDir
    from fivefold.contract.files import read_json
    from fivefold.contract.stage_specs import MODEL
    from fivefold.inference.tta import build_views
    from fivefold.trained_model import load_model

    passes, images = [], request["images"]
    for path in sorted(Path(request["models"]).glob("fold-*/model")):
        model = load_model(ModelDir(path, read_json(path / MODEL)), {"device": request["device"]})
        size = predict_batch_size(model.settings)
        batch = torch.randint(0, 256, (size, 3, *model.settings.model.size), dtype=torch.uint8)
        with torch.inference_mode(), model.runtime.autocast():
            views = [view(model.runtime.images(batch)) for view in build_views(VIEWS)]
            run_views(model, views, size, 2 * size)
            timer = Timer()
            run_views(model, views, size, images)
        passes.append(timer.stop(0))
    return [{**passes[0], "images": images}, *passes[1:]]


def run_views(member: Any, views: Sequence[Any], size: int, images: int) -> None:
    """Run batches of all views through the network until `images` are done. Wait for the device."""
    for start in range(0, images, size):
        logits = [member.network(view[: images - start]) for view in views]
    float(logits[-1].sum())


if __name__ == "__main__":
    print(json.dumps({"passes": run_models(json.loads(sys.argv[1]))}))
