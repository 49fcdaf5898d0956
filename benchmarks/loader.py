"""The loader alone on one core: from cached images to a uint8 batch at 224 px, with crop, resize and flip.

The image cache holds JPEGs of 500 × 375 pixels as 341 × 256 (`data.resize_shorter_side=256`). Side B applies torchvision v2's RandomResizedCrop
and RandomHorizontalFlip to the same pixels and stacks them. Each process is bound to one core and has one thread.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from benchmarks.processes import Call, Timer, rate, repeat, run, spread
from benchmarks.results import Finding, ratio_finding
from benchmarks.workloads import photographs, split_of

SIZE, BATCH, IMAGES, STORED = 224, 64, 256, 256
BATCHES, WARM_UP = 24, 3


def measure(options: Options) -> Iterator[Finding]:
    photos = photographs(options, options.count or IMAGES)
    request = {"photos": str(photos), "split": str(split_of(photos, options)), "caches": str(options.folder("caches"))}
    request |= {"size": options.size or SIZE, "batch": options.batch or BATCH}

    def measure_side(kind: str) -> float:
        return run(Call(["-m", "benchmarks.loader", json.dumps(request | {"kind": kind})]), 1).output

    pairs = repeat(lambda: (measure_side("ours"), measure_side("torchvision")), options.pairs, "loader")
    torchvision = spread([b for _, b in pairs])
    findings = {
        "loader": Finding("loader", spread([a for a, _ in pairs]), {"torchvision": torchvision}),
        "of_torchvision": ratio_finding("of_torchvision", [a / b for a, b in pairs]),
    }
    yield from (findings[name] for name in options.select(list(findings)))


def measure_here(request: dict[str, Any]) -> float:
    """Return images/s of one side, measured in this process."""
    import numpy as np
    import torch
    from torchvision.transforms import v2

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    images = cached_images(request)
    orders = [np.random.default_rng(epoch).permutation(len(images))[: request["batch"]] for epoch in range(BATCHES)]
    batches = [[(epoch + 1, int(row)) for row in order] for epoch, order in enumerate(orders)]
    transform = v2.Compose([v2.RandomResizedCrop(request["size"], antialias=True), v2.RandomHorizontalFlip()])
    pixels = [torch.from_numpy(images.image(row)).permute(2, 0, 1) for row in range(len(images))]
    load = {
        "ours": lambda samples: images.__getitems__(samples).images,
        "torchvision": lambda samples: torch.stack([transform(pixels[row]) for _, row in samples]),
    }[request["kind"]]
    for samples in batches[:WARM_UP]:
        load(samples)
    timer = Timer()
    for samples in batches:
        load(samples)
    return rate([timer.stop(sum(map(len, batches)))])


def cached_images(request: dict[str, Any]) -> Any:
    """Return all images of the split as a training reads them, from a cache that is built once."""
    import numpy as np

    from fivefold.build import split_dataset
    from fivefold.config.loading import arguments_layer, load
    from fivefold.contract.stage_specs import CLASSES, FOLDS
    from fivefold.data.image_io import decode_options
    from fivefold.data.pipeline.image_cache import get_or_build, make_image_files
    from fivefold.data.readers.stores import open_store
    from fivefold.data.split.fold_table import read_folds

    crop = json.dumps(["random_resized_crop", "horizontal_flip"])
    keys = [f"model.image_size={request['size']}", f"augment.train={crop}", f"data.resize_shorter_side={STORED}"]
    settings = load([arguments_layer([*keys, "train.device=cpu", "train.cache_in_memory=false"])])
    split, store = Path(request["split"]), open_store(Path(request["photos"]))
    table = read_folds(split / FOLDS, split / CLASSES)
    rows = np.arange(len(table))
    files = make_image_files(store, table.paths_of(rows), table.sha256_of(rows))
    cache = get_or_build(Path(request["caches"]), files, decode_options(settings.data), settings.data.cache_gib)
    assert cache is not None, f"no room for the image cache in {request['caches']}"
    return split_dataset(replace(store, caches=[cache]), table, rows, settings, training=True)


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))))
