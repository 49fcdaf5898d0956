"""`python distributed_worker.py IMAGES RESULTS`: train every case as the process that RANK and WORLD_SIZE define; save the results."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counting_store import CountingStore
from fivefold.build import build_classifier, build_trainer, one_hot, seed_everything
from fivefold.config.schema import Augment, Distill, Model, Settings, Train
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.transforms.registry import build_transforms
from fivefold.distributed.process_group import SINGLE_PROCESS, ProcessGroup, init_process_group
from fivefold.distributed.ranks import rank_from_env
from fivefold.errors import StoppedError
from fivefold.inference.predictor import make_runtime, predict_all
from fivefold.signals import defer_signals
from fivefold.training.checkpoints import Checkpoints
from fivefold.training.objectives import Teacher
from fivefold.training.trainer import TrainData, ValidData, fit

ROWS, EPOCHS = 26, 2
CODES = np.arange(ROWS) % 3
SIZE = 20
PLAIN = {"backbone": "fivefold/base_model", "backbone_kwargs": {"dropout": 0.0}, "dropout": 0.0}
NORMED = {"backbone": "fivefold/small_net", "backbone_kwargs": {"widths": [8, 16], "stem": 8}, "dropout": 0.3}
CASES: dict[str, dict[str, Any]] = {
    # 26 rows in batches of 8: each is split into 4 and 4 rows; the last batch of 2 is too small to split
    "plain": {},
    "cutmix, meta": {"batch_mix": "cutmix", "image_stats": ["color_mean"]},
    "accumulated": {"batch_mix": "mixup", "grad_accum_steps": 3, "batch_size": 5, "max_grad_norm": 0.5},
    "sam": {"grad_accum_steps": 2, "batch_mix": "cutmix", "batch_size": 6, "sam_rho": 0.1},
    "rdrop": {"rdrop_alpha": 1.0, "batch_mix": "mixup", "batch_size": 7},
    "f1": {"loss": "f1"},
    "weights": {"class_weights": "balanced", "unlabelled": 9, "batch_mix": "mixup", "label_smoothing": 0.1},
    "taught": {"taught": True, "unlabelled": 9, "batch_mix": "cutmix"},
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
    "norms": {"network": NORMED, "ema_decay": 0.9, "sam_rho": 0.05, "batch_mix": "mixup"},
    "frozen norms": {"network": NORMED, "freeze_epochs": EPOCHS, "grad_accum_steps": 2},
    "one step": {"network": NORMED, "epochs": 1, "batch_size": ROWS},
}
"""Networks with per-process random draws or statistics: the processes must stay equal to each other."""
COUNTS = (3, 5, ROWS)


def open_images(
    folder: Path, transform: list[str], names: list[str] | None = None, meta: tuple[str, ...] = ()
) -> ImageDataset:
    files = sorted(path.name for path in folder.iterdir()) if names is None else names
    return ImageDataset(CountingStore(folder), files, build_transforms(transform, (SIZE, SIZE)), seed=1, meta=meta)


def settings_of(case: dict[str, Any]) -> Settings:
    train = {key: case[key] for key in case.keys() - {"batch_mix", "image_stats", "network", "unlabelled", "taught"}}
    return Settings(
        model=Model(**(case.get("network", PLAIN) | {"image_size": SIZE, "image_stats": case.get("image_stats", [])})),
        augment=Augment(batch_mix=case.get("batch_mix", "none"), mix_alpha=0.7),
        train=Train(**{"epochs": EPOCHS, "batch_size": 8, "optimizer": "sgd", "lr": 0.05, "precision": "fp32", "num_workers": 0} | train),
        distill=Distill(temperature=2.0, temperature_decay=0.9, alpha_anneal_fraction=0.7),
    )  # fmt: skip


def train_case(
    folder: Path,
    case: dict[str, Any],
    process_group: ProcessGroup = SINGLE_PROCESS,
    checkpoints: Checkpoints | None = None,
    stop: int = 0,
) -> dict[str, Any]:
    """Train and return the rows of the epochs, the final states of all models and the best epochs; SIGTERM in step `stop`, if not 0."""
    settings = settings_of(case)
    dtype = torch.bfloat16 if case.get("precision") == "bf16" else None
    runtime = make_runtime(torch.device("cpu"), dtype, True, [0.5] * 3, [0.25] * 3, process_group)
    seed_everything(0)
    network = build_classifier(settings.model, 3)
    codes = CODES.copy()
    codes[: case.get("unlabelled", 0)] = -1
    probs = np.full((ROWS, 3), 0.1, np.float32) + 0.7 * np.eye(3, dtype=np.float32)[CODES]
    teacher = Teacher(np.log(probs), 0.7, 2.0, runtime.device) if case.get("taught") else None
    meta = tuple(case.get("image_stats", ()))
    train = TrainData(
        open_images(folder, ["random_crop", "horizontal_flip"], meta=meta), one_hot(codes, 3, runtime.device), teacher
    )
    valid = ValidData(open_images(folder, [], meta=meta), CODES)
    loop = build_trainer("test", network, train, valid, settings, runtime, select=True, patience=0)
    rows: list[dict[str, Any]] = []
    steps = iter(range(1, 10_000))

    def signal_self() -> None:
        if next(steps) == stop:
            os.kill(os.getpid(), 15)

    main_only = checkpoints if process_group.rank.is_main else None
    loop = replace(loop, observers=[rows.append], checkpoints=main_only, after_step=[signal_self, *loop.after_step])
    best = fit(loop)
    states = {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in loop.scored_models.items()
    }
    return {"rows": rows, "states": states, "best": {name: value.epoch for name, value in best.items()}}


def predict_rows(folder: Path, count: int, process_group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
    """Return the log-probabilities of the first `count` images and the names of the images read."""
    seed_everything(0)
    network = build_classifier(settings_of({}).model, 3)
    images = open_images(folder, [], sorted(path.name for path in folder.iterdir())[:count])
    runtime = make_runtime(torch.device("cpu"), None, True, [0.5] * 3, [0.25] * 3, process_group)
    log_probs = predict_all(network, images, 4, 0, runtime, ["plain", "flip"])
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
    with init_process_group(rank_from_env(os.environ)) as process_group:
        output = {name: train_case(folder, case, process_group) for name, case in {**CASES, **OTHERS}.items()}
        output["stopped"] = train_stop_and_resume(folder, results / "kept", process_group)
        output["predicted"] = {str(count): predict_rows(folder, count, process_group) for count in COUNTS}
        shared = process_group.broadcast({"word": f"of {process_group.rank.index}", "numbers": torch.arange(3.0)})
        output["shared"] = shared
        torch.save(output, results / f"{process_group.rank.index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
