"""The training loop: epochs of updates, a validation after each, the best weights kept.

It knows no features: what is a loss is the objective's, what is a step the update's, and what
follows a step (averaging, the schedule) stands in `after_step`.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.choose import choose
from fivefold.data.ahead import ahead
from fivefold.data.dataset import Batch, ImageSet, Sample, derive_seed, load
from fivefold.data.prepared import Prepared
from fivefold.errors import DataError, SettingsError, StoppedError
from fivefold.evaluation.metrics import summary
from fivefold.inference.predictor import Runtime, only_logits, predict_all
from fivefold.progress import duration, track
from fivefold.training.losses import Loss
from fivefold.training.mixing import Mixing
from fivefold.training.objectives import Result, Rows
from fivefold.training.optim import Schedule
from fivefold.training.resume import Checkpoints, Stateful, captured, restore
from fivefold.training.teaching import Teacher
from fivefold.training.updates import Update

log = logging.getLogger("fivefold")
STEPS_BETWEEN_CHECKS = 50
MONITORS = {"loss": 1, "logloss": 1, "acc": -1, "f1_macro": -1}
"""Figures of the validation that may choose the best epoch: 1 where less is better, -1 where more is."""
Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainRows:
    """`images` of N rows; `targets` [N, C] on the device; the `teacher` of the rows, or None."""

    images: ImageSet
    targets: Tensor
    teacher: Teacher | None = None

    def batches(self, batches: list[list[Sample]], workers: int, device: torch.device) -> Iterator[Batch]:
        """The given batches; on CUDA they are there before the step that has them."""
        return ahead(load(self.images, batches, workers, pin=device.type == "cuda"), device)


@dataclass(frozen=True)
class ValidRows:
    """`images` of N rows and their class indices `codes` [N]."""

    images: ImageSet | Prepared
    codes: np.ndarray


@dataclass(frozen=True)
class Duration:
    """How long, in which portions, from which seed; `patience` 0 means all epochs.

    Every `validate_every`th epoch is validated, and the last one.
    """

    epochs: int
    batch_size: int
    predict_batch_size: int
    accumulate: int
    patience: int
    validate_every: int
    seed: int
    workers: int


@dataclass
class Best:
    """The best epoch so far by one figure, and the weights of it."""

    monitor: str
    epoch: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        """Keeps this epoch's weights if its score is better than all before."""
        sign = choose(MONITORS, "monitor", self.monitor)
        if not self.epoch or sign * scores[self.monitor] < sign * self.scores[self.monitor]:
            self.keep(epoch, scores, model)

    def keep(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        self.epoch, self.scores = epoch, dict(scores)
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass
class Throughput:
    """Images a second of each training pass that ran in this process: the loader included, the validation not.

    A pass that goes on from a checkpoint counts what it does itself.
    """

    passes: list[float] = field(default_factory=list)

    @contextmanager
    def of(self, images: int) -> Iterator[None]:
        """Times a pass over so many images; one that does not come to its end counts for nothing."""
        start = time.perf_counter()
        yield
        if images:
            self.passes.append(images / max(time.perf_counter() - start, 1e-9))

    def figures(self) -> dict[str, float]:
        """`images_per_second` for a stage's record: the median of the passes from the second on, since the first one warms up."""
        counted = self.passes[1:] or self.passes
        return {"images_per_second": round(statistics.median(counted), 2)} if counted else {}


@dataclass
class Progress:
    """How far a run is: the `epoch` that runs, its `step`s that are done with their `totals`, its first `lr`; `rows` of ended ones.

    `best` is by contender. The loop changes it between two steps alone, so that it can be kept at any time.
    """

    best: dict[str, Best]
    epoch: int = 1
    step: int = 0
    lr: float = 0.0
    totals: list[Tensor] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        kept = {name: {"epoch": b.epoch, "scores": dict(b.scores), "state": b.state} for name, b in self.best.items()}
        totals = torch.stack(self.totals).cpu() if self.totals else None
        reached = {"epoch": self.epoch, "step": self.step, "lr": self.lr}
        return {**reached, "totals": totals, "rows": self.rows, "best": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.lr, self.rows = (state[name] for name in ("epoch", "step", "lr", "rows"))
        self.totals = [] if state["totals"] is None else list(state["totals"])
        for name, kept in state["best"].items():
            self.best[name].epoch, self.best[name].scores, self.best[name].state = kept.values()


@dataclass(frozen=True)
class Loop:
    """All parts of a training run. `contenders` are the models that are scored: the first one decides.

    `batches`: the (epoch, row) pairs of an epoch's batches. `select`: keep each contender's best
    epoch; else the last one, whatever the scores. `parts` are all that have a state, which
    `checkpoints` keep. Of a run that goes on, `observers` are told of its earlier epochs anew,
    `announcers` not.
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
    parts: Mapping[str, Stateful] = field(default_factory=dict)
    checkpoints: Checkpoints | None = None
    observers: Sequence[Observer] = ()
    announcers: Sequence[Observer] = ()
    throughput: Throughput = field(default_factory=Throughput)


def fit(loop: Loop) -> dict[str, Best]:
    """Trains to the end or until patience runs out, from the newest checkpoint; the best (or last) epoch of each contender.

    Raises DataError for a loss that is not finite, SettingsError for a batch that the device cannot hold,
    and StoppedError, after a checkpoint, when the process was told to stop.
    """
    progress = _begun(loop)
    try:
        return _epochs(loop, progress)
    except StoppedError:
        _keep(loop, progress)
        raise
    except torch.OutOfMemoryError as error:
        size, accumulate = loop.duration.batch_size, loop.duration.accumulate
        raise SettingsError(
            f"a batch of {size} images does not fit the memory of {loop.runtime.device}; "
            f"train.batch_size={max(1, size // 2)} train.accumulate={2 * accumulate} takes half and keeps the step's size"
        ) from error


def _begun(loop: Loop) -> Progress:
    """Nothing done yet; or as far as the newest checkpoint that can be read, with all parts as they were then."""
    progress = Progress({name: Best(loop.monitor) for name in loop.contenders})
    loop.runtime.replicas.start_alike(loop.model)
    state = loop.runtime.replicas.shared(loop.checkpoints.load() if loop.checkpoints is not None else None)
    if state is not None:
        restore({**loop.parts, "progress": progress}, loop.runtime.device, state)
        progress.totals = [each.to(loop.runtime.device) for each in progress.totals]  # to stand with those of new steps
        log.info("%s goes on after step %d of epoch %d", loop.label, progress.step, progress.epoch)
        for row in progress.rows:
            for observe in loop.observers:
                observe(row)
    return progress


def _keep(loop: Loop, progress: Progress) -> None:
    if loop.checkpoints is not None:
        loop.checkpoints.save(captured({**loop.parts, "progress": progress}, loop.runtime.device))


def _epochs(loop: Loop, progress: Progress) -> dict[str, Best]:
    start, before, epochs = time.monotonic(), len(progress.rows), loop.duration.epochs
    while progress.epoch <= epochs and not _patience_is_out(loop, progress):
        epoch = progress.epoch
        if not progress.step:
            progress.lr = loop.schedule.lr
        row = {"epoch": epoch, **train_epoch(loop, progress), "lr": progress.lr}
        scores = _score(loop, epoch, progress.best) if _is_scored(loop, epoch) else {}
        row |= {f"val_{name}": value for name, value in scores.items()}
        for observe in (*loop.observers, *loop.announcers):
            observe(row)
        left = duration((time.monotonic() - start) / (epoch - before) * (epochs - epoch))
        speed = f"{loop.throughput.passes[-1]:.4g} images/s, " if loop.throughput.passes else ""
        log.info("%s epoch %d/%d %s, %s%s left", loop.label, epoch, epochs, _figures(row), speed, left)
        progress.rows.append(row)
        progress.epoch, progress.step, progress.totals = epoch + 1, 0, []
        _keep(loop, progress)
    return progress.best


def _is_scored(loop: Loop, epoch: int) -> bool:
    return epoch % loop.duration.validate_every == 0 or epoch == loop.duration.epochs


def _patience_is_out(loop: Loop, progress: Progress) -> bool:
    allowed, ended = loop.duration.patience, len(progress.rows)
    out = allowed > 0 and _is_scored(loop, ended) and ended - progress.best[next(iter(progress.best))].epoch >= allowed
    if out:
        log.info("%s stops: %s did not improve for %d epochs", loop.label, loop.monitor, allowed)
    return out


def train_epoch(loop: Loop, progress: Progress) -> dict[str, float]:
    """The rest of a pass over the training rows; its `train_loss`, `train_acc` (against the targets as images are mixed)."""
    batches = loop.batches(progress.epoch)[progress.step * loop.duration.accumulate :]
    with loop.throughput.of(sum(map(len, batches))):
        _steps(loop, progress, batches)
        _check_finite(progress.totals, progress.epoch)  # waits for a GPU to be done
    loss, right, rows_seen, mass = torch.stack(progress.totals).cpu().double().sum(dim=0).tolist()
    return {"train_loss": loss / rows_seen, "train_acc": right / max(mass, 1e-12)}


def _steps(loop: Loop, progress: Progress, batches: list[list[Sample]]) -> None:
    """The steps of the given batches, and what is to be done between two of them."""
    plan, epoch, runtime = loop.duration, progress.epoch, loop.runtime
    label = f"{loop.label} epoch {epoch}/{plan.epochs}"
    loaded = loop.train.batches(own_part(batches, runtime), plan.workers, runtime.device)
    micro = zip(track(loaded, len(batches), label), batches, strict=True)
    loop.model.train()
    while group := runtime.replicas.together(lambda: list(islice(micro, plan.accumulate))):
        at = (plan.seed, epoch, progress.step)
        seed_step(runtime, *at)
        rows = [
            rows_of(batch, samples, loop.train, loop.mixing, runtime, epoch, (*at, n))
            for n, (batch, samples) in enumerate(group)
        ]
        results = loop.update(rows)
        for call in loop.after_step:
            call()
        count = sum(len(part.targets) for part in rows)
        progress.totals += [_totals(result, part, count) for result, part in zip(results, rows, strict=True)]
        progress.step += 1
        if progress.step % STEPS_BETWEEN_CHECKS == 0:
            _check_finite(progress.totals, epoch)
        if loop.checkpoints is not None and loop.checkpoints.due():
            _keep(loop, progress)


def validate(model: nn.Module, rows: ValidRows, loop: Loop) -> dict[str, float]:
    """`loss`, `acc`, `logloss`, `f1_macro` of the plain view."""
    plan, label = loop.duration, f"{loop.label} validation"
    found = predict_all(
        model, rows.images, plan.predict_batch_size, plan.workers, loop.runtime, ["plain"], label, of_views=only_logits
    )
    logits = torch.from_numpy(found)
    figures = summary(loop.loss.scores(logits).log_softmax(dim=1).numpy(), rows.codes)
    targets = nn.functional.one_hot(torch.from_numpy(rows.codes).long(), logits.shape[1]).float()
    loss = float(loop.loss(logits, targets))
    names = {"acc": "accuracy", "logloss": "logloss", "f1_macro": "f1_macro"}
    found = {"loss": loss, **{name: float(figures[figure]) for name, figure in names.items()}}
    return loop.runtime.replicas.shared(found)  # one machine's rounding decides for all


def own_part(batches: Sequence[list[Sample]], runtime: Runtime) -> list[list[Sample]]:
    """Of each batch the samples that this process reads."""
    return [list(runtime.replicas.share(len(batch)).take(batch)) for batch in batches]


def rows_of(
    batch: Batch,
    samples: Sequence[Sample],
    train: TrainRows,
    mixing: Mixing,
    runtime: Runtime,
    epoch: int,
    seed: tuple[int, ...],
) -> Rows:
    """The rows on the device; `batch` is this process's part of the `samples`.

    What is mixed with what is decided for the whole batch, so the images of a partner that another
    process has read come from there.
    """
    share, device = runtime.replicas.share(len(samples)), runtime.device
    numbers = torch.tensor([row for _, row in samples]) if share.parted else batch.rows
    at = numbers.to(device, non_blocking=True)
    teacher = None if train.teacher is None else train.teacher[at]
    images, meta = runtime.images(batch.images), runtime.meta(batch.meta)
    rows = Rows(images, train.targets[at], teacher, meta, share.logits)
    if not share.parted:
        return mixing(rows, epoch, seed)

    def partners(order: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = share.take(order)
        others = share.whole(batch.images.to(device, non_blocking=True))[chosen]
        return runtime.images(others), None if meta is None else share.whole(meta)[chosen]

    return mixing(rows, epoch, seed, partners)


def seed_step(runtime: Runtime, *parts: int) -> None:
    """Has dropout and its like draw by (seed, epoch, step, rank) where several processes train together.

    So they draw differently, and a run that goes on draws what it would have drawn.
    """
    if not runtime.replicas.alone:
        torch.manual_seed(derive_seed(*parts, runtime.replicas.place.rank))


def _score(loop: Loop, epoch: int, best: Mapping[str, Best]) -> dict[str, float]:
    """The deciding contender's scores (none without validation rows); all contenders' epochs are kept as they deserve."""
    # all are scored before one is kept: stopped in between, the epoch is scored again as if it had not been
    scores = {name: validate(model, loop.valid, loop) if loop.valid else {} for name, model in loop.contenders.items()}
    for name, model in loop.contenders.items():
        if loop.select and scores[name]:
            best[name].offer(epoch, scores[name], model)
        elif epoch == loop.duration.epochs:
            best[name].keep(epoch, scores[name], model)
    return scores[next(iter(loop.contenders))]


def _totals(result: Result, rows: Rows, of_step: int) -> Tensor:
    """[part of the loss · rows `of_step`, mass of the targets that are hit, rows, mass], on the device, without waiting for it."""
    hit = rows.targets.gather(1, result.logits.argmax(dim=1, keepdim=True)).sum()
    count = torch.full_like(hit, len(rows.targets))
    return torch.stack([result.loss.detach() * of_step, hit, count, rows.targets.sum()])


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
