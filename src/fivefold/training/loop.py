"""The training loop: epochs of updates, a validation after each, the best weights kept.

It knows no features: what is a loss is the objective's, what is a step the update's, and what
follows a step (averaging, the schedule) stands in `after_step`.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.choose import choose
from fivefold.data.dataset import Batch, ImageSet, Sample, in_order, load
from fivefold.errors import DataError, SettingsError
from fivefold.evaluation.metrics import summary
from fivefold.inference.predictor import Runtime, predict
from fivefold.progress import duration, track
from fivefold.training.losses import Loss
from fivefold.training.mixing import Mixing
from fivefold.training.objectives import Result, Rows
from fivefold.training.optim import Schedule
from fivefold.training.teaching import Teacher
from fivefold.training.updates import Update

log = logging.getLogger("fivefold")
STEPS_BETWEEN_CHECKS = 50
Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainRows:
    """`images` of N rows; `targets` [N, C] on the device; the `teacher` of the rows, or None."""

    images: ImageSet
    targets: Tensor
    teacher: Teacher | None = None


@dataclass(frozen=True)
class ValidRows:
    """`images` of N rows and their class indices `codes` [N]."""

    images: ImageSet
    codes: np.ndarray


@dataclass(frozen=True)
class Duration:
    """How long, in which portions, from which seed; `patience` 0 means all epochs."""

    epochs: int
    batch_size: int
    predict_batch_size: int
    accumulate: int
    patience: int
    seed: int
    workers: int


@dataclass
class Best:
    """The best epoch so far by one figure, and the weights of it."""

    monitor: str
    epoch: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> bool:
        """Keeps this epoch's weights if its score is better than all before; whether it is."""
        sign = choose(MONITORS, "monitor", self.monitor)
        if self.epoch and sign * scores[self.monitor] >= sign * self.scores[self.monitor]:
            return False
        self.keep(epoch, scores, model)
        return True

    def keep(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        self.epoch, self.scores = epoch, dict(scores)
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Loop:
    """All parts of a training run. `contenders` are the models that are scored: the first one decides.

    `batches`: the (epoch, row) pairs of an epoch's batches. `select`: keep each contender's best
    epoch; else the last one, whatever the scores.
    """

    label: str
    model: nn.Module
    contenders: Mapping[str, nn.Module]
    train: TrainRows
    valid: ValidRows | None
    duration: Duration
    batches: Callable[[int], list[list[Sample]]]
    mixing: Mixing
    update: Update
    after_step: Sequence[Callable[[], None]]
    schedule: Schedule
    loss: Loss
    monitor: str
    select: bool
    runtime: Runtime
    observers: Sequence[Observer]


def fit(loop: Loop) -> dict[str, Best]:
    """Trains to the end or until patience runs out; the best (or last) epoch of each contender.

    Raises DataError for a loss that is not finite, SettingsError for a batch that the device cannot hold.
    """
    try:
        return _epochs(loop)
    except torch.OutOfMemoryError as error:
        size, accumulate = loop.duration.batch_size, loop.duration.accumulate
        raise SettingsError(
            f"a batch of {size} images does not fit the memory of {loop.runtime.device}; "
            f"train.batch_size={max(1, size // 2)} train.accumulate={2 * accumulate} takes half and keeps the step's size"
        ) from error


def _epochs(loop: Loop) -> dict[str, Best]:
    best = {name: Best(loop.monitor) for name in loop.contenders}
    deciding = next(iter(loop.contenders))
    start, epochs = time.monotonic(), loop.duration.epochs
    for epoch in range(1, epochs + 1):
        lr = loop.schedule.lr
        row = {"epoch": epoch, **train_epoch(loop, epoch), "lr": lr}
        improved = _score(loop, epoch, best)
        row |= {f"val_{name}": value for name, value in improved.pop("scores", {}).items()}
        for observe in loop.observers:
            observe(row)
        left = (time.monotonic() - start) / epoch * (epochs - epoch)
        log.info("%s epoch %d/%d %s, %s left", loop.label, epoch, epochs, _figures(row), duration(left))
        loop.schedule.after_epoch(improved[deciding])
        if loop.duration.patience and epoch - best[deciding].epoch >= loop.duration.patience:
            log.info("%s stops: %s did not improve for %d epochs", loop.label, loop.monitor, loop.duration.patience)
            break
    return best


def train_epoch(loop: Loop, epoch: int) -> dict[str, float]:
    """One pass over the training rows; `train_loss`, `train_acc` (against the mixed targets, where images are mixed)."""
    plan = loop.duration
    batches = loop.batches(epoch)
    label = f"{loop.label} epoch {epoch}/{plan.epochs}"
    pin = loop.runtime.device.type == "cuda"
    micro = track(load(loop.train.images, batches, plan.workers, pin), len(batches), label)
    totals: list[Tensor] = []
    loop.model.train()
    step = 0
    while group := list(islice(micro, plan.accumulate)):
        rows = [_rows(loop, batch, epoch, (plan.seed, epoch, step, n)) for n, batch in enumerate(group)]
        totals += [_totals(result, part) for result, part in zip(loop.update(rows), rows, strict=True)]
        for call in loop.after_step:
            call()
        step += 1
        if step % STEPS_BETWEEN_CHECKS == 0:
            _check_finite(totals, epoch)
    _check_finite(totals, epoch)
    loss, right, rows_seen, mass = torch.stack(totals).cpu().double().sum(dim=0).tolist()
    return {"train_loss": loss / rows_seen, "train_acc": right / max(mass, 1e-12)}


def validate(model: nn.Module, rows: ValidRows, loop: Loop) -> dict[str, float]:
    """`loss`, `acc`, `logloss`, `f1_macro` of the plain view."""
    batches = in_order(len(rows.images), loop.duration.predict_batch_size)
    loaded = track(load(rows.images, batches, loop.duration.workers), len(batches), f"{loop.label} validation")
    log_probs = predict(model, loaded, loop.runtime, ["plain"])
    figures = summary(log_probs, rows.codes)
    targets = nn.functional.one_hot(torch.from_numpy(rows.codes).long(), log_probs.shape[1]).float()
    loss = float(loop.loss(torch.from_numpy(log_probs), targets))
    return {"loss": loss, "acc": figures["accuracy"], "logloss": figures["logloss"], "f1_macro": figures["f1_macro"]}


def _score(loop: Loop, epoch: int, best: Mapping[str, Best]) -> dict[str, Any]:
    """Whether each contender improved, and the deciding one's scores (none without validation rows)."""
    result: dict[str, Any] = {}
    for name, model in loop.contenders.items():
        scores = validate(model, loop.valid, loop) if loop.valid is not None else {}
        if loop.select and scores:
            result[name] = best[name].offer(epoch, scores, model)
        else:
            result[name] = True
            if epoch == loop.duration.epochs:
                best[name].keep(epoch, scores, model)
        result.setdefault("scores", scores)
    return result


def _rows(loop: Loop, batch: Batch, epoch: int, seed: tuple[int, ...]) -> Rows:
    at = batch.rows.to(loop.runtime.device, non_blocking=True)
    teacher = None if loop.train.teacher is None else loop.train.teacher[at]
    images, meta = loop.runtime.images(batch.images), loop.runtime.meta(batch.meta)
    return loop.mixing(Rows(images, loop.train.targets[at], teacher, meta), epoch, seed)


def _totals(result: Result, rows: Rows) -> Tensor:
    """[loss · rows, mass of the targets that the prediction hits, rows, mass], on the device, without waiting for it."""
    hit = rows.targets.gather(1, result.logits.argmax(dim=1, keepdim=True)).sum()
    count = torch.full_like(hit, len(rows.images))
    return torch.stack([result.loss.detach() * count, hit, count, rows.targets.sum()])


def _check_finite(totals: Sequence[Tensor], epoch: int) -> None:
    finite = torch.isfinite(torch.stack(list(totals))[:, 0])
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0]) + 1
        raise DataError(
            f"the loss is not finite at batch {step} of epoch {epoch}; a smaller train.lr, train.clip=1 or "
            "train.precision=fp32 may help, if the images and labels are sound"
        )


def _figures(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in row.items() if name not in ("epoch", "lr"))


MONITORS = {"loss": 1, "logloss": 1, "acc": -1, "f1_macro": -1}
"""Figures of the validation that may choose the best epoch: 1 where less is better, -1 where more is."""
