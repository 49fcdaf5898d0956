"""Measure how fast this machine trains candidate backbones, as the folds will run: in so many processes at the same time.

Each process of `measure` runs this module with a request on stdin, trains every candidate for some seconds on images of the
data set, and prints a list of `Speed`. All candidates together take at most BUDGET_S.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.config.schema import Settings
from fivefold.errors import RetryableError
from fivefold.system import die_with_parent

MODULE = "fivefold.planning.probe"
BUDGET_S = 20.0
"""Seconds of all measurements, with the start of the processes."""
TRAINING_S = 2.5
"""Seconds of training of each candidate, after a warm-up."""
KILL_S = 120.0
"""Seconds after which a measurement has failed."""
STEPS, PREDICTIONS = 2, 2
"""Steps of an epoch of the measured training, and predictions of a batch."""


@dataclass(frozen=True)
class Speed:
    """The speed of one process with a backbone, while the other processes ran too.

    Images per second in training (at the training size), and in one view of a prediction: of the network in training,
    `predict`, and of a frozen or a loaded one, `frozen`; `features` of an image;
    `gradient_seconds` of a linear head for one row; peak `memory` of the process and the `weights`, in bytes; the seconds of a
    process until it has loaded its libraries, `start_seconds`.
    """

    backbone: str
    train: float
    predict: float
    frozen: float
    features: int
    gradient_seconds: float
    memory: float
    weights: float
    start_seconds: float


def measure(
    settings: Settings,
    train: Path,
    paths: Sequence[str],
    backbones: Mapping[str, int],
    processes: int,
    environ: Mapping[str, str],
) -> list[Speed]:
    """Return the speed of each backbone that BUDGET_S reached, the mean over the processes; at least that of the first.

    `backbones` have the side of their training images in pixels. `train`: the folder or archive that `paths` are in. `environ`: the
    variables of the processes, which set their threads.
    Raise a RetryableError if a process fails.
    """
    tree = settings.model_dump(mode="json", exclude_unset=True)
    request = json.dumps([tree, str(train), list(paths), dict(backbones), time.time() + BUDGET_S, os.getpid()])
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", MODULE]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        children = [subprocess.Popen(command, env=dict(environ), **pipes) for _ in range(processes)]
        try:
            for child in children:  # all before any is awaited, so that they run at the same time
                child.stdin.write(request)
                child.stdin.close()
                child.stdin = None
            outputs = [child.communicate(timeout=KILL_S)[0] for child in children]
        except subprocess.TimeoutExpired:
            outputs = []
        finally:
            for child in children:
                child.kill()
                child.wait()
        if not outputs or any(child.returncode for child in children):
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it did not end"])[-1]
            raise RetryableError(f"this machine's speed could not be measured: {last}")
    measured = [[Speed(**entry) for entry in json.loads(text.splitlines()[-1])] for text in outputs]
    return [_mean(speeds) for speeds in zip(*measured, strict=False)]


def _mean(speeds: Sequence[Speed]) -> Speed:
    numbers = [field.name for field in fields(Speed) if field.name != "backbone"]
    means = {name: statistics.fmean(getattr(speed, name) for speed in speeds) for name in numbers}
    return Speed(speeds[0].backbone, **means | {"features": round(means["features"])})


def measure_here(
    settings: Settings, train: Path, paths: Sequence[str], backbones: Mapping[str, int], deadline: float
) -> list[Speed]:
    """Measure the backbones in this process, the first in any case, the others until `deadline` (seconds since 1970)."""
    import psutil

    from fivefold import build
    from fivefold.data.readers.stores import open_store

    loaded = time.time() - psutil.Process().create_time()
    store = open_store(train, settings.data.max_unpacked_gib)
    speeds: list[Speed] = []
    for backbone, side in backbones.items():
        if speeds and time.time() + 2 * TRAINING_S > deadline:
            break
        model = settings.model.model_copy(update={"backbone": backbone})
        augment = settings.augment.model_copy(update={"image_size": side})
        chosen = build.resolve_inputs(settings.model_copy(update={"model": model, "augment": augment}))
        speeds.append(_measure(chosen, store, paths, loaded))
    return speeds


def _measure(settings: Settings, store: Any, paths: Sequence[str], loaded: float) -> Speed:
    from fivefold import build
    from fivefold.contract.record import peak_memory_mib
    from fivefold.data.pipeline.eval_cache import EvalImageCache
    from fivefold.progress import MIB
    from fivefold.trained_model import predict_images
    from fivefold.training.time_limit import EXIT_SECONDS
    from fivefold.training.trainer import TrainData, fit

    batch = settings.train.batch_size
    network = build.build_classifier(settings.model, 2)
    features = build.count_features(network.backbone, settings.model.size)
    runtime = build.make_training_runtime(settings)
    predicted = paths[:batch]
    cached = EvalImageCache(build.image_dataset(store, predicted, [None] * len(predicted), settings, training=False))
    frozen = _time_prediction(
        lambda: predict_images(runtime.to_device(network), settings, runtime, cached, "", ["plain"])
    )
    chosen = [paths[index % len(paths)] for index in range(batch * STEPS)]
    images = build.image_dataset(store, chosen, [None] * len(chosen), settings, training=True)
    targets = build.one_hot(np.arange(len(chosen)) % 2, 2, runtime.device)
    warm_up = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 1})})
    few = build.image_dataset(store, chosen[:batch], [None] * batch, settings, training=True)
    fit(build.build_trainer("warm-up", network, TrainData(few, targets[:batch]), None, warm_up, runtime, False, 0))
    many = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 10_000})})
    until = time.time() + TRAINING_S + EXIT_SECONDS
    trainer = build.build_trainer("speed", network, TrainData(images, targets), None, many, runtime, False, 0, until)
    fit(trainer)
    trained = _time_prediction(lambda: predict_images(trainer.model, settings, runtime, cached, "", ["plain"]))
    return Speed(
        backbone=settings.model.backbone,
        train=statistics.median(trainer.speeds),
        predict=len(predicted) / trained,
        frozen=len(predicted) / frozen,
        features=features,
        gradient_seconds=_time_gradient(features),
        memory=float(peak_memory_mib() * MIB),
        weights=float(sum(tensor.nbytes for tensor in network.state_dict().values())),
        start_seconds=loaded,
    )


def _time_prediction(predict: Callable[[], object]) -> float:
    """Return the seconds of a prediction after the first one, which also decodes and resizes the images."""
    times = []
    for _ in range(PREDICTIONS):
        begin = time.perf_counter()
        predict()
        times.append(time.perf_counter() - begin)
    return min(times)


def _time_gradient(features: int, rows: int = 1000, classes: int = 10) -> float:
    """Return the seconds per row and class of one gradient of a linear head."""
    import torch

    data, weight, times = torch.randn(rows, features), torch.randn(features, classes), []
    for _ in range(8):
        begin = time.perf_counter()
        data.T @ (data @ weight).softmax(dim=1)
        times.append(time.perf_counter() - begin)
    return min(times) / rows / classes


def main() -> int:
    """Measure the request on stdin and print the speeds as JSON."""
    tree, train, paths, backbones, deadline, parent = json.load(sys.stdin)
    die_with_parent(str(parent))
    logging.disable(logging.INFO)
    speeds = measure_here(Settings.model_validate(tree), Path(train), paths, backbones, deadline)
    print(json.dumps([asdict(speed) for speed in speeds]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
