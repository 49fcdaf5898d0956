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


def build_update(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    runtime: Runtime,
    clip: float,
    rho: float = 0.0,
    scaler: GradScaler | None = None,
) -> Update:
    """Return an update with the gradient of the micro-batches as one batch, and one optimiser step.

    fp16 losses are scaled (by `scaler`, or a new one); gradients are unscaled before their norm is clipped to `clip`
    (0: no clipping).

    `rho` above 0 selects SAM: the gradient at w + ρ·g/‖g‖, g the gradient at w (Foret et al. 2021, arXiv 2010.01412,
    equations 2 and 3). Both gradients use the same micro-batches and the same random state. The results and BatchNorm's
    running statistics are those of the first. If several ranks share a batch, g is the gradient of the whole batch on
    each of them, so they climb to the same point. Raise a SettingsError for fp16, because its loss scaling does not
    support two gradients per step.
    """
    if rho and runtime.dtype == torch.float16:
        raise SettingsError(
            f"train.sam_rho={rho:g} needs two gradients per step, which fp16's loss scaling does not support: "
            "set train.precision=bf16 (or fp32)"
        )
    scaler = scaler or build_scaler(runtime)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def compute_gradient(micro_batches: Sequence[MicroBatch]) -> list[Result]:
        """Compute the scaled gradient of all micro-batches as one batch, over the rows of all ranks."""
        optimizer.zero_grad(set_to_none=True)
        step, results = [batch.targets for batch in micro_batches], []
        for batch in micro_batches:
            with runtime.autocast():
                result = objective(model, replace(batch, step=step))
            scaler.scale(result.loss).backward()
            results.append(replace(result, loss=result.loss.detach()))  # else it would keep this step's graph
        runtime.process_group.all_reduce_gradients(model)
        return results

    def update(micro_batches: Sequence[MicroBatch]) -> list[Result]:
        state = random_state(runtime.device) if rho else []
        results = compute_gradient(micro_batches)
        if rho:
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            moved, origin = _perturb(parameters, rho)
            set_random_state(runtime.device, state)
            compute_gradient(micro_batches)
            with torch.no_grad():
                torch._foreach_copy_(moved, origin)
                for buffer, saved in buffers:
                    buffer.copy_(saved)
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
        return results

    return update


@torch.no_grad()
def _perturb(parameters: Sequence[Tensor], rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """Move the parameters by ρ along their gradient, which it overwrites; return the moved ones and their old values."""
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    origin = [parameter.clone() for parameter in moved]
    gradients = [parameter.grad for parameter in moved]
    torch._foreach_mul_(gradients, rho / (nn.utils.get_total_norm(gradients) + 1e-12))
    torch._foreach_add_(moved, gradients)
    return moved, origin
