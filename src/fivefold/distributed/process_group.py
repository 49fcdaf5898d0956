"""Data-parallel training with torch.distributed: shards of a batch, and the collectives between processes.

Each process has the whole network and a shard of the rows of each batch. Every process computes the loss from the logits of
all rows. The loss therefore equals that of a single process, for any loss function and for unequal shards. After the backward
pass the gradients of all processes are summed.
"""

import io
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

from fivefold.distributed.ranks import MIN_ROWS_PER_RANK, SINGLE_RANK, Rank
from fivefold.errors import PeerLostError, SettingsError, StoppedError
from fivefold.log import log
from fivefold.signals import raise_if_stopped

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
"""A process that does not respond for longer counts as lost. The others wait while rank 0 saves and uploads results."""
POLL_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Shard:
    """The rows `start` to `stop` of a batch of `count` rows. If a batch is too small to divide, every process has all rows."""

    start: int
    stop: int
    count: int
    rank: Rank

    @property
    def is_sharded(self) -> bool:
        return self.stop - self.start < self.count

    def take(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of a batch's items."""
        return items[self.start : self.stop] if self.is_sharded else items

    def all_gather(self, local_rows: Tensor) -> Tensor:
        """Return the rows [count, …] of all processes in order; `local_rows` are the rows of this process."""
        if not self.is_sharded:
            return local_rows
        bounds = [_bounds(self.count, rank, self.rank.world_size) for rank in range(self.rank.world_size)]
        padded = local_rows.new_zeros(max(stop - start for start, stop in bounds), *local_rows.shape[1:])
        padded[: len(local_rows)] = local_rows
        gathered = [torch.empty_like(padded) for _ in bounds]
        with _translate_errors():
            dist.all_gather(gathered, padded)
        return torch.cat([rows[: stop - start] for rows, (start, stop) in zip(gathered, bounds, strict=True)])

    def all_gather_logits(self, local_rows: Tensor) -> Tensor:
        """Like `all_gather`, with gradients: the gradient of a loss over all rows, summed over the processes, equals that of one process."""
        return local_rows if self.rank.world_size == 1 else _AllGatherLogits.apply(local_rows, self)


class _AllGatherLogits(torch.autograd.Function):
    """Gather rows; in the backward pass keep only the gradient of this process's rows, since every process has the same loss."""

    @staticmethod
    def forward(ctx, local_rows, shard):
        ctx.shard = shard
        return shard.all_gather(local_rows.detach()) if shard.is_sharded else local_rows.view_as(local_rows)

    @staticmethod
    def backward(ctx, grad):
        shard = ctx.shard
        return (grad[shard.start : shard.stop] if shard.is_sharded else grad / shard.rank.world_size), None


@dataclass(frozen=True)
class ProcessGroup:
    """The process group, from the view of the rank `rank`. With one process, all methods do nothing."""

    rank: Rank = SINGLE_RANK

    @property
    def is_single(self) -> bool:
        return self.rank.world_size == 1

    def shard(self, count: int) -> Shard:
        """Return this process's shard of a batch of `count` rows."""
        if self.is_single or count < MIN_ROWS_PER_RANK * self.rank.world_size:
            return Shard(0, count, count, self.rank)
        return Shard(*_bounds(count, self.rank.index, self.rank.world_size), count, self.rank)

    def max_shard_size(self, count: int) -> int:
        """Return the maximum number of rows per process for a batch of `count` rows."""
        return -(-count // self.rank.world_size)

    def local_device(self, device: torch.device) -> torch.device:
        """Return this process's GPU of the host and make it the current device. Raise a SettingsError if there are too few GPUs."""
        if device.type == "cuda" and self.rank.local_world_size > 1:
            gpus = torch.cuda.device_count()
            if device.index is not None or self.rank.local_world_size > gpus:
                raise SettingsError(
                    f"{self.rank.local_world_size} processes on this host need one GPU each, but train.device={device} and the "
                    f"host has {gpus} GPUs: set train.device=auto and NPROC={gpus} or less"
                )
            device = torch.device("cuda", self.rank.local_index)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and random state default to the current GPU
        return device

    def run_collectively(self, call: Callable[[], T]) -> T:
        """Return what `call` returns. If a stop signal interrupts it in one process, raise StoppedError in all after each has finished."""
        if self.is_single:
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

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value in all processes: tensors, numbers, texts, and lists and dicts of them."""
        if self.is_single:
            return value
        buffer = io.BytesIO()
        if self.rank.is_main:
            torch.save(value, buffer)
        size = torch.tensor(buffer.tell())
        with _translate_errors():
            dist.broadcast(size, 0)
            content = buffer.getbuffer() if self.rank.is_main else bytearray(int(size))
            data = torch.frombuffer(content, dtype=torch.uint8)
            dist.broadcast(data, 0)
        if self.rank.is_main:
            return value
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def check_same(self, value: Any, complaint: str) -> None:
        """Raise a SettingsError with the text `complaint` if this process's value differs from rank 0's."""
        if self.broadcast(value) != value:
            raise SettingsError(f"process {self.rank.index} of {self.rank.world_size}: {complaint}")

    def broadcast_weights(self, model: nn.Module) -> None:
        """Copy rank 0's weights and buffers into the model."""
        if not self.is_single:
            model.load_state_dict(self.broadcast(model.state_dict()))

    @torch.no_grad()
    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Sum each gradient over the processes. Average running statistics that each process computed from its own rows."""
        if self.is_single:
            return
        self._sum([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        statistics = _local_batchnorm_statistics(model)
        self._sum(statistics)
        if statistics:
            torch._foreach_div_(statistics, self.rank.world_size)

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum the tensors in one flat tensor in a fixed order, so that sums over more than two processes are bitwise reproducible."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _translate_errors():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)])


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def init_process_group(rank: Rank) -> Iterator[ProcessGroup]:
    """Join the process group of `rank` and yield it. At the end, all processes wait for rank 0."""
    process_group = ProcessGroup(rank)
    if process_group.is_single:
        yield process_group
        return
    _rendezvous(rank)
    yield process_group
    process_group.broadcast(None)
    dist.destroy_process_group()


def _rendezvous(rank: Rank) -> None:
    """Wait for all processes, in a thread, so that a signal can stop a waiting process."""
    # if a library imports this later, its default arguments keep the group and its threads until the interpreter's end,
    # where they can crash
    import torch.distributed.nn

    failed: list[Exception] = []

    def join() -> None:
        try:
            # torch's TCP store listens on all networks without authentication; prefer the file
            store = dist.FileStore(rank.rendezvous_file, rank.world_size) if rank.rendezvous_file else None
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            options = {"rank": rank.index, "world_size": rank.world_size, "timeout": RENDEZVOUS_TIMEOUT}
            dist.init_process_group(backend, store=store, **options)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=join, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        raise_if_stopped()
        thread.join(POLL_INTERVAL_S)
    if failed:
        raise PeerLostError(
            f"process {rank.index} of {rank.world_size} could not join the others at "
            f"{rank.rendezvous_file or 'MASTER_ADDR and MASTER_PORT'} ({failed[0]}): check that all are running and can reach it"
        ) from failed[0]
    log.info("%d processes train together", rank.world_size)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Translate a failed collective to a PeerLostError, or to a StoppedError if this process received a stop signal."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise_if_stopped()
        raise PeerLostError(
            "another process of this training is gone; see its log for the reason. The same command resumes from the "
            "last checkpoint"
        ) from error


def _bounds(count: int, rank: int, world: int) -> tuple[int, int]:
    return count * rank // world, count * (rank + 1) // world


def _local_batchnorm_statistics(model: nn.Module) -> list[Tensor]:
    """Return mean and variance of each norm that computes them from this process's rows only, i.e. not of SyncBatchNorm."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and not isinstance(m, nn.SyncBatchNorm)]
    used = [norm for norm in norms if norm.training and norm.running_mean is not None]
    return [tensor for norm in used for tensor in (norm.running_mean, norm.running_var)]


def convert_sync_batchnorm(network: nn.Module, device: torch.device) -> nn.Module:
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
    import timm.layers  # torch's own would drop the activations in timm's norms

    log.info("BatchNorm normalises by the rows of all processes (SyncBatchNorm)")
    return timm.layers.convert_sync_batchnorm(network)
