"""Data-parallel training with torch.distributed: shards of a batch, and the collectives between processes.

Each process has the whole network and a shard of the rows of each batch. Every process computes the loss from the logits of
all rows. The loss therefore equals that of a single process, for any loss function and for unequal shards. After the backward
pass the gradients of all processes are summed.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fivefold.distributed.ranks import ALONE, FEWEST_ROWS, Place
from fivefold.errors import LostError, SettingsError, StoppedError
from fivefold.signals import poll

T = TypeVar("T")
log = logging.getLogger("fivefold")

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
"""A process that does not respond for longer counts as lost. The others wait while rank 0 saves and uploads results."""
POLL_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Share:
    """The rows `start` to `stop` of a batch of `count` rows. If a batch is too small to divide, every process has all rows."""

    start: int
    stop: int
    count: int
    place: Place

    @property
    def parted(self) -> bool:
        return self.stop - self.start < self.count

    def take(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of a batch's items."""
        return items[self.start : self.stop] if self.parted else items

    def whole(self, own: Tensor) -> Tensor:
        """Return the rows [count, …] of all processes in order; `own` are the rows of this process."""
        if not self.parted:
            return own
        bounds = [_bounds(self.count, rank, self.place.world) for rank in range(self.place.world)]
        largest = max(stop - start for start, stop in bounds)
        padded = torch.cat([own, own.new_zeros(largest - len(own), *own.shape[1:])]) if len(own) < largest else own
        gathered = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in bounds]
        with _translate_errors():
            dist.all_gather(gathered, padded.contiguous())
        return torch.cat([rows[: stop - start] for rows, (start, stop) in zip(gathered, bounds, strict=True)])

    def logits(self, own: Tensor) -> Tensor:
        """Like `whole`, with gradients: the gradient of a loss over all rows, summed over the processes, equals that of one process."""
        return own if self.place.world == 1 else _AllGatherLogits.apply(own, self)


class _AllGatherLogits(torch.autograd.Function):
    """Gather rows; in the backward pass keep only the gradient of this process's rows, since every process has the same loss."""

    @staticmethod
    def forward(ctx, own, share):
        ctx.share = share
        return share.whole(own.detach()) if share.parted else own.view_as(own)

    @staticmethod
    def backward(ctx, grad):
        share = ctx.share
        return (grad[share.start : share.stop] if share.parted else grad / share.place.world), None


