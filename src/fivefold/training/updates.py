"""Updates by name: what is a step? Each owns backward, unscaling, clipping and accumulation."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fivefold.errors import SettingsError
from fivefold.inference.predictor import Runtime
from fivefold.training.objectives import Objective, Result, Rows
from fivefold.training.resume import random_state, set_random_state

Update = Callable[[Sequence[Rows]], list[Result]]


def build_scaler(runtime: Runtime) -> GradScaler:
    """What scales the loss of fp16; with another precision it leaves it as it is."""
    return GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)


def plain(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    runtime: Runtime,
    clip: float,
    rho: float = 0.0,
    scaler: GradScaler | None = None,
) -> Update:
    """One gradient of the micro-batches as one batch, one optimiser step.

    fp16 is scaled (by `scaler`, or one of its own), and unscaled before the gradient's norm is cut to
    `clip` (0: not cut). `rho` is sam's.
    """
    scaler = scaler or build_scaler(runtime)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update(micro_batches: Sequence[Rows]) -> list[Result]:
        optimizer.zero_grad(set_to_none=True)
        results = _accumulate(model, objective, micro_batches, runtime, scaler.scale)
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
        return results

    return update


def sam(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    runtime: Runtime,
    clip: float,
    rho: float,
    scaler: GradScaler | None = None,
) -> Update:
    """A step by the gradient at w + ρ·g/‖g‖, g the gradient at w (Foret et al. 2021, arXiv 2010.01412, equations 2 and 3).

    Both gradients are those of the same micro-batches from the same random state. The second one
    is clipped; what the network counts while it runs (BatchNorm's statistics) is the first pass's,
    and so are the results. Where several processes part a batch, g is the gradient of the whole
    batch in each of them, so they climb to the same point. Raises SettingsError for fp16, whose scaling has no word on two gradients.
    """
    if runtime.dtype == torch.float16:
        raise SettingsError(
            "train.update=sam takes two gradients a step, which fp16's loss scaling cannot follow: "
            "train.precision=bf16 (or fp32) can"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update(micro_batches: Sequence[Rows]) -> list[Result]:
        state = random_state(runtime.device)
        optimizer.zero_grad(set_to_none=True)
        results = _accumulate(model, objective, micro_batches, runtime)
        counters = list(model.buffers())
        counted = [buffer.clone() for buffer in counters]
        moved, origin = _climb(parameters, rho)
        set_random_state(runtime.device, state)
        optimizer.zero_grad(set_to_none=True)
        _accumulate(model, objective, micro_batches, runtime)
        _copy(counters, counted)
        _copy(moved, origin)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        return results

    return update


def _accumulate(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[Rows],
    runtime: Runtime,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> list[Result]:
    """Adds the gradient of the loss of all micro-batches as one, with the rows of all processes, to the parameters'.

    Losses are detached: who keeps the results until the next step would keep this one's graph with them.
    """
    step, results = [batch.targets for batch in micro_batches], []
    for batch in micro_batches:
        with runtime.autocast():
            result = objective(model, replace(batch, step=step))
        scale(result.loss).backward()
        results.append(replace(result, loss=result.loss.detach()))
    runtime.replicas.sum_gradients(model)
    return results


@torch.no_grad()
def _climb(parameters: Sequence[Tensor], rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """Moves the parameters ρ along their gradient, which it uses up; those that moved, and where they were."""
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    origin = [parameter.clone() for parameter in moved]
    if moved:
        gradients = [parameter.grad for parameter in moved]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, rho / (norm + 1e-12))
        torch._foreach_add_(moved, gradients)
    return moved, origin


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


UPDATES: dict[str, Callable[..., Update]] = {
    "plain": plain,
    "sam": sam,
}
