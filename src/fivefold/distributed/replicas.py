"""The processes that train one model together, as torch.distributed joins them: who has which rows, and what they tell each other.

Each holds the whole network. A batch's rows are parted among them; the loss is taken of the logits of all rows in every
process, so it is that of one process whatever the loss and however unequal the parts, and the gradients of all are summed
when the backward pass is over.
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

from fivefold.distributed.place import ALONE, FEWEST_ROWS, Place
from fivefold.errors import LostError, SettingsError, StoppedError
from fivefold.stopping import poll

T = TypeVar("T")
log = logging.getLogger("fivefold")

PATIENCE = timedelta(minutes=30)
"""A process that others wait for longer is lost. The first one saves and sends results while they do."""
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Share:
    """The rows `start` to `stop` of a batch of `count`; of one too small to be parted every process has all."""

    start: int
    stop: int
    count: int
    place: Place

    @property
    def parted(self) -> bool:
        return self.stop - self.start < self.count

    def take(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch's items."""
        return items[self.start : self.stop] if self.parted else items

    def whole(self, own: Tensor) -> Tensor:
        """The rows [count, …] of all processes, from the `own` ones of each, in order."""
        if not self.parted:
            return own
        sizes = [_bounds(self.count, rank, self.place.world) for rank in range(self.place.world)]
        most = max(stop - start for start, stop in sizes)
        padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]) if len(own) < most else own
        found = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in sizes]
        with _reaching():
            dist.all_gather(found, padded.contiguous())
        return torch.cat([rows[: stop - start] for rows, (start, stop) in zip(found, sizes, strict=True)])

    def logits(self, own: Tensor) -> Tensor:
        """As `whole`; the gradient of a loss of all rows, summed over the processes, is that of one process."""
        return own if self.place.world == 1 else _Whole.apply(own, self)


class _Whole(torch.autograd.Function):
    """Every process takes the same loss of all rows, so its own rows' gradient is all that it has to add."""

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
    """The processes that train together, seen from the one at `place`; alone, every method has nothing to do."""

    place: Place = ALONE

    @property
    def alone(self) -> bool:
        return self.place.world == 1

    def share(self, count: int) -> Share:
        """This process's share of a batch of `count` rows."""
        if self.alone or count < FEWEST_ROWS * self.place.world:
            return Share(0, count, count, self.place)
        return Share(*_bounds(count, self.place.rank, self.place.world), count, self.place)

    def largest_share(self, count: int) -> int:
        """The most rows of a batch of `count` that a process has."""
        return -(-count // self.place.world)

    def own_device(self, device: torch.device) -> torch.device:
        """Of a host's GPUs the one of this process, which becomes the current one; a SettingsError where there are too few."""
        if device.type != "cuda":
            return device
        if self.place.local_world == 1:
            if device.index is not None:
                torch.cuda.set_device(device)  # a stream or random state is the current GPU's where no other is named
            return device
        there = torch.cuda.device_count()
        if device.index is not None or self.place.local_world > there:
            raise SettingsError(
                f"{self.place.local_world} processes on this host need a GPU each, but train.device={device} of {there} "
                f"GPUs is what they have: train.device=auto and NPROC={there} or less"
            )
        torch.cuda.set_device(self.place.local_rank)
        return torch.device("cuda", self.place.local_rank)

    def together(self, call: Callable[[], T]) -> T:
        """What `call` gives. Where a process is told to stop within it, StoppedError in all, once each is through."""
        if self.alone:
            return call()
        found, told = None, 0
        try:
            found = call()
        except StoppedError as error:
            told = error.number
        number = torch.tensor(told)
        with _reaching():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise StoppedError(int(number))
        return found

    def shared(self, value: Any) -> Any:
        """The first process's value, in all of them: tensors, numbers, texts, and lists and dicts of them."""
        if self.alone:
            return value
        kept = io.BytesIO()
        if self.place.leads:
            torch.save(value, kept)
        size = torch.tensor(kept.tell())
        with _reaching():
            dist.broadcast(size, 0)
            data = torch.frombuffer(kept.getbuffer(), dtype=torch.uint8) if self.place.leads else None
            data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
            dist.broadcast(data, 0)
        if self.place.leads:
            return value
        return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)

    def check_same(self, value: Any, complaint: str) -> None:
        """A SettingsError, which says `complaint`, where this process has another value than the first."""
        if self.shared(value) != value:
            raise SettingsError(f"process {self.place.rank} of {self.place.world}: {complaint}")

    @torch.no_grad()
    def start_alike(self, model: nn.Module) -> None:
        """Gives the model the first process's weights and buffers."""
        if self.alone:
            return
        with _reaching():
            for tensor in model.state_dict().values():
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    @torch.no_grad()
    def sum_gradients(self, model: nn.Module) -> None:
        """Sums each gradient over the processes; running statistics of a process's own rows become their mean."""
        if self.alone:
            return
        self._sum([each.grad for each in model.parameters() if each.grad is not None])
        statistics = _own_statistics(model)
        self._sum(statistics)
        if statistics:
            torch._foreach_div_(statistics, self.place.world)

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        """As one tensor, always of the same ones, so that sums of more than two have the same bits each time."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _reaching():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)])


BY_ITSELF = Replicas()


@contextmanager
def joined(place: Place) -> Iterator[Replicas]:
    """The processes that meet at `place`, once all are there; at the end each waits for the first to be done."""
    if place.world == 1:
        yield BY_ITSELF
        return
    _meet(place)
    found = Replicas(place)
    yield found
    found.shared(None)
    dist.destroy_process_group()


def _meet(place: Place) -> None:
    """Waits for all to be there, in a thread, so that a process that waits for others can be stopped."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    failed: list[Exception] = []

    def meet() -> None:
        try:
            # torch's own store listens to every network, and asks nobody who they are
            store = dist.FileStore(place.meeting, place.world) if place.meeting else None
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=PATIENCE)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        poll()
        thread.join(SECONDS_BETWEEN_LOOKS)
    if failed:
        raise LostError(
            f"process {place.rank} of {place.world} could not meet the others at "
            f"{place.meeting or 'MASTER_ADDR and MASTER_PORT'} ({failed[0]}): see that all were started and can reach it"
        ) from failed[0]
    log.info("%d processes train together", place.world)


@contextmanager
def _reaching() -> Iterator[None]:
    """Has a LostError say that another process is gone, or StoppedError where this one was told to stop."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        poll()
        raise LostError(
            "a process that trains with this one is gone, and its own log says why: the same command goes on from the "
            "last checkpoint"
        ) from error


def _bounds(count: int, rank: int, world: int) -> tuple[int, int]:
    return count * rank // world, count * (rank + 1) // world


def _own_statistics(model: nn.Module) -> list[Tensor]:
    """Mean and variance of each norm that learns them from this process's rows alone; SyncBatchNorm's are everybody's."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and not isinstance(m, nn.SyncBatchNorm)]
    return [
        each
        for norm in norms
        if norm.training and norm.running_mean is not None
        for each in (norm.running_mean, norm.running_var)
    ]


def with_norms_of_all(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm over the rows of all processes on GPUs; on CPUs, where torch has no such norm, as it is.

    Parameters, buffers and their names stay. The log says which it is, if the network has BatchNorm at all.
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
