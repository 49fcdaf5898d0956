"""`python parted.py IMAGES RESULTS`: trains every case as one of the processes of RANK and WORLD_SIZE; what came out, as a file."""

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

ROWS, EPOCHS = 26, 3
CODES = np.arange(ROWS) % 3
SIZE = 20
PLAIN = {"backbone": "fivefold/base_model", "backbone_kwargs": {"dropout": 0.0}, "dropout": 0.0}
NORMED = {"backbone": "fivefold/small_net", "backbone_kwargs": {"widths": [8, 16], "stem": 8}, "dropout": 0.3}
CASES: dict[str, dict[str, Any]] = {
    # 26 rows in batches of 8: parts of 4 and 4 rows, and a last batch of 2 that is too small to be parted
    "plain": {},
    "uneven": {"batch_size": 7},
    "mixup": {"batch_mix": "mixup"},
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
"""Networks without BatchNorm and dropout: as one process trains them."""
OTHERS: dict[str, dict[str, Any]] = {
    "norms": {"network": NORMED, "ema_decay": 0.9, "sam_rho": 0.05, "batch_mix": "mixup"},
    "frozen norms": {"network": NORMED, "freeze_epochs": EPOCHS, "grad_accum_steps": 2},
    "one step": {"network": NORMED, "epochs": 1, "batch_size": ROWS},
}
"""What each process draws or counts by itself: here the processes must stay alike."""
COUNTS = (1, 2, 3, 4, 5, ROWS)


def images_in(
    folder: Path, transform: list[str], names: list[str] | None = None, meta: tuple[str, ...] = ()
) -> ImageDataset:
    found = sorted(path.name for path in folder.iterdir()) if names is None else names
    return ImageDataset(CountingStore(folder), found, build_transforms(transform, (SIZE, SIZE)), seed=1, meta=meta)


def settings_of(case: dict[str, Any]) -> Settings:
    chosen = {key: case[key] for key in case.keys() - {"batch_mix", "image_stats", "network", "unlabelled", "taught"}}
    return Settings(
        model=Model(**(case.get("network", PLAIN) | {"image_size": SIZE, "image_stats": case.get("image_stats", [])})),
        augment=Augment(batch_mix=case.get("batch_mix", "none"), mix_alpha=0.7),
        train=Train(**{"epochs": EPOCHS, "batch_size": 8, "optimizer": "sgd", "lr": 0.05, "precision": "fp32", "num_workers": 0} | chosen),
        distill=Distill(temperature=2.0, temperature_decay=0.9, alpha_anneal_fraction=0.7),
    )  # fmt: skip


def trained(
    folder: Path,
    case: dict[str, Any],
    replicas: ProcessGroup = SINGLE_PROCESS,
    kept: Checkpoints | None = None,
    stop: int = 0,
) -> dict[str, Any]:
    """The rows of the epochs, the states of all models at the end, the kept epochs; stopped in step `stop`, if there is one."""
    settings = settings_of(case)
    dtype = torch.bfloat16 if case.get("precision") == "bf16" else None
    runtime = make_runtime(torch.device("cpu"), dtype, True, [0.5] * 3, [0.25] * 3, replicas)
    seed_everything(0)
    network = build_classifier(settings.model, 3)
    codes = CODES.copy()
    codes[: case.get("unlabelled", 0)] = -1
    probs = np.full((ROWS, 3), 0.1, np.float32) + 0.7 * np.eye(3, dtype=np.float32)[CODES]
    teacher = Teacher(np.log(probs), 0.7, 2.0, runtime.device) if case.get("taught") else None
    meta = tuple(case.get("image_stats", ()))
    train = TrainData(
        images_in(folder, ["random_crop", "horizontal_flip"], meta=meta), one_hot(codes, 3, runtime.device), teacher
    )
    valid = ValidData(images_in(folder, [], meta=meta), CODES)
    loop = build_trainer("test", network, train, valid, settings, runtime, select=True, patience=0)
    rows: list[dict[str, Any]] = []
    steps = iter(range(1, 10_000))

    def strike() -> None:
        if next(steps) == stop:
            os.kill(os.getpid(), 15)

    own = kept if replicas.rank.is_main else None
    loop = replace(loop, observers=[rows.append], checkpoints=own, after_step=[strike, *loop.after_step])
    best = fit(loop)
    states = {
        name: {key: each.clone() for key, each in model.state_dict().items()}
        for name, model in loop.scored_models.items()
    }
    return {"rows": rows, "states": states, "best": {name: each.epoch for name, each in best.items()}}


def predicted(folder: Path, count: int, replicas: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
    """The log-probabilities of the first `count` images, and what was read for them."""
    seed_everything(0)
    network = build_classifier(settings_of({}).model, 3)
    images = images_in(folder, [], sorted(path.name for path in folder.iterdir())[:count])
    runtime = make_runtime(torch.device("cpu"), None, True, [0.5] * 3, [0.25] * 3, replicas)
    found = predict_all(network, images, 4, 0, runtime, ["plain", "flip"])
    return {"found": torch.from_numpy(found), "read": list(images.store.reads.elements())}


def stopped_and_gone_on(folder: Path, kept: Path, replicas: ProcessGroup) -> dict[str, Any]:
    """A run of which the last process alone is told to stop in a step, and goes on from the first one's checkpoint."""
    case, is_last = OTHERS["norms"], replicas.rank.index == replicas.rank.world_size - 1
    told = 0
    with defer_signals():
        try:
            trained(folder, case, replicas, Checkpoints(kept), stop=6 if is_last else 0)
        except StoppedError as error:
            told = error.number
    torch.manual_seed(99)  # whatever a new process has
    return {"told": told, **trained(folder, case, replicas, Checkpoints(kept))}


def main(folder: Path, results: Path) -> None:
    torch.set_num_threads(1)
    with init_process_group(rank_from_env(os.environ)) as replicas:
        found = {name: trained(folder, case, replicas) for name, case in {**CASES, **OTHERS}.items()}
        found["stopped"] = stopped_and_gone_on(folder, results / "kept", replicas)
        found["predicted"] = {str(count): predicted(folder, count, replicas) for count in COUNTS}
        words = replicas.broadcast({"word": f"of {replicas.rank.index}", "numbers": torch.arange(3.0)})
        found["shared"] = words
        torch.save(found, results / f"{replicas.rank.index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
