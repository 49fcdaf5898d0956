"""Updates: one optimiser step, with backward pass, accumulation, unscaling and clipping."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fivefold.errors import SettingsError
from fivefold.inference.predictor import Runtime
from fivefold.training.checkpoints import random_state, set_random_state
from fivefold.training.objectives import MicroBatch, Objective, Result

Update = Callable[[Sequence[MicroBatch]], list[Result]]


def build_scaler(runtime: Runtime) -> GradScaler:
    """Return the loss scaler of fp16; with any other precision it does nothing."""
    return GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)


def plain_step(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    runtime: Runtime,
    clip: float,
    rho: float = 0.0,
    scaler: GradScaler | None = None,
) -> Update:
    """Return an update with one gradient, of the micro-batches as one batch, and one optimiser step.

    fp16 losses are scaled (by `scaler`, or a new one); gradients are unscaled before their norm is clipped to `clip`
    (0: no clipping). `rho` is for `sam_step` only.
    """
    scaler = scaler or build_scaler(runtime)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update(micro_batches: Sequence[MicroBatch]) -> list[Result]:
        optimizer.zero_grad(set_to_none=True)
        results = _accumulate(model, objective, micro_batches, runtime, scaler.scale)
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
        return results

    return update


def sam_step(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    runtime: Runtime,
    clip: float,
    rho: float,
    scaler: GradScaler | None = None,
) -> Update:
    """Return an update by the gradient at w + ρ·g/‖g‖, g the gradient at w (Foret et al. 2021, arXiv 2010.01412, equations 2 and 3).

    Both gradients use the same micro-batches and the same random state. The second one is clipped. The results and
    BatchNorm's running statistics are those of the first pass. If several ranks share a batch, g is the gradient of the
    whole batch on each of them, so they climb to the same point. Raise a SettingsError for fp16: its loss scaling does
    not support two gradients per step.
    """
    if runtime.dtype == torch.float16:
        raise SettingsError(
            f"train.sam_rho={rho:g} needs two gradients per step, which fp16's loss scaling does not support: "
            "set train.precision=bf16 (or fp32)"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update(micro_batches: Sequence[MicroBatch]) -> list[Result]:
        state = random_state(runtime.device)
        optimizer.zero_grad(set_to_none=True)
        results = _accumulate(model, objective, micro_batches, runtime)
        counters = list(model.buffers())
        counted = [buffer.clone() for buffer in counters]
        moved, origin = _perturb(parameters, rho)
        set_random_state(runtime.device, state)
        optimizer.zero_grad(set_to_none=True)
        _accumulate(model, objective, micro_batches, runtime)
        _copy_tensors(counters, counted)
        _copy_tensors(moved, origin)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        return results

    return update


def _accumulate(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    runtime: Runtime,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> list[Result]:
    """Accumulate the gradient of all micro-batches as one batch, over the rows of all ranks.

    Losses are detached, so that results kept until the next step do not keep this step's graph.
    """
    step, results = [batch.targets for batch in micro_batches], []
    for batch in micro_batches:
        with runtime.autocast():
            result = objective(model, replace(batch, step=step))
        scale(result.loss).backward()
        results.append(replace(result, loss=result.loss.detach()))
    runtime.process_group.all_reduce_gradients(model)
    return results


@torch.no_grad()
def _perturb(parameters: Sequence[Tensor], rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """Move the parameters by ρ along their gradient, which it overwrites; return the moved ones and their old values."""
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    origin = [parameter.clone() for parameter in moved]
    if moved:
        gradients = [parameter.grad for parameter in moved]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, rho / (norm + 1e-12))
        torch._foreach_add_(moved, gradients)
    return moved, origin


@torch.no_grad()
def _copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
