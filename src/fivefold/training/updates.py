"""Updates: what is a step? Each owns backward, unscaling, clipping and accumulation."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from fivefold.inference.predictor import Runtime
from fivefold.training.objectives import Objective, Result, Rows

Update = Callable[[Sequence[Rows]], list[Result]]


def plain(model: nn.Module, objective: Objective, optimizer: Optimizer, runtime: Runtime, clip: float) -> Update:
    """One gradient of the mean loss over the micro-batches, one optimiser step.

    fp16 is scaled, and unscaled before the gradient's norm is cut to `clip` (0: not cut).
    """
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update(micro_batches: Sequence[Rows]) -> list[Result]:
        optimizer.zero_grad(set_to_none=True)
        rows = sum(len(batch.images) for batch in micro_batches)
        results = []
        for batch in micro_batches:
            with runtime.autocast():
                result = objective(model, batch)
            scaler.scale(result.loss * (len(batch.images) / rows)).backward()
            results.append(result)
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
        return results

    return update
