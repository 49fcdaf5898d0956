"""The workloads: networks with their sizes, photographs and splits.

The photographs are random 4:3 crops of scikit-learn's two (640 × 427 pixels), mirrored at random, made brighter or darker.
Noise like that of a sensor (standard deviation 3 of 255) and JPEG qualities of 85 to 95 make the files as large as those of
a camera: about 60 KB at 500 × 375 pixels, 500 KB at 1600 × 1200. `images=` names a folder of the user instead.
"""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.options import Options
from benchmarks.processes import Call, run
from fivefold.contract.files import write_json
from fivefold.contract.stage_specs import FOLDS
from fivefold.progress import track

FOLD_COUNT = 5
SCALE = (0.08, 1.0)
"""Shares of the image area that random_resized_crop takes: the default of timm's script."""
LR = 1e-4
WEIGHT_DECAY = 0.05
CLASSES = 10
NOISE = 3.0
MARKER = "photos.json"
"""The file that is written last. A folder without it is created again."""


@dataclass(frozen=True)
class Workload:
    """A network of timm at `size` pixels; a fold trains on four fifths of `images`.

    `stored`: the shorter side that the image cache keeps (`data.resize_shorter_side`); 0: the whole image.
    """

    name: str
    size: int
    batch: int
    images: int
    epochs: int
    stored: int = 0
    device: str = "cpu"

    def settings(self) -> list[str]:
        """Return the settings of a stage, with random_resized_crop, a flip and AdamW."""
        crop = {"name": "random_resized_crop", "scale": list(SCALE)}
        return [
            f"model.backbone=timm/{self.name}",
            f"model.image_size={self.size}",
            f"augment.train={json.dumps([crop, 'horizontal_flip'])}",
            f"data.resize_shorter_side={self.stored}",
            f"train.batch_size={self.batch}",
            f"train.epochs={self.epochs}",
            "train.optimizer=adamw",
            f"train.lr={LR}",
            f"train.weight_decay={WEIGHT_DECAY}",
            f"train.device={self.device}",
        ]


def names_for(options: Options) -> list[str]:
    """Return the names of the workloads for the device."""
    return [name for name in WORKLOADS if WORKLOADS[name].device == options.device]


def workload(name: str, options: Options, table: Mapping[str, Workload] | None = None) -> Workload:
    """Return the workload `name` with the changes of the options."""
    default = replace((table or WORKLOADS)[name], device=options.device)
    changes = {"size": options.size, "batch": options.batch, "images": options.count, "epochs": options.epochs}
    return replace(default, **{key: value for key, value in changes.items() if value})


def photographs(options: Options, count: int) -> Path:
    """Return a folder of class folders: the user's, or one with `count` JPEGs, which is created once."""
    if options.images:
        return Path(options.images).resolve()
    folder = options.folder("photos") / f"{options.photo}-{count}"
    if (folder / MARKER).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    width, height = map(int, options.photo.split("x"))
    files = ThreadPoolExecutor().map(lambda seed: make_photograph((width, height), seed), range(count))
    for number, content in enumerate(track(files, count, f"images {folder.name}")):
        path = folder / f"class-{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_json(folder / MARKER, {"count": count})
    return folder


def make_photograph(size: tuple[int, int], seed: int) -> bytes:
    """Return a JPEG of `size` (width, height); the same seed gives the same bytes."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng([1, seed])
    photo = Image.fromarray(load_sample_images().images[int(random.integers(2))])
    height = min(photo.height, photo.width * size[1] / size[0]) * float(random.uniform(0.6, 1.0))
    width = height * size[0] / size[1]
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    image = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = np.asarray(image, np.float32) * random.uniform(0.8, 1.2)
    pixels += random.standard_normal(pixels.shape, np.float32) * NOISE
    buffer = BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=int(random.integers(85, 96)))
    return buffer.getvalue()


def split_of(photos: Path, options: Options) -> Path:
    """Return the folder of the split of these photographs. The stage `split` creates it once."""
    folder = options.folder("splits", photos.name)
    if not (folder / FOLDS).is_file():
        channels = {"SM_CHANNEL_TRAIN": str(photos), "SM_OUTPUT_DATA_DIR": str(folder)}
        run(Call(["-m", "jobs", "split", f"split.folds={FOLD_COUNT}"], channels), options.cores)
    return folder


WORKLOADS = {
    "resnet18@64": Workload("resnet18", 64, 64, 1280, 5, 128),
    "resnet18@224": Workload("resnet18", 224, 32, 480, 3, 256),
    "efficientnet_b0@224": Workload("efficientnet_b0", 224, 32, 240, 3, 256),
    "convnext_tiny@224": Workload("convnext_tiny", 224, 32, 160, 3, 256),
    "gpu convnext_tiny@224": Workload("convnext_tiny", 224, 128, 5120, 4, 256, "cuda"),
    "gpu efficientnet_b5@456": Workload("efficientnet_b5", 456, 32, 1280, 4, 0, "cuda"),
}
