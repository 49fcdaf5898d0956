"""Objectives: what is the loss of a batch? Each gives the loss, its named parts and the logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.training.losses import Loss


@dataclass(frozen=True)
class Rows:
    """A micro-batch on the device.

    `images` float [B, 3, H, W]; `targets` [B, C] probabilities, a row of zeros where there is no
    label; `teacher` [B, C] probabilities softened by the temperature, or None; `meta` [B, M] meta
    features, or None.
    """

    images: Tensor
    targets: Tensor
    teacher: Tensor | None = None
    meta: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network is called with."""
        return (self.images,) if self.meta is None else (self.images, self.meta)


@dataclass(frozen=True)
class Result:
    """`loss` scalar, its `parts` detached, `logits` [B, C] detached."""

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor


Objective = Callable[[nn.Module, Rows], Result]


def supervised(loss: Loss) -> Objective:
    """The loss of the logits against the targets."""

    def objective(model: nn.Module, rows: Rows) -> Result:
        logits = model(*rows.inputs).float()
        value = loss(logits, rows.targets)
        return Result(value, {}, logits.detach())

    return objective


def distill(loss: Loss, alpha: float, temperature: float) -> Objective:
    """α·T²·KL(teacher_T ‖ student_T) + (1 - α)·loss (Hinton et al. 2015, arXiv 1503.02531, section 2)."""

    def objective(model: nn.Module, rows: Rows) -> Result:
        if rows.teacher is None:
            raise ValueError("distillation needs the teacher's probabilities")
        logits = model(*rows.inputs).float()
        softened = (logits / temperature).log_softmax(dim=1)
        taught = F.kl_div(softened, rows.teacher, reduction="batchmean") * temperature**2
        labelled = loss(logits, rows.targets)
        parts = {"teacher": taught.detach(), "labels": labelled.detach()}
        return Result(alpha * taught + (1 - alpha) * labelled, parts, logits.detach())

    return objective
