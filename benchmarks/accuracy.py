"""Test scores of a planned run within a time, against timm's loop in the same time and against frozen features; `pairs` seeds.

`images` and `eval` are what `submit` takes as train= and eval=, with a ground truth; `settings` are further settings, such as
data.group_column=sender_id. All sides use the same weights. timm's side trains one model on the rows of all folds but the first for
`minutes`, keeps its best epoch by the first fold, and predicts the test images and their mirror images. timm's training script is
not part of its package, so this module calls timm's public parts in the order of the script, with the augmentations of its
examples (RandAugment, random erasing, label smoothing): `python -m benchmarks.accuracy JSON` is that side.
"""

import io
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm import create_model
from timm.data import create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from benchmarks.options import Options
from benchmarks.processes import Call, repeat, run
from benchmarks.results import Finding, ratio_finding
from fivefold.contract.files import read_json
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import ImageStore, open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.errors import SettingsError
from fivefold.evaluation.ground_truth import read_ground_truth
from fivefold.evaluation.metrics import compute_metrics
from fivefold.launchers.local import check_inputs
from fivefold.launchers.plan import Inputs
from fivefold.models.pretrained import find_weights
from fivefold.models.weights import load_matching

BACKBONE = "tf_efficientnet_lite0"
SIDES = ("planned", "frozen", "timm")
LR, SMOOTHING, WARMUP_EPOCHS = 2e-4, 0.1, 1
END_S = 5.0
"""Seconds that timm's side keeps for its last prediction."""


def measure(options: Options) -> Iterator[Finding]:
    if not options.images or not options.eval:
        raise SettingsError(
            "accuracy needs images= and eval=: photographs and test images with a ground truth, as submit"
        )
    seeds = iter(range(options.pairs))
    scores = repeat(lambda: _score(next(seeds), options), options.pairs, "accuracy")
    table = {side: [score[side] for score in scores] for side in SIDES}
    for other in options.select(SIDES[1:]):
        ratios = [score["planned"]["logloss"] / score[other]["logloss"] for score in scores]
        yield ratio_finding(other, ratios, minutes=options.minutes, scores=table)


def _score(seed: int, options: Options) -> dict[str, dict[str, float]]:
    """Return accuracy and logloss on the test rows, and the seconds, of each side."""
    runs = options.empty_folder("runs", "accuracy")
    scores = {}
    for side, arguments in (("planned", [f"time={options.minutes:g}m"]), ("frozen", ["recipe=photographs"])):
        command = [
            "-m",
            "jobs",
            "submit",
            f"train={options.images}",
            f"eval={options.eval}",
            f"runs={runs}",
            f"run={side}",
        ]
        command += [f"seed={seed}", f"split.seed={seed}", "stages=split,train-fold,ensemble,evaluate"]
        ended = run(Call([*command, *arguments, *shlex.split(options.settings)]), 0)
        metrics = read_json(runs / side / "evaluate" / "output" / "metrics.json")["test"]
        scores[side] = {name: metrics[name] for name in ("accuracy", "logloss")} | {"seconds": ended.seconds}
    inputs = check_inputs(Inputs(options.images, options.eval), runs / "planned")
    request = {
        "train": inputs.train, "eval": inputs.eval, "truth": inputs.ground_truth, "seed": seed, "seconds": 60 * options.minutes,
        "folds": str(runs / "planned" / "split" / "output"),
    }  # fmt: skip
    ended = run(Call(["-m", "benchmarks.accuracy", json.dumps(request)]), options.cores)
    scores["timm"] = ended.output | {"seconds": ended.seconds}
    return scores


