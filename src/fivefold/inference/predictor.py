"""Log-probabilities of images by a trained classifier, averaged over views."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.data.ahead import ahead
from fivefold.data.dataset import Batch, ImageSet, Sample, in_order, load
from fivefold.data.prepared import Prepared
from fivefold.distributed.replicas import BY_ITSELF, Replicas
from fivefold.errors import DataError
from fivefold.inference.tta import View, build_views
from fivefold.models.classifier import LINKS
from fivefold.models.cpu_convs import groups_in_float32
from fivefold.progress import track
from fivefold.recipe import Spec


@dataclass(frozen=True)
class Runtime:
    """How a network runs on this machine: device, autocast precision, memory format, normalisation.

    `dtype` is the autocast type, None for plain float32. `mean` and `std` are float [1, 3, 1, 1]
    on the device, for images in 0..255. `replicas` are the processes that part its rows.
    `grouped_fp32`: grouped convolutions that bf16 slows stay in float32 under autocast.
    """

    device: torch.device
    dtype: torch.dtype | None
    channels_last: bool
    mean: Tensor
    std: Tensor
    replicas: Replicas = BY_ITSELF
    grouped_fp32: bool = False
    _tiled: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this device in this memory format, its grouped convolutions as `grouped_fp32` wants them."""
        model = groups_in_float32(model) if self.grouped_fp32 else model
        return model.to(self.device, memory_format=self.memory_format)

    def images(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] as normalised floats on the device: (x - mean) / std, in a tensor of their own.

        On a CPU mean and std stand beside each pixel, laid out as the images are: a number for each channel, broadcast
        over the pixels, is much slower. The bits are the same.
        """
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
        images = images.to(torch.float32)
        if self.device.type != "cpu":
            return images.sub_(self.mean).div_(self.std)
        mean, std = self._tiles(images.shape[-2:])
        self._in_rows(images).sub_(mean).div_(std)
        return images

    def _in_rows(self, images: Tensor) -> Tensor:
        """A view of them [B, H·W·3] in the order in which they lie in memory."""
        return (images.permute(0, 2, 3, 1) if self.channels_last else images).reshape(len(images), -1)

    def _tiles(self, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and std [1, H·W·3] of an image of `size` as it lies in memory; kept for the next batch."""
        if size not in self._tiled:
            mean, std = (self._in_rows(each.expand(1, 3, *size)).contiguous() for each in (self.mean, self.std))
            self._tiled[size] = mean, std
        return self._tiled[size]

    def meta(self, meta: Tensor | None) -> Tensor | None:
        """Meta features [B, M] on the device, if there are any."""
        return None if meta is None else meta.to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)


def make_runtime(
    device: torch.device,
    dtype: torch.dtype | None,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
    replicas: Replicas = BY_ITSELF,
    grouped_fp32: bool = False,
) -> Runtime:
    """A Runtime from mean and std of images in 0..1."""

    def scaled(values: Sequence[float]) -> Tensor:
        return (torch.tensor(values, dtype=torch.float32) * 255).reshape(1, 3, 1, 1).to(device)

    return Runtime(device, dtype, channels_last, scaled(mean), scaled(std), replicas, grouped_fp32)


OfViews = Callable[[Sequence[Tensor]], Tensor]
"""What is made of the logits [B, C] of each view: [B, C]."""


def log_mean(logits: Sequence[Tensor], link: str = "softmax") -> Tensor:
    """Log of the mean probability over the views; `link` of LINKS."""
    log_probs = torch.stack([LINKS[link](each).log_softmax(dim=1) for each in logits])
    return log_probs.logsumexp(dim=0) - float(np.log(len(logits)))


def only_logits(logits: Sequence[Tensor]) -> Tensor:
    """The logits of a single view."""
    (only,) = logits
    return only


def predict_all(
    model: nn.Module,
    images: ImageSet | Prepared,
    batch_size: int,
    workers: int,
    runtime: Runtime,
    views: Sequence[Spec],
    label: str = "",
    rows: Sequence[int] | None = None,
    of_views: OfViews = log_mean,
) -> np.ndarray:
    """`predict` of all rows in order, or of the given `rows` of the images, in batches of `batch_size`, under a progress bar if there is a `label`.

    `Prepared` images are made before the network runs, so that nothing takes the cores from it, and not again.
    Where several processes train together each takes its part of the rows, none twice, and has the result of all.
    """
    replicas = runtime.replicas
    share = replicas.share(len(images) if rows is None else len(rows))
    batches = in_order(share.stop, replicas.largest_share(batch_size) if share.parted else batch_size, share.start)
    if rows is not None:
        batches = [[(epoch, int(rows[at])) for epoch, at in batch] for batch in batches]
    found = replicas.together(
        lambda: predict(model, _loaded(images, batches, workers, label), runtime, views, of_views)
    )
    return share.whole(torch.from_numpy(found)).numpy() if share.parted else found


def _loaded(images: ImageSet | Prepared, batches: list[list[Sample]], workers: int, label: str) -> Iterator[Batch]:
    """The batches, under a progress bar if there is a label; images that are to be prepared are so by then."""
    prepared = isinstance(images, Prepared)
    loaded = images.batches(batches, workers, label) if prepared else load(images, batches, workers)
    return track(loaded, len(batches), label) if label else loaded


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[Batch], runtime: Runtime, views: Sequence[Spec], of_views: OfViews = log_mean
) -> np.ndarray:
    """What `of_views` makes of the views' logits (log of the mean probability), float32 [N, C], rows in the order of the batches.

    Raises DataError when the network gives a value that is not finite.
    """
    was_training = model.training
    model.eval()
    chosen = build_views(views, black=-runtime.mean / runtime.std)
    found = [of_views(_batch(model, batch, runtime, chosen)) for batch in ahead(batches, runtime.device)]
    model.train(was_training)
    table = torch.cat(found).cpu().numpy()
    if not np.isfinite(table).all():
        raise DataError(
            "the model gives probabilities that are not finite: its weights are broken, or the precision too low"
        )
    return table


def _batch(model: nn.Module, batch: Batch, runtime: Runtime, views: Sequence[View]) -> list[Tensor]:
    """Logits float32 [B, C] of each view."""
    meta = runtime.meta(batch.meta)
    company = () if meta is None else (meta,)
    with runtime.autocast():
        logits = [model(images, *company) for images in _seen(batch.images, runtime, views)]
    return [each.float() for each in logits]


def _seen(images: Tensor, runtime: Runtime, views: Sequence[View]) -> Iterator[Tensor]:
    """Each view of uint8 images [B, 3, H, W], normalised on the device; those that move pixels alike together, normalised once."""
    for moved in dict.fromkeys(view.moved for view in views):
        normalised = runtime.images(moved(images))
        yield from (view.resampled(normalised) for view in views if view.moved == moved)
