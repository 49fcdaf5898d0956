"""Objectives: functions from a batch to its loss and logits; the teacher of a distillation.

An objective combines a criterion (a loss of logits) with a way to run the network: once, or twice for R-Drop.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.log import log
from fivefold.models.classifier import LINKS, Classifier
from fivefold.training.checkpoints import random_state, set_random_state
from fivefold.training.losses import Loss


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on the device.

    `images` float [B, 3, H, W]; `targets` [B, C] probabilities, a row of zeros if there is no label; `teacher` [B, C]
    probabilities softened by the temperature, or None; `meta` [B, M] meta features, or None; `step` the targets of all
    micro-batches of its step, which the loss treats as one batch. If several ranks share the batch, `images` and `meta`
    are this rank's rows, all other fields cover the whole batch, and `gather` gathers the logits of all ranks.
    """

    images: Tensor
    targets: Tensor
    teacher: Tensor | None = None
    meta: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = lambda logits: logits
    step: Sequence[Tensor] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Return the arguments of the network."""
        return (self.images,) if self.meta is None else (self.images, self.meta)

    def fraction(self, measure: Callable[[Tensor], Any]) -> Any:
        """Return this micro-batch's fraction of its step's total `measure` of the targets."""
        return measure(self.targets) / sum(map(measure, self.step)) if len(self.step) > 1 else 1.0


@dataclass(frozen=True)
class Result:
    """`loss`: scalar, this micro-batch's part of the step's loss, detached after an update; `logits` [B, C], detached."""

    loss: Tensor
    logits: Tensor


Objective = Callable[[nn.Module, MicroBatch], Result]
Criterion = Callable[[Tensor, MicroBatch], Tensor]
"""Maps logits [B, C] and their rows to a scalar: their part of the mean over the step."""


def label_loss(loss: Loss) -> Criterion:
    """Return the criterion that compares logits with targets."""
    return lambda logits, rows: loss(logits, rows.targets) * rows.fraction(loss.mass)


def distillation_loss(loss: Loss, alpha: Callable[[], float], temperature: Callable[[], float]) -> Criterion:
    """α·T²·KL(teacher_T ‖ student_T) + (1 - α)·loss (Hinton et al. 2015, arXiv 1503.02531, section 2).

    `alpha` returns the current weight, `temperature` the T that currently softens the rows' teacher.
    """

    def criterion(logits: Tensor, rows: MicroBatch) -> Tensor:
        softened = (loss.scores(logits) / temperature()).log_softmax(dim=1)
        distillation = F.kl_div(softened, rows.teacher, reduction="batchmean") * temperature() ** 2 * rows.fraction(len)
        return alpha() * distillation + (1 - alpha()) * loss(logits, rows.targets) * rows.fraction(loss.mass)

    return criterion


def single_pass(criterion: Criterion) -> Objective:
    """Return the objective that applies the criterion to one pass through the network."""

    def objective(model: nn.Module, rows: MicroBatch) -> Result:
        logits = rows.gather(model(*rows.inputs).float())
        return Result(criterion(logits, rows), logits.detach())

    return objective


def rdrop(criterion: Criterion, weight: float, link: str = "softmax") -> Objective:
    """The mean criterion of two passes + weight · ½(KL(p‖q) + KL(q‖p)) (Liang et al. 2021, arXiv 2106.14448, section 2.1).

    Both passes run as one batch of twice the rows. A deterministic backbone runs once, and its features are duplicated
    for the head, with the same loss and gradients; the variance of its BatchNorms is then over B rows, not 2B. The first
    batch shows which parts are random. The paper adds to the sum of both losses, so its α is twice this weight.
    """
    backbone_runs_once: list[bool] = []

    def objective(model: nn.Module, rows: MicroBatch) -> Result:
        if not backbone_runs_once:
            backbone_runs_once.append(_is_only_head_stochastic(model, rows))
        if backbone_runs_once[0]:
            features = model.features(*rows.inputs)
            logits = model.head(torch.cat([features, features]))
        else:
            logits = model(*[torch.cat([values, values]) for values in rows.inputs])
        first, second = (rows.gather(half) for half in logits.float().chunk(2))
        mean = (criterion(first, rows) + criterion(second, rows)) / 2
        log_p, log_q = (LINKS[link](logits).log_softmax(dim=1) for logits in (first, second))
        divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean() / 2
        return Result(mean + weight * (divergence * rows.fraction(len)), first.detach())

    return objective


@torch.no_grad()
def is_stochastic(module: nn.Module, *inputs: Tensor) -> bool:
    """Run a copy of the module in training mode and return whether it used the random generators.

    The random state is restored. Synchronises with the device.
    """
    device = inputs[0].device
    before = random_state(device)
    copy.deepcopy(module).train()(*inputs)
    is_random = not all(map(torch.equal, before, random_state(device)))
    set_random_state(device, before)
    return is_random


def _is_only_head_stochastic(model: nn.Module, rows: MicroBatch) -> bool:
    """Return whether one pass through the backbone is enough for two exact passes; warn if both would be equal."""
    few = [torch.cat([values[:1], values[:1]]) for values in rows.inputs]  # two rows, for BatchNorm
    if not is_stochastic(model, *few):
        log.warning(
            "train.rdrop_alpha compares two passes of each image, but this network has no active dropout or "
            "stochastic depth, so both passes are equal and R-Drop only costs time; set model.dropout or "
            "model.drop_path above 0, or train.rdrop_alpha=0"
        )
    runs_once = isinstance(model, Classifier) and not is_stochastic(model.backbone, few[0])
    if runs_once:
        log.info("R-Drop: only the head is random, so the backbone runs once for both passes")
    return runs_once


class Teacher:
    """The teacher's log-probabilities [N, C] of N rows; `teacher[rows]` returns softened probabilities [B, C].

    `temperature`: T of the current epoch. `alpha`: weight of the distillation loss at the current step.
    """

    def __init__(self, log_probs: np.ndarray, alpha: float, temperature: float, device: torch.device) -> None:
        self.log_probs, self.alpha, self.device = log_probs, alpha, device
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature and soften all rows with it."""
        self.temperature = temperature
        self._probs = torch.from_numpy(soften(self.log_probs, temperature)).to(self.device)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._probs[rows]


