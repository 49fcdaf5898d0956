"""Small images in three colours, and training loops on them, for the tests of training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fivefold.build import build_classifier, build_trainer, one_hot, seed_everything
from fivefold.config.schema import Augment, Distill, Model, Settings, Train
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.readers.stores import open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.models.classifier import Classifier
from fivefold.training.objectives import Teacher
from fivefold.training.trainer import TrainData, Trainer, ValidData

CPU = make_runtime(torch.device("cpu"), None, True, [0.5] * 3, [0.5] * 3)
SMALL = {
    "backbone": "fivefold/small_net",
    "backbone_kwargs": {"widths": [8, 16], "stem": 8},
    "image_size": 12,
    "dropout": 0.3,
}


def images_in(
    folder: Path, count: int, size: int = 12, noise: int = 150, tint: int = 100, transforms: tuple[str, ...] = ()
) -> ImageDataset:
    """Draw `count` images in `folder`: random pixels below `noise`, with channel number % 3 brighter by `tint`."""
    random = np.random.default_rng(0)
    names = [f"{number:02d}.png" for number in range(count)]
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        pixels = random.integers(0, noise, (size, size, 3))
        pixels[..., number % 3] += tint
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return ImageDataset(open_store(folder), names, build_transforms(list(transforms), (size, size)), seed=1)


def run_of(
    images: ImageDataset,
    train: dict[str, Any],
    model: dict[str, Any] | None = None,
    mix: str = "none",
    distill: dict[str, Any] | None = None,
    valid_codes: np.ndarray | None = None,
    patience: int = 0,
    select: bool = True,
    runtime: Runtime = CPU,
    unlabelled: int = 0,
) -> tuple[Trainer, list[dict[str, Any]]]:
    """Return a new training loop over images of three classes, and the list that its epochs' rows are added to.

    `model` has keys of [model], or is None for one linear layer; `distill` has keys of [distill], or is None for no teacher.
    The first `unlabelled` rows have no label in training.
    """
    codes = np.arange(len(images)) % 3
    settings = Settings(
        model=Model(**(model or {"image_size": images.eval_batch(0).images.shape[-1]})),
        augment=Augment(batch_mix=mix, mix_alpha=0.4),
        train=Train(**{"epochs": 4, "batch_size": 6, "lr": 0.05, "precision": "fp32", "num_workers": 0} | train),
        distill=Distill(**(distill or {})),
    )
    seed_everything(0)
    flat = 3 * settings.model.size[0] * settings.model.size[1]
    network = build_classifier(settings.model, 3) if model else Classifier(nn.Flatten(), nn.Linear(flat, 3))
    log_probs = np.log(np.full((len(codes), 3), 0.1, np.float32) + 0.7 * np.eye(3, dtype=np.float32)[codes])
    teaching = settings.distill
    teacher = None if distill is None else Teacher(log_probs, teaching.alpha, teaching.temperature, runtime.device)
    valid = ValidData(images, codes if valid_codes is None else valid_codes)
    targets = one_hot(np.where(np.arange(len(codes)) < unlabelled, -1, codes), 3, runtime.device)
    rows = TrainData(images, targets, teacher)
    loop = build_trainer("test", network, rows, valid, settings, runtime, select=select, patience=patience)
    epoch_rows: list[dict[str, Any]] = []
    return replace(loop, observers=[epoch_rows.append]), epoch_rows


def stand_still(loop: Trainer) -> None:
    """Set all learning rates to zero, so that no epoch improves on another."""
    loop.schedule.base_lrs = [0.0] * len(loop.schedule.base_lrs)
    for group in loop.schedule.optimizer.param_groups:
        group["lr"] = 0.0
