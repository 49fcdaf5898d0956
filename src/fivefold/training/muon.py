"""Muon: steps of the same size in every direction of a layer's weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration that takes singular values from (0, 1] to about 1, steepest at 0 (Jordan et al. 2024)."""
ITERATIONS = 5
BETAS = (0.9, 0.95)
EPS = 1e-8


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, for the groups with `orthogonal`; AdamW for the other ones, at the same rate.

    W ← (1 - η·λ)·W - η·0.2·√max(m, n)·O, O the nearest semi-orthogonal matrix to the momentum of the
    weight as a matrix [m, n] = [out, the rest] (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers"). The factor gives the step AdamW's usual size, so that both share η and λ (Liu et al.
    2025, arXiv 2502.16982, equation 4).
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(groups), {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            steps = self._orthogonal if group["orthogonal"] else self._adam
            for parameter, step in zip(parameters, steps(parameters, group), strict=True):
                parameter.sub_(step, alpha=group["lr"])

    def _orthogonal(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        momenta = [self._state(parameter, "momentum") for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        return [_rows_back(orthogonalised(matrix := _as_matrix(each)) * _size(matrix), each) for each in ahead]

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """AdamW's step without its decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""
        first = [self._state(parameter, "first") for parameter in parameters]
        second = [self._state(parameter, "second") for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1 - BETAS[1])
        group["step"] = group.get("step", 0) + 1
        bias = [1 - beta ** group["step"] for beta in BETAS]
        scale = torch._foreach_add(torch._foreach_sqrt(torch._foreach_div(second, bias[1])), EPS)
        return torch._foreach_div(torch._foreach_div(first, bias[0]), scale)

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of matrix [m, n] = U·S·Vᵀ, by a Newton-Schulz iteration in bf16; singular values end in 0.7 to 1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    found = wide.bfloat16()
    found = found / (found.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = found @ found.t()
        mixed = torch.addmm(square, square, square, beta=b, alpha=c)
        found = torch.addmm(found, mixed, found, beta=a)
    found = found.to(matrix.dtype)
    return found if matrix.shape[0] <= matrix.shape[1] else found.t()


def hidden_weights(model: nn.Module) -> set[int]:
    """The `id`s of the weights that Muon is for: of the backbone's layers but its first, none of the head's.

    Depthwise convolutions and embeddings of positions are no matrices between features either.
    """
    layers = [m.weight for m in getattr(model, "backbone", model).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {id(weight) for weight in layers[1:] if weight.flatten(1).shape[1] > 1 and weight.shape[1] > 1}


def _as_matrix(weight: Tensor) -> Tensor:
    """The weight as [out, the rest], columns in the order of memory, which the result only shares: nothing is copied."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1)


def _rows_back(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix as by `_as_matrix` in the shape of its weight."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        out, inputs, height, width = weight.shape
        return matrix.view(out, height, width, inputs).permute(0, 3, 1, 2)
    return matrix.view_as(weight)


def _size(matrix: Tensor) -> float:
    return 0.2 * max(matrix.shape) ** 0.5
