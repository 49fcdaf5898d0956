"""`python distributed_worker.py IMAGES RESULTS`: train every case as the process that RANK and WORLD_SIZE define; save the results."""

import copy
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from counting_store import CountingStore
from fivefold.build import build_classifier, seed_everything
from fivefold.config.schema import Model, Train
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.transforms.registry import build_transforms
from fivefold.distributed.process_group import SINGLE_PROCESS, ProcessGroup, init_process_group
from fivefold.distributed.ranks import rank_from_env
from fivefold.errors import StoppedError
from fivefold.inference.predictor import Runtime, make_runtime, predict_all
from fivefold.signals import defer_signals
from fivefold.training.checkpoints import Checkpoints
from fivefold.training.trainer import fit
from toy_training import run_of

ROWS, EPOCHS = 26, 2
SIZE = 20
DISTILL = {"temperature": 2.0, "temperature_decay": 0.9, "alpha_anneal_fraction": 0.7}
PLAIN = {"backbone": "fivefold/base_model", "backbone_kwargs": {"dropout": 0.0}, "dropout": 0.0}
NORMED = {"backbone": "fivefold/small_net", "backbone_kwargs": {"widths": [8, 16], "stem": 8}, "dropout": 0.3}
CASES: dict[str, dict[str, Any]] = {
    # 26 rows in batches of 8: each is split into 4 and 4 rows; the last batch of 2 is too small to split
    "plain": {},
    "cutmix, meta": {"mix": "cutmix", "image_stats": ["color_mean"]},
    "accumulated": {"mix": "mixup", "grad_accum_steps": 3, "batch_size": 5, "max_grad_norm": 0.5},
    "sam": {"grad_accum_steps": 2, "mix": "cutmix", "batch_size": 6, "sam_rho": 0.1},
    "rdrop": {"rdrop_alpha": 1.0, "mix": "mixup", "batch_size": 7},
    "f1": {"loss": "f1"},
    "weights": {"class_weights": "balanced", "unlabelled": 9, "mix": "mixup", "label_smoothing": 0.1},
    "taught": {"distill": DISTILL, "unlabelled": 9, "mix": "cutmix"},
    "muon": {
        "optimizer": "muon",
        "ema_decay": 0.9,
        "save_raw_weights": True,
        "freeze_epochs": 1,
        "sampler": "balanced",
    },
    "bf16": {"precision": "bf16"},
}
"""Networks without BatchNorm and dropout: several processes must train them as one process does."""
OTHERS: dict[str, dict[str, Any]] = {
    "norms": {"network": NORMED, "ema_decay": 0.9, "sam_rho": 0.05, "mix": "mixup"},
    "frozen norms": {"network": NORMED, "freeze_epochs": EPOCHS, "grad_accum_steps": 2},
    "one step": {"network": NORMED, "epochs": 1, "batch_size": ROWS},
}
"""Networks with per-process random draws or statistics: the processes must stay equal to each other."""
COUNTS = (3, 5, ROWS)


def open_images(folder: Path, transforms: list[str], count: int = ROWS, meta: tuple[str, ...] = ()) -> ImageDataset:
    files = sorted(path.name for path in folder.iterdir())[:count]
    return ImageDataset(CountingStore(folder), files, build_transforms(transforms, (SIZE, SIZE)), seed=1, meta=meta)


def make_cpu_runtime(process_group: ProcessGroup, dtype: torch.dtype | None = None) -> Runtime:
    return make_runtime(torch.device("cpu"), dtype, True, [0.5] * 3, [0.25] * 3, process_group)


def train_case(
    folder: Path,
    case: dict[str, Any],
    process_group: ProcessGroup = SINGLE_PROCESS,
    checkpoints: Checkpoints | None = None,
    stop: int = 0,
) -> dict[str, Any]:
    """Train and return the rows of the epochs, the final states of all models and the best epochs; SIGTERM in step `stop`, if not 0."""
    train = {key: value for key, value in case.items() if key in Train.model_fields}
    stats = case.get("image_stats", [])
    loop, rows = run_of(
        open_images(folder, ["random_crop", "horizontal_flip"], meta=tuple(stats)),
        {"epochs": EPOCHS, "batch_size": 8, "optimizer": "sgd"} | train,
        case.get("network", PLAIN) | {"image_size": SIZE, "image_stats": stats},
        case.get("mix", "none"),
        case.get("distill"),
        runtime=make_cpu_runtime(process_group, torch.bfloat16 if case.get("precision") == "bf16" else None),
        unlabelled=case.get("unlabelled", 0),
    )
    steps = iter(range(1, 10_000))

    def signal_self() -> None:
        if next(steps) == stop:
            os.kill(os.getpid(), 15)

    main_only = checkpoints if process_group.rank.is_main else None
    loop = replace(loop, checkpoints=main_only, after_step=[signal_self, *loop.after_step])
    best = fit(loop)
    states = {name: copy.deepcopy(model.state_dict()) for name, model in loop.scored_models.items()}
    return {"rows": rows, "states": states, "best": {name: value.epoch for name, value in best.items()}}


def predict_rows(folder: Path, count: int, process_group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
    """Return the log-probabilities of the first `count` images and the names of the images read."""
    seed_everything(0)
    network = build_classifier(Model(**PLAIN, image_size=SIZE), 3)
    images = open_images(folder, [], count)
    log_probs = predict_all(network, images, 4, 0, make_cpu_runtime(process_group), ["plain", "flip"])
    return {"log_probs": torch.from_numpy(log_probs), "read": list(images.store.reads.elements())}


def train_stop_and_resume(folder: Path, checkpoints: Path, process_group: ProcessGroup) -> dict[str, Any]:
    """Stop a run by a signal to the last process only, then resume it from the first process's checkpoint."""
    case, is_last = OTHERS["norms"], process_group.rank.index == process_group.rank.world_size - 1
    signal_number = 0
    with defer_signals():
        try:
            train_case(folder, case, process_group, Checkpoints(checkpoints), stop=6 if is_last else 0)
        except StoppedError as error:
            signal_number = error.number
    torch.manual_seed(99)  # a new process may have any random state
    return {"signal": signal_number, **train_case(folder, case, process_group, Checkpoints(checkpoints))}


def main(folder: Path, results: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with init_process_group(rank_from_env(os.environ)) as process_group:
        output = {name: train_case(folder, case, process_group) for name, case in {**CASES, **OTHERS}.items()}
        output["stopped"] = train_stop_and_resume(folder, results / "kept", process_group)
        output["predicted"] = {str(count): predict_rows(folder, count, process_group) for count in COUNTS}
        shared = process_group.broadcast({"word": f"of {process_group.rank.index}", "numbers": torch.arange(3.0)})
        output["shared"] = shared
    output["threads"] = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    torch.save(output, results / f"{process_group.rank.index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
