"""Prediction: log-probabilities of images from a trained classifier, averaged over views."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.config.schema import Spec
from fivefold.data.pipeline.dataset import Batch, ImageDataset, load_batches, sequential_batches
from fivefold.data.pipeline.eval_cache import EvalImageCache
from fivefold.data.pipeline.loader import prefetch_to_device
from fivefold.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from fivefold.errors import DataError
from fivefold.inference.tta import View, build_views
from fivefold.models.classifier import LINKS
from fivefold.models.cpu_convs import run_grouped_convs_in_fp32
from fivefold.progress import track


@dataclass(frozen=True)
class Runtime:
    """How a network runs on this machine.

    `dtype` is the autocast type, None for plain float32. `mean` and `std` are float [1, 3, 1, 1] on the device, for
    images in 0..255. `process_group` shards the rows. `grouped_fp32`: grouped convolutions that bf16 slows down stay in
    float32 under autocast.
    """

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    mean: Tensor
    std: Tensor
    process_group: ProcessGroup = SINGLE_PROCESS
    grouped_fp32: bool = False
    _tiled: dict[torch.Size, list[Tensor]] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def to_device(self, model: nn.Module) -> nn.Module:
        """Move the model to the device in the memory format; keep grouped convolutions in float32 if `grouped_fp32`."""
        model = run_grouped_convs_in_fp32(model) if self.grouped_fp32 else model
        return model.to(self.device, memory_format=self.memory_format)

    def images(self, images: Tensor) -> Tensor:
        """Normalise uint8 images [B, 3, H, W] on the device: (x - mean) / std, in a new float tensor.

        On a CPU, mean and std are expanded to every pixel in the images' memory layout, because broadcasting one number
        per channel is much slower. The bits are the same.
        """
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
        images = images.to(torch.float32)
        if self.device.type != "cpu":
            return images.sub_(self.mean).div_(self.std)
        size = images.shape[-2:]
        if size not in self._tiled:
            self._tiled[size] = [self._flatten(v.expand(1, 3, *size)).contiguous() for v in (self.mean, self.std)]
        mean, std = self._tiled[size]
        self._flatten(images).sub_(mean).div_(std)
        return images

    def _flatten(self, images: Tensor) -> Tensor:
        """Return the images as a view [B, H·W·3] in memory order."""
        return (images.permute(0, 2, 3, 1) if self.channels_last else images).reshape(len(images), -1)

    def meta(self, meta: Tensor | None) -> Tensor | None:
        """Move meta features [B, M] to the device, if there are any."""
        return None if meta is None else meta.to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)


def make_runtime(
    device: torch.device,
    dtype: torch.dtype | None,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
    process_group: ProcessGroup = SINGLE_PROCESS,
    grouped_fp32: bool = False,
) -> Runtime:
    """Build a Runtime from mean and std of images in 0..1."""
    scaled = [(torch.tensor(v, dtype=torch.float32) * 255).reshape(1, 3, 1, 1).to(device) for v in (mean, std)]
    return Runtime(device, dtype, channels_last, *scaled, process_group, grouped_fp32)


ViewReducer = Callable[[Sequence[Tensor]], Tensor]
"""Combines the logits [B, C] of all views into [B, C]."""


def log_mean(logits: Sequence[Tensor], link: str = "softmax") -> Tensor:
    """Return the log of the mean probability over the views; `link` is a key of LINKS."""
    log_probs = torch.stack([LINKS[link](view).log_softmax(dim=1) for view in logits])
    return log_probs.logsumexp(dim=0) - float(np.log(len(logits)))


def predict_all(
    model: nn.Module,
    images: ImageDataset | EvalImageCache,
    batch_size: int,
    workers: int,
    runtime: Runtime,
    views: Sequence[Spec],
    label: str = "",
    rows: Sequence[int] | None = None,
    reduce_views: ViewReducer = log_mean,
) -> np.ndarray:
    """Run `predict` on all images in order, or on their `rows`, in batches of `batch_size`; a `label` adds a progress bar.

    `EvalImageCache` images are prepared once, before the network runs, so that they take no cores from it.
    In a process group each rank predicts its shard of the rows, without overlap, and all ranks get the full result.
    """
    process_group = runtime.process_group
    shard = process_group.shard(len(images) if rows is None else len(rows))
    batches = sequential_batches(
        shard.stop, process_group.max_shard_size(batch_size) if shard.is_sharded else batch_size, shard.start
    )
    if rows is not None:
        batches = [[(epoch, int(rows[index])) for epoch, index in batch] for batch in batches]

    def load() -> Iterable[Batch]:
        prepared = isinstance(images, EvalImageCache)
        loaded = images.batches(batches, workers, label) if prepared else load_batches(images, batches, workers)
        return track(loaded, len(batches), label) if label else loaded

    predicted = process_group.run_collectively(lambda: predict(model, load(), runtime, views, reduce_views))
    return shard.all_gather(torch.from_numpy(predicted)).numpy() if shard.is_sharded else predicted


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    runtime: Runtime,
    views: Sequence[Spec],
    reduce_views: ViewReducer = log_mean,
) -> np.ndarray:
    """Return the views' logits combined by `reduce_views`, float32 [N, C] (by default log of the mean probability), in batch order.

    Raise a DataError if the network returns a value that is not finite.
    """
    was_training = model.training
    model.eval()
    chosen = build_views(views, black=-runtime.mean / runtime.std)
    outputs = [
        reduce_views(_view_logits(model, batch, runtime, chosen))
        for batch in prefetch_to_device(batches, runtime.device)
    ]
    model.train(was_training)
    table = torch.cat(outputs).cpu().numpy()
    if not np.isfinite(table).all():
        raise DataError(
            "the model returns probabilities that are not finite: its weights are damaged, or the precision is too low"
        )
    return table


def _view_logits(model: nn.Module, batch: Batch, runtime: Runtime, views: Sequence[View]) -> list[Tensor]:
    """Return the logits float32 [B, C] of each view."""
    meta = runtime.meta(batch.meta)
    meta_inputs = () if meta is None else (meta,)
    with runtime.autocast():
        images = runtime.images(batch.images)
        logits = [model(view(images), *meta_inputs) for view in views]
    return [view.float() for view in logits]