class DistillSchedule:
    """Schedule of a teacher's temperature and alpha. Call it after each step.

    In epoch e = 0, 1, … T = max(end, start · decay^e). Validation uses the labels at T = 1, so its epochs are comparable.
    alpha falls linearly to 0 over the first `falling` steps (0: constant): soft targets first, labels at the end (Clark et
    al. 2019, "BAM! Born-again multi-task networks", arXiv 1907.04829, section 3.2, whose λ is 1 - alpha).
    """

    def __init__(self, teacher: Teacher, steps_per_epoch: int, decay: float, end: float, falling: int = 0) -> None:
        self.teacher, self.alpha, self.start = teacher, teacher.alpha, teacher.temperature
        self.steps_per_epoch, self.decay, self.end, self.falling = steps_per_epoch, decay, min(end, self.start), falling
        self.step = 0

    def __call__(self) -> None:
        self.load_state_dict({"step": self.step + 1})

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
        temperature = max(self.end, self.start * self.decay ** (self.step // self.steps_per_epoch))
        if temperature != self.teacher.temperature:
            self.teacher.set_temperature(temperature)
        if self.falling:
            self.teacher.alpha = self.alpha * max(0.0, 1 - self.step / self.falling)


def soften(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log p / T), float32 [N, C] (Hinton et al. 2015, arXiv 1503.02531, equation 1)."""
    return torch.from_numpy(log_probs).double().div(temperature).softmax(dim=1).float().numpy()
