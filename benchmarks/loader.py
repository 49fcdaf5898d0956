"""The loader alone on one core: from cached images to a batch of uint8 at 224 px, by crop, resize and flip.

JPEGs of 500 × 375 pixels lie in an image cache at `data.store_size=256`, so 341 × 256; `assemble.images_at` gives them as it
does to a training. B is torchvision v2's RandomResizedCrop and RandomHorizontalFlip on the same pixels, stacked. Each process is bound to one core and
has one thread. The normalisation of such a batch to floats is timed by itself, since on a GPU it is not this core's work.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, images_of, split_of
from benchmarks.options import Options
from benchmarks.pairs import Spread, in_turns, run
from benchmarks.results import Finding, ratio
from fivefold.choose import choose
from fivefold.errors import RetryableError

SIZE = 224
BATCH = 64
BATCHES = 24
WARM_UP = 3
IMAGES = 256
STORED = 256


def measure(options: Options) -> Iterator[Finding]:
    found = Case("resnet18", options.size or SIZE, options.batch or BATCH, options.count or IMAGES, 1)
    photos = images_of(found, options)
    places = {"photos": photos, "split": split_of(photos, options), "caches": options.folder("caches")}
    given = {name: str(path) for name, path in places.items()} | {"size": found.size, "batch": found.batch}

    def turn(kind: str) -> dict[str, float]:
        return run(["-m", "benchmarks.loader", json.dumps(given | {"kind": kind})], 1).told

    turns = in_turns(lambda: turn("ours"), lambda _: turn("torchvision"), options.pairs, "loader")
    rates = {name: [each[side]["loader"] for each in turns] for side, name in ((0, "ours"), (1, "torchvision"))}
    findings = {
        "loader": Finding(
            "loader", Spread.of(rates["ours"]), {"torchvision": Spread.of(rates["torchvision"]).as_json()}
        ),
        "of_torchvision": ratio("of_torchvision", [a["loader"] / b["loader"] for a, b in turns]),
        "normalise": Finding("normalise", Spread.of([a["normalise"] for a, _ in turns])),
    }
    yield from (findings[name] for name in options.chosen(findings))


def main(arguments: Sequence[str]) -> int:
    """One turn, in this process."""
    import torch

    from fivefold.assemble import runtime_of

    given = json.loads(arguments[0])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    images, settings = cached(Path(given["photos"]), Path(given["split"]), Path(given["caches"]), given["size"])
    make = choose({"ours": ours, "torchvision": torchvision}, "kind", given["kind"])(images, given["size"])
    batches = [[(epoch, row) for row in order(len(images), given["batch"], epoch)] for epoch in range(1, BATCHES + 1)]
    runtime = runtime_of(settings)
    batch = make(batches[0])
    told = {
        "loader": a_second(lambda number: make(batches[number % BATCHES]), len(batches[0])),
        "normalise": a_second(lambda number: runtime.images(batch), len(batches[0])),
    }
    print(json.dumps(told))
    return 0


def cached(photos: Path, split: Path, caches: Path, size: int) -> tuple[Any, Any]:
    """All images of the split as a training has them, from a cache that is made once; and the settings."""
    import numpy as np

    from fivefold.assemble import image_set
    from fivefold.contract.stages import CLASSES, FOLDS
    from fivefold.data.cached import with_caches
    from fivefold.data.caching import Source, cached_once
    from fivefold.data.folds import read_folds
    from fivefold.data.images import pixels_of
    from fivefold.data.store import open_store
    from fivefold.settings import arguments_layer, load

    crop = json.dumps(["random_resized_crop", "horizontal_flip"])
    keys = (f"model.image_size={size}", f"augment.train={crop}", f"data.store_size={STORED}", "train.device=cpu")
    settings = load([arguments_layer([*keys, "train.keep_in_memory=false"])])
    table, store = read_folds(split / FOLDS, split / CLASSES), open_store(photos)
    rows = np.arange(len(table))
    source = Source(store, table.paths_of(rows), table.sha256_of(rows))
    cache = cached_once(caches, source, pixels_of(settings.data), settings.data.cache_gib)
    if cache is None:
        raise RetryableError(f"no room for the image cache in {caches}: free some, or give another work=")
    return image_set(with_caches(store, [cache]), table, rows, settings, training=True), settings


def ours(images: Any, size: int) -> Callable[[Sequence[tuple[int, int]]], Any]:
    return lambda samples: images.__getitems__(samples).images


def torchvision(images: Any, size: int) -> Callable[[Sequence[tuple[int, int]]], Any]:
    import torch
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    pixels = [torch.from_numpy(images.image(row)).permute(2, 0, 1) for row in range(len(images))]
    return lambda samples: torch.stack([transform(pixels[row]) for _, row in samples])


def order(rows: int, batch: int, epoch: int) -> list[int]:
    """Rows in a shuffled order, as many as a batch has."""
    import numpy as np

    return np.random.default_rng(epoch).permutation(rows)[:batch].tolist()


def a_second(what: Callable[[int], Any], images: int) -> float:
    from benchmarks.clocks import Reading, rate

    for number in range(WARM_UP):
        what(number)
    begun = Reading.now()
    for number in range(BATCHES):
        what(number)
    return rate([begun.since(BATCHES * images)])["images_per_second"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
