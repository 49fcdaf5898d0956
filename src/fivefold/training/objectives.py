"""Objectives: what is the loss of a batch? Each gives the loss and the logits.

An objective is a criterion (what is said of logits) and a way to run the network: once, or twice
for R-Drop. So R-Drop joins labels and a teacher alike.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.models.classifier import LINKS, Classifier
from fivefold.training.losses import Loss
from fivefold.training.resume import random_state, set_random_state

log = logging.getLogger("fivefold")


@dataclass(frozen=True)
class Rows:
    """A micro-batch on the device.

    `images` float [B, 3, H, W]; `targets` [B, C] probabilities, a row of zeros where there is no
    label; `teacher` [B, C] probabilities softened by the temperature, or None; `meta` [B, M] meta
    features, or None; `step` the targets of all micro-batches of its step, which are one batch to the loss. Where several
    processes part the batch, `images` and `meta` are this one's rows, all else is the batch's, and `whole` makes its
    logits those of the batch.
    """

    images: Tensor
    targets: Tensor
    teacher: Tensor | None = None
    meta: Tensor | None = None
    whole: Callable[[Tensor], Tensor] = lambda logits: logits
    step: Sequence[Tensor] = ()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network is called with."""
        return (self.images,) if self.meta is None else (self.images, self.meta)

    def part(self, measure: Callable[[Tensor], Any]) -> Any:
        """This micro-batch's part of its step: of what `measure` says of the targets of all."""
        return measure(self.targets) / sum(map(measure, self.step)) if len(self.step) > 1 else 1.0


@dataclass(frozen=True)
class Result:
    """`loss` scalar, its part of the step's, which an update gives detached; `logits` [B, C], detached."""

    loss: Tensor
    logits: Tensor


Objective = Callable[[nn.Module, Rows], Result]
Criterion = Callable[[Tensor, Rows], Tensor]
"""Logits [B, C] and their rows to a scalar: their part of the mean over the step."""


def by_labels(loss: Loss) -> Criterion:
    """The loss of the logits against the targets."""
    return lambda logits, rows: loss(logits, rows.targets) * rows.part(loss.mass)


def by_teacher(loss: Loss, alpha: Callable[[], float], temperature: Callable[[], float]) -> Criterion:
    """α·T²·KL(teacher_T ‖ student_T) + (1 - α)·loss (Hinton et al. 2015, arXiv 1503.02531, section 2).

    `alpha` gives the weight of that moment, `temperature` the T that the rows' teacher is softened by then.
    """

    def criterion(logits: Tensor, rows: Rows) -> Tensor:
        if rows.teacher is None:
            raise ValueError("distillation needs the teacher's probabilities")
        heat = temperature()
        softened = (loss.scores(logits) / heat).log_softmax(dim=1)
        taught = F.kl_div(softened, rows.teacher, reduction="batchmean") * heat**2 * rows.part(len)
        return alpha() * taught + (1 - alpha()) * loss(logits, rows.targets) * rows.part(loss.mass)

    return criterion


def once(criterion: Criterion) -> Objective:
    """The criterion of one pass through the network."""

    def objective(model: nn.Module, rows: Rows) -> Result:
        logits = rows.whole(model(*rows.inputs).float())
        return Result(criterion(logits, rows), logits.detach())

    return objective


def rdrop(criterion: Criterion, weight: float, link: str = "softmax") -> Objective:
    """The mean criterion of two passes + weight · ½(KL(p‖q) + KL(q‖p)) (Liang et al. 2021, arXiv 2106.14448, section 2.1).

    Both passes are one batch of twice the rows. Where nothing in the backbone draws, it would give both the same
    features: it runs once, and they are doubled for the head, which is the same loss with the same gradients.
    BatchNorm counts a batch once either way, its variance in a backbone that runs once over B rows, not 2B.
    The first batch tells what draws. The paper adds to the sum of both losses, so its α is twice this weight.
    """
    twice: list[Callable[[nn.Module, Rows], Tensor]] = []

    def objective(model: nn.Module, rows: Rows) -> Result:
        if not twice:
            twice.append(_cheapest_form(model, rows))
        first, second = (rows.whole(half) for half in twice[0](model, rows).float().chunk(2))
        mean = (criterion(first, rows) + criterion(second, rows)) / 2
        apart = divergence(LINKS[link](first), LINKS[link](second)) * rows.part(len)
        return Result(mean + weight * apart, first.detach())

    return objective


def whole_twice(model: nn.Module, rows: Rows) -> Tensor:
    """Logits [2B, C] of two passes through all of the network, as one batch of twice the rows."""
    return model(*[torch.cat([each, each]) for each in rows.inputs])


def head_twice(model: Classifier, rows: Rows) -> Tensor:
    """Logits [2B, C] of one pass through the backbone and two through the head."""
    features = model.features(*rows.inputs)
    return model.head(torch.cat([features, features]))


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """½(KL(p‖q) + KL(q‖p)) of what softmax makes two predictions of, [B, C], mean over the rows."""
    log_p, log_q = first.log_softmax(dim=1), second.log_softmax(dim=1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean() / 2


@torch.no_grad()
def draws(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether the module draws from the generators when it runs in training, by running it.

    Its buffers, its mode and the random state are as before. Waits for the device.
    """
    device, training = inputs[0].device, [(part, part.training) for part in module.modules()]
    before, buffers = random_state(device), [buffer.clone() for buffer in module.buffers()]
    module.train()(*inputs)
    drew = not all(torch.equal(one, other) for one, other in zip(before, random_state(device), strict=True))
    set_random_state(device, before)
    for buffer, kept in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(kept)
    for part, was in training:
        part.training = was
    return drew


def _cheapest_form(model: nn.Module, rows: Rows) -> Callable[[nn.Module, Rows], Tensor]:
    """The cheapest way to two passes that is exact for this network; warns where they would be equal."""
    few = [torch.cat([each[:1], each[:1]]) for each in rows.inputs]  # two rows, for BatchNorm
    if not draws(model, *few):
        log.warning(
            "train.rdrop_alpha compares two passes of each image, but this network has no active dropout or "
            "stochastic depth, so they are equal and cost time for nothing; set model.dropout or model.drop_path above "
            "0, or train.rdrop_alpha=0"
        )
    if isinstance(model, Classifier) and not draws(model.backbone, few[0]):
        log.info("R-Drop: all that draws stands in the head, so the backbone runs once for both passes")
        return head_twice
    return whole_twice