@dataclass(frozen=True)
class Replicas:
    """The process group, from the view of the rank `place`. With one process, all methods do nothing."""

    place: Place = ALONE

    @property
    def alone(self) -> bool:
        return self.place.world == 1

    def share(self, count: int) -> Share:
        """Return this process's share of a batch of `count` rows."""
        if self.alone or count < FEWEST_ROWS * self.place.world:
            return Share(0, count, count, self.place)
        return Share(*_bounds(count, self.place.rank, self.place.world), count, self.place)

    def largest_share(self, count: int) -> int:
        """Return the maximum number of rows per process for a batch of `count` rows."""
        return -(-count // self.place.world)

    def own_device(self, device: torch.device) -> torch.device:
        """Return this process's GPU of the host and make it the current device. Raise a SettingsError if there are too few GPUs."""
        if device.type != "cuda":
            return device
        if self.place.local_world == 1:
            if device.index is not None:
                torch.cuda.set_device(device)  # streams and random state default to the current GPU
            return device
        gpus = torch.cuda.device_count()
        if device.index is not None or self.place.local_world > gpus:
            raise SettingsError(
                f"{self.place.local_world} processes on this host need one GPU each, but train.device={device} and the host has "
                f"{gpus} GPUs: set train.device=auto and NPROC={gpus} or less"
            )
        torch.cuda.set_device(self.place.local_rank)
        return torch.device("cuda", self.place.local_rank)

    def together(self, call: Callable[[], T]) -> T:
        """Return what `call` returns. If a stop signal interrupts it in one process, raise StoppedError in all after each has finished."""
        if self.alone:
            return call()
        result, received = None, 0
        try:
            result = call()
        except StoppedError as error:
            received = error.number
        number = torch.tensor(received)
        with _translate_errors():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise StoppedError(int(number))
        return result

    def shared(self, value: Any) -> Any:
        """Return rank 0's value in all processes: tensors, numbers, texts, and lists and dicts of them."""
        if self.alone:
            return value
        buffer = io.BytesIO()
        if self.place.leads:
            torch.save(value, buffer)
        size = torch.tensor(buffer.tell())
        with _translate_errors():
            dist.broadcast(size, 0)
            data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8) if self.place.leads else None
            data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
            dist.broadcast(data, 0)
        if self.place.leads:
            return value
        return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)

    def check_same(self, value: Any, complaint: str) -> None:
        """Raise a SettingsError with the text `complaint` if this process's value differs from rank 0's."""
        if self.shared(value) != value:
            raise SettingsError(f"process {self.place.rank} of {self.place.world}: {complaint}")

    @torch.no_grad()
    def start_alike(self, model: nn.Module) -> None:
        """Copy rank 0's weights and buffers into the model."""
        if self.alone:
            return
        with _translate_errors():
            for tensor in model.state_dict().values():
                contiguous = tensor.contiguous()
                dist.broadcast(contiguous, 0)
                tensor.copy_(contiguous)

    @torch.no_grad()
    def sum_gradients(self, model: nn.Module) -> None:
        """Sum each gradient over the processes. Average running statistics that each process computed from its own rows."""
        if self.alone:
            return
        self._sum([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        statistics = _local_batchnorm_statistics(model)
        self._sum(statistics)
        if statistics:
            torch._foreach_div_(statistics, self.place.world)

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum the tensors in one flat tensor in a fixed order, so that sums over more than two processes are bitwise reproducible."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _translate_errors():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)])


BY_ITSELF = Replicas()


@contextmanager
def joined(place: Place) -> Iterator[Replicas]:
    """Join the process group of `place` and yield it. At the end, all processes wait for rank 0."""
    if place.world == 1:
        yield BY_ITSELF
        return
    _rendezvous(place)
    replicas = Replicas(place)
    yield replicas
    replicas.shared(None)
    dist.destroy_process_group()


def _rendezvous(place: Place) -> None:
    """Wait for all processes, in a thread, so that a signal can stop a waiting process."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    failed: list[Exception] = []

    def meet() -> None:
        try:
            # torch's TCP store listens on all networks without authentication; prefer the file
            store = dist.FileStore(place.meeting, place.world) if place.meeting else None
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world, timeout=RENDEZVOUS_TIMEOUT
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        poll()
        thread.join(POLL_INTERVAL_S)
    if failed:
        raise LostError(
            f"process {place.rank} of {place.world} could not join the others at "
            f"{place.meeting or 'MASTER_ADDR and MASTER_PORT'} ({failed[0]}): check that all are running and can reach it"
        ) from failed[0]
    log.info("%d processes train together", place.world)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Translate a failed collective to a LostError, or to a StoppedError if this process received a stop signal."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        poll()
        raise LostError(
            "another process of this training is gone; see its log for the reason. The same command resumes from the "
            "last checkpoint"
        ) from error


def _bounds(count: int, rank: int, world: int) -> tuple[int, int]:
    return count * rank // world, count * (rank + 1) // world


def _local_batchnorm_statistics(model: nn.Module) -> list[Tensor]:
    """Return mean and variance of each norm that computes them from this process's rows only, i.e. not of SyncBatchNorm."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and not isinstance(m, nn.SyncBatchNorm)]
    return [
        tensor
        for norm in norms
        if norm.training and norm.running_mean is not None
        for tensor in (norm.running_mean, norm.running_var)
    ]


def with_norms_of_all(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network with BatchNorm over the rows of all processes on GPUs. On CPUs, where torch has no such norm, return it unchanged.

    Parameters, buffers and their names stay. If the network has BatchNorm, log which one it uses.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return network
    if device.type != "cuda":
        log.info(
            "BatchNorm normalises by each process's own rows; its running statistics are averaged over the processes"
        )
        return network
    from timm.layers import convert_sync_batchnorm  # torch's own would drop the activations in timm's norms

    log.info("BatchNorm normalises by the rows of all processes (SyncBatchNorm)")
    return convert_sync_batchnorm(network)