def main(request: dict[str, Any]) -> dict[str, float]:
    """Train timm's network for `seconds`; return accuracy and logloss on the test rows, and the number of epochs."""
    end = time.monotonic() + request["seconds"] - END_S
    torch.manual_seed(request["seed"])
    table = read_folds(Path(request["folds"]) / "folds.parquet", Path(request["folds"]) / "classes.json")
    images, test = open_store(Path(request["train"])), open_store(Path(request["eval"]))
    tested, codes = read_eval(test), table.codes
    truth = read_ground_truth(Path(request["truth"]))
    labels = np.array([table.classes.index(truth[row]) for row in map(str, tested.ids)])
    network = create_model(BACKBONE, num_classes=len(table.classes))
    load_matching(network, find_weights(f"timm/{BACKBONE}", "auto", offline=True).path)
    train, valid = ((table.paths_of(rows), codes[rows]) for rows in (table.train_rows(0), table.valid_rows(0)))
    batches = make_loader(network, Images(images, *train), training=True)
    held_out, evaluated = (make_loader(network, Images(store, *rows)) for store, rows in (
        (images, valid), (test, (list(tested.paths), labels))
    ))  # fmt: skip
    optimizer = create_optimizer_v2(network, opt="adamw", lr=LR, weight_decay=0.05)
    best, state, epoch, epochs, scheduler = np.inf, network.state_dict(), 0, 1, None
    while epoch < epochs:
        start = time.monotonic()
        if scheduler is not None:
            scheduler.step(epoch)
        train_epoch(network, batches, optimizer)
        loss = score(predict(network, held_out), valid[1])["logloss"]
        if loss < best:
            best, state = loss, {name: tensor.clone() for name, tensor in network.state_dict().items()}
        epoch += 1
        if scheduler is None:  # as many epochs as fit: the script takes their number, not a time
            epochs = max(1, int((end - start) / (time.monotonic() - start)))
            scheduler, _ = create_scheduler_v2(
                optimizer, "cosine", num_epochs=epochs, warmup_epochs=WARMUP_EPOCHS, warmup_lr=LR / 10
            )
    network.load_state_dict(state)
    return score(predict(network, evaluated, mirrored=True), labels) | {"epochs": epoch}


class Images(torch.utils.data.Dataset):
    """Images of a store and their class indices, as timm's datasets give them: an image of Pillow, transformed, and an index."""

    def __init__(self, store: ImageStore, paths: list[str], codes: np.ndarray) -> None:
        self.store, self.paths, self.codes, self.transform = store, paths, codes, None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        image = Image.open(io.BytesIO(self.store.read(self.paths[row]))).convert("RGB")
        return self.transform(image), int(self.codes[row])


def make_loader(network: nn.Module, images: Images, training: bool = False) -> Any:
    config = resolve_data_config({}, model=network)
    # timm's examples have mstd0.5 too, which at times keeps 0 bits of a colour: Pillow 13 refuses that
    options = {"auto_augment": "rand-m9-inc1", "re_prob": 0.25, "scale": (0.35, 1.0)} if training else {}
    sizes = {name: config[name] for name in ("input_size", "interpolation", "mean", "std")}
    return create_loader(
        images, batch_size=32, is_training=training, num_workers=0, persistent_workers=False, use_prefetcher=False,
        crop_pct=1.0, crop_mode="squash", device=torch.device("cpu"), **sizes, **options,
    )  # fmt: skip


def train_epoch(network: nn.Module, batches: Any, optimizer: Any) -> None:
    criterion = LabelSmoothingCrossEntropy(SMOOTHING)
    network.train()
    for images, targets in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(network(images), targets)
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def predict(network: nn.Module, batches: Any, mirrored: bool = False) -> np.ndarray:
    """Return log-probabilities [N, C], the mean over an image and its mirror image if `mirrored`."""
    network.eval()
    parts = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for images, _ in batches:
            views = [images, images.flip(3)] if mirrored else [images]
            parts.append(torch.stack([network(view).float().softmax(dim=1) for view in views]).mean(dim=0))
    return torch.cat(parts).log().numpy()


def score(log_probs: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    metrics = compute_metrics(log_probs, codes)
    return {name: float(metrics[name]) for name in ("accuracy", "logloss")}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
