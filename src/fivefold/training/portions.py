"""From what a loader reads to the rows of a micro-batch: this process's images, the whole batch's targets, mixed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fivefold.data.ahead import ahead
from fivefold.data.dataset import Batch, ImageSet, Sample, derive_seed, load
from fivefold.inference.predictor import Runtime
from fivefold.training.mixing import Mixing
from fivefold.training.objectives import Rows
from fivefold.training.teaching import Teacher


@dataclass(frozen=True)
class TrainRows:
    """`images` of N rows; `targets` [N, C] on the device; the `teacher` of the rows, or None."""

    images: ImageSet
    targets: Tensor
    teacher: Teacher | None = None

    def batches(self, batches: list[list[Sample]], workers: int, device: torch.device) -> Iterator[Batch]:
        """The given batches; on CUDA they are there before the step that has them."""
        return ahead(load(self.images, batches, workers, pin=device.type == "cuda"), device)


def own_part(batches: Sequence[list[Sample]], runtime: Runtime) -> list[list[Sample]]:
    """Of each batch the samples that this process reads."""
    return [list(runtime.replicas.share(len(batch)).take(batch)) for batch in batches]


def rows_of(
    batch: Batch,
    samples: Sequence[Sample],
    train: TrainRows,
    mixing: Mixing,
    runtime: Runtime,
    epoch: int,
    seed: tuple[int, ...],
) -> Rows:
    """The rows on the device; `batch` is this process's part of the `samples`.

    What is mixed with what is decided for the whole batch, so the images of a partner that another
    process has read come from there.
    """
    share, device = runtime.replicas.share(len(samples)), runtime.device
    numbers = torch.tensor([row for _, row in samples]) if share.parted else batch.rows
    at = numbers.to(device, non_blocking=True)
    teacher = None if train.teacher is None else train.teacher[at]
    images, meta = runtime.images(batch.images), runtime.meta(batch.meta)
    rows = Rows(images, train.targets[at], teacher, meta, share.logits)
    if not share.parted:
        return mixing(rows, epoch, seed)

    def partners(order: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = share.take(order)
        others = share.whole(batch.images.to(device, non_blocking=True))[chosen]
        return runtime.images(others), None if meta is None else share.whole(meta)[chosen]

    return mixing(rows, epoch, seed, partners)


def seed_step(runtime: Runtime, *parts: int) -> None:
    """Has dropout and its like draw by (seed, epoch, step, rank) where several processes train together.

    So they draw differently, and a run that goes on draws what it would have drawn.
    """
    if not runtime.replicas.alone:
        torch.manual_seed(derive_seed(*parts, runtime.replicas.place.rank))
