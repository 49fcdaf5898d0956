"""The networks that are measured, with sizes at which a turn takes well under a minute on two cores; their images and splits."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.options import Options
from benchmarks.pairs import run
from benchmarks.photos import photographs
from fivefold.choose import choose
from fivefold.contract.stages import FOLDS

FOLD_COUNT = 5
SCALE = (0.08, 1.0)
"""Shares of an image that random_resized_crop takes, as timm's script does by default."""
LR = 1e-4
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Case:
    """`name`: timm's, of a network at `size` pixels; `images` in all, of which a fold trains on four fifths.

    `stored`: the shorter side that the image cache keeps (`data.store_size`); 0: all of it.
    """

    name: str
    size: int
    batch: int
    images: int
    epochs: int
    stored: int = 0

    def arguments(self, device: str = "cpu") -> list[str]:
        """The settings of a stage: random_resized_crop and a flip, AdamW, no validation that chooses for long."""
        crop = {"name": "random_resized_crop", "scale": list(SCALE)}
        return [
            f"model.backbone=timm/{self.name}",
            f"model.image_size={self.size}",
            f"augment.train={json.dumps([crop, 'horizontal_flip'])}",
            f"data.store_size={self.stored}",
            f"train.batch_size={self.batch}",
            f"train.epochs={self.epochs}",
            "train.optimizer=adamw",
            f"train.lr={LR}",
            f"train.weight_decay={WEIGHT_DECAY}",
            f"train.device={device}",
        ]


def case(name: str, options: Options, table: dict[str, Case]) -> Case:
    """The case of that name as the options change it."""
    found = choose(table, "case", name)
    return replace(
        found,
        size=options.size or found.size,
        batch=options.batch or found.batch,
        images=options.count or found.images,
        epochs=options.epochs or found.epochs,
        stored=options.stored if options.stored >= 0 else found.stored,
    )


def images_of(found: Case, options: Options) -> Path:
    return photographs(options.folder("photos"), options.photo, found.images, options.images)


def split_of(photos: Path, options: Options) -> Path:
    """The folder of the split of these photographs, made once by the stage itself."""
    folder = options.folder("splits", photos.name)
    if not (folder / FOLDS).is_file():
        channels = {"SM_CHANNEL_TRAIN": str(photos), "SM_OUTPUT_DATA_DIR": str(folder)}
        run(["-m", "jobs", "split", f"split.folds={FOLD_COUNT}"], options.cores, channels)
    return folder


CASES = {
    "resnet18@64": Case("resnet18", 64, 64, 1280, 5, 128),
    "resnet18@224": Case("resnet18", 224, 32, 480, 3, 256),
    "efficientnet_b0@224": Case("efficientnet_b0", 224, 32, 240, 3, 256),
    "convnext_tiny@224": Case("convnext_tiny", 224, 32, 160, 3, 256),
}
GPU_CASES = {
    "convnext_tiny@224": Case("convnext_tiny", 224, 128, 5120, 4, 256),
    "efficientnet_b5@456": Case("efficientnet_b5", 456, 32, 1280, 4),
}
