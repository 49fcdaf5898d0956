"""The training loop: train each epoch, validate, and keep the weights of the best epoch.

The loop does not depend on training options: the objective computes the loss, the update makes the optimiser step, and
`after_step` lists the callbacks that follow a step (weight averaging, the schedule).
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

from fivefold.data.pipeline.dataset import Batch, ImageSet, Sample, derive_seed, load
from fivefold.data.pipeline.eval_cache import Prepared
from fivefold.data.pipeline.prefetch import ahead
from fivefold.errors import DataError, SettingsError, StoppedError
from fivefold.evaluation.metrics import summary
from fivefold.inference.predictor import Runtime, only_logits, predict_all
from fivefold.lookup import choose
from fivefold.progress import duration, track
from fivefold.training.checkpoints import Checkpoints, Stateful, captured, restore
from fivefold.training.losses import Loss
from fivefold.training.mixing import Mixing
from fivefold.training.objectives import Result, Rows
from fivefold.training.optim import Schedule
from fivefold.training.steps import Update
from fivefold.training.teacher import Teacher

log = logging.getLogger("fivefold")
CHECK_INTERVAL_STEPS = 50
MONITORS = {"loss": 1, "logloss": 1, "acc": -1, "f1_macro": -1}
"""Validation metrics that can select the best epoch: 1 if lower is better, -1 if higher is better."""
Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainRows:
    """The N training rows: `images`; `targets` [N, C] on the device; the `teacher` of the rows, or None."""

    images: ImageSet
    targets: Tensor
    teacher: Teacher | None = None

    def batches(self, batches: list[list[Sample]], workers: int, device: torch.device) -> Iterator[Batch]:
        """Yield the given batches; on CUDA each is copied to the device before the step that uses it."""
        return ahead(load(self.images, batches, workers, pin=device.type == "cuda"), device)


@dataclass(frozen=True)
class ValidRows:
    """The N validation rows: `images` and class indices `codes` [N]."""

    images: ImageSet | Prepared
    codes: np.ndarray


@dataclass(frozen=True)
class Duration:
    """Length, batch sizes, seed and loader processes of a run; `patience` 0 trains all epochs.

    The loop validates every `validate_every`th epoch and the last one.
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
    """The best epoch so far by the metric `monitor`, with its scores and weights."""

    monitor: str
    epoch: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        """Keep this epoch's weights if its score is better than all before."""
        sign = choose(MONITORS, "monitor", self.monitor)
        if not self.epoch or sign * scores[self.monitor] < sign * self.scores[self.monitor]:
            self.keep(epoch, scores, model)

    def keep(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        self.epoch, self.scores = epoch, dict(scores)
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass
class Throughput:
    """Images per second of each training epoch in this process, with loading and without validation.

    A resumed epoch counts only the images that this process trained on.
    """

    passes: list[float] = field(default_factory=list)

    @contextmanager
    def of(self, images: int) -> Iterator[None]:
        """Time an epoch over so many `images`; an epoch that raises does not count."""
        start = time.perf_counter()
        yield
        if images:
            self.passes.append(images / max(time.perf_counter() - start, 1e-9))

    def figures(self) -> dict[str, float]:
        """Return `images_per_second` for the stage's record: the median without the first epoch, which warms up."""
        counted = self.passes[1:] or self.passes
        return {"images_per_second": round(statistics.median(counted), 2)} if counted else {}


@dataclass
class Progress:
    """Position of a run: the current `epoch`, its completed `step`s and their `totals`, its first `lr`; `rows` of ended epochs.

    `best` has one entry per contender. The loop changes it only between steps, so a checkpoint can save it at any time.
    """

    best: dict[str, Best]
    epoch: int = 1
    step: int = 0
    lr: float = 0.0
    totals: list[Tensor] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        best = {name: {"epoch": b.epoch, "scores": dict(b.scores), "state": b.state} for name, b in self.best.items()}
        totals = torch.stack(self.totals).cpu() if self.totals else None
        position = {"epoch": self.epoch, "step": self.step, "lr": self.lr}
        return {**position, "totals": totals, "rows": self.rows, "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.lr, self.rows = (state[name] for name in ("epoch", "step", "lr", "rows"))
        self.totals = [] if state["totals"] is None else list(state["totals"])
        for name, best in state["best"].items():
            self.best[name].epoch, self.best[name].scores, self.best[name].state = best.values()


@dataclass(frozen=True)
class Loop:
    """All components of a training run.

    `contenders`: the models to validate; the first one's scores are reported and decide early stopping. `batches`:
    function from an epoch to its batches of (epoch, row) pairs. `select`: keep each contender's best epoch, else the
    last one, whatever its scores. `parts`: the components with a state, which `checkpoints` save. When a run resumes,
    `observers` get the rows of its earlier epochs again; `announcers` do not.
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
    """Train from the newest checkpoint to the last epoch or until patience runs out; return each contender's best (or last) epoch.

    Raise a DataError if a loss is not finite, a SettingsError if a batch does not fit on the device, and a StoppedError,
    after saving a checkpoint, if the process received a signal to stop.
    """
    progress = _start_or_resume(loop)
    try:
        return _run_epochs(loop, progress)
    except StoppedError:
        _save_checkpoint(loop, progress)
        raise
    except torch.OutOfMemoryError as error:
        size, accumulate = loop.duration.batch_size, loop.duration.accumulate
        raise SettingsError(
            f"a batch of {size} images does not fit in the memory of {loop.runtime.device}; "
            f"train.batch_size={max(1, size // 2)} train.accumulate={2 * accumulate} needs half and keeps the step's size"
        ) from error


def _start_or_resume(loop: Loop) -> Progress:
    """Return the progress of a new run, or restore all parts and the progress from the newest readable checkpoint."""
    progress = Progress({name: Best(loop.monitor) for name in loop.contenders})
    loop.runtime.replicas.start_alike(loop.model)
    state = loop.runtime.replicas.shared(loop.checkpoints.load() if loop.checkpoints is not None else None)
    if state is not None:
        restore({**loop.parts, "progress": progress}, loop.runtime.device, state)
        progress.totals = [
            total.to(loop.runtime.device) for total in progress.totals
        ]  # new steps append device tensors
        log.info("%s resumes after step %d of epoch %d", loop.label, progress.step, progress.epoch)
        for row in progress.rows:
            for observe in loop.observers:
                observe(row)
    return progress


def _save_checkpoint(loop: Loop, progress: Progress) -> None:
    if loop.checkpoints is not None:
        loop.checkpoints.save(captured({**loop.parts, "progress": progress}, loop.runtime.device))


def _run_epochs(loop: Loop, progress: Progress) -> dict[str, Best]:
    start, before, epochs = time.monotonic(), len(progress.rows), loop.duration.epochs
    while progress.epoch <= epochs and not _patience_is_out(loop, progress):
        epoch = progress.epoch
        if not progress.step:
            progress.lr = loop.schedule.lr
        row = {"epoch": epoch, **train_epoch(loop, progress), "lr": progress.lr}
        scores = _validate_contenders(loop, epoch, progress.best) if _is_validated(loop, epoch) else {}
        row |= {f"val_{name}": value for name, value in scores.items()}
        for observe in (*loop.observers, *loop.announcers):
            observe(row)
        left = duration((time.monotonic() - start) / (epoch - before) * (epochs - epoch))
        speed = f"{loop.throughput.passes[-1]:.4g} images/s, " if loop.throughput.passes else ""
        log.info("%s epoch %d/%d %s, %s%s left", loop.label, epoch, epochs, _format_metrics(row), speed, left)
        progress.rows.append(row)
        progress.epoch, progress.step, progress.totals = epoch + 1, 0, []
        _save_checkpoint(loop, progress)
    return progress.best


def _is_validated(loop: Loop, epoch: int) -> bool:
    return epoch % loop.duration.validate_every == 0 or epoch == loop.duration.epochs


def _patience_is_out(loop: Loop, progress: Progress) -> bool:
    allowed, ended = loop.duration.patience, len(progress.rows)
    out = (
        allowed > 0 and _is_validated(loop, ended) and ended - progress.best[next(iter(progress.best))].epoch >= allowed
    )
    if out:
        log.info("%s stops: %s did not improve for %d epochs", loop.label, loop.monitor, allowed)
    return out


def train_epoch(loop: Loop, progress: Progress) -> dict[str, float]:
    """Train on the remaining batches of the epoch; return `train_loss` and `train_acc` (against the mixed targets)."""
    batches = loop.batches(progress.epoch)[progress.step * loop.duration.accumulate :]
    with loop.throughput.of(sum(map(len, batches))):
        _run_steps(loop, progress, batches)
        _check_finite(progress.totals, progress.epoch)  # waits for the GPU
    loss, right, rows_seen, mass = torch.stack(progress.totals).cpu().double().sum(dim=0).tolist()
    return {"train_loss": loss / rows_seen, "train_acc": right / max(mass, 1e-12)}


def _run_steps(loop: Loop, progress: Progress, batches: list[list[Sample]]) -> None:
    """Run the steps of the given batches, with checks and checkpoints between steps."""
    plan, epoch, runtime = loop.duration, progress.epoch, loop.runtime
    label = f"{loop.label} epoch {epoch}/{plan.epochs}"
    loaded = loop.train.batches(own_part(batches, runtime), plan.workers, runtime.device)
    micro = zip(track(loaded, len(batches), label), batches, strict=True)
    loop.model.train()
    while group := runtime.replicas.together(lambda: list(islice(micro, plan.accumulate))):
        step_seed = (plan.seed, epoch, progress.step)
        seed_step(runtime, *step_seed)
        rows = [
            rows_of(batch, samples, loop.train, loop.mixing, runtime, epoch, (*step_seed, n))
            for n, (batch, samples) in enumerate(group)
        ]
        results = loop.update(rows)
        for call in loop.after_step:
            call()
        count = sum(len(part.targets) for part in rows)
        progress.totals += [_totals(result, part, count) for result, part in zip(results, rows, strict=True)]
        progress.step += 1
        if progress.step % CHECK_INTERVAL_STEPS == 0:
            _check_finite(progress.totals, epoch)
        if loop.checkpoints is not None and loop.checkpoints.due():
            _save_checkpoint(loop, progress)


def validate(model: nn.Module, rows: ValidRows, loop: Loop) -> dict[str, float]:
    """Return `loss`, `acc`, `logloss` and `f1_macro` on the validation rows, without test-time augmentation."""
    plan, label = loop.duration, f"{loop.label} validation"
    outputs = predict_all(
        model, rows.images, plan.predict_batch_size, plan.workers, loop.runtime, ["plain"], label, of_views=only_logits
    )
    logits = torch.from_numpy(outputs)
    figures = summary(loop.loss.scores(logits).log_softmax(dim=1).numpy(), rows.codes)
    targets = nn.functional.one_hot(torch.from_numpy(rows.codes).long(), logits.shape[1]).float()
    loss = float(loop.loss(logits, targets))
    names = {"acc": "accuracy", "logloss": "logloss", "f1_macro": "f1_macro"}
    metrics = {"loss": loss, **{name: float(figures[figure]) for name, figure in names.items()}}
    return loop.runtime.replicas.shared(metrics)  # all ranks use the values of the first, since rounding differs


def own_part(batches: Sequence[list[Sample]], runtime: Runtime) -> list[list[Sample]]:
    """Return this rank's samples of each batch."""
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
    """Return the rows on the device, mixed; `batch` is this rank's part of the `samples`.

    Mixing partners are drawn for the whole batch, so a partner's image can come from another rank.
    """
    share, device = runtime.replicas.share(len(samples)), runtime.device
    numbers = torch.tensor([row for _, row in samples]) if share.parted else batch.rows
    index = numbers.to(device, non_blocking=True)
    teacher = None if train.teacher is None else train.teacher[index]
    images, meta = runtime.images(batch.images), runtime.meta(batch.meta)
    rows = Rows(images, train.targets[index], teacher, meta, share.logits)
    if not share.parted:
        return mixing(rows, epoch, seed)

    def partners(order: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = share.take(order)
        others = share.whole(batch.images.to(device, non_blocking=True))[chosen]
        return runtime.images(others), None if meta is None else share.whole(meta)[chosen]

    return mixing(rows, epoch, seed, partners)


def seed_step(runtime: Runtime, *parts: int) -> None:
    """Seed dropout and similar layers by (seed, epoch, step, rank) if several ranks train together.

    So every rank draws different numbers, and a resumed run draws the same numbers as an uninterrupted one.
    """
    if not runtime.replicas.alone:
        torch.manual_seed(derive_seed(*parts, runtime.replicas.place.rank))


def _validate_contenders(loop: Loop, epoch: int, best: Mapping[str, Best]) -> dict[str, float]:
    """Validate all contenders and keep their best epochs; return the first contender's scores (empty without validation rows)."""
    # Validate all contenders before keeping any: after a stop in between, a resumed run validates the epoch again.
    scores = {name: validate(model, loop.valid, loop) if loop.valid else {} for name, model in loop.contenders.items()}
    for name, model in loop.contenders.items():
        if loop.select and scores[name]:
            best[name].offer(epoch, scores[name], model)
        elif epoch == loop.duration.epochs:
            best[name].keep(epoch, scores[name], model)
    return scores[next(iter(loop.contenders))]


def _totals(result: Result, rows: Rows, of_step: int) -> Tensor:
    """Return [part of the loss · rows `of_step`, mass of the hit targets, rows, mass] on the device, without synchronising."""
    hit = rows.targets.gather(1, result.logits.argmax(dim=1, keepdim=True)).sum()
    count = torch.full_like(hit, len(rows.targets))
    return torch.stack([result.loss.detach() * of_step, hit, count, rows.targets.sum()])


def _check_finite(totals: Sequence[Tensor], epoch: int) -> None:
    finite = torch.isfinite(torch.stack(list(totals))[:, 0])
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0]) + 1
        raise DataError(
            f"the loss is not finite at batch {step} of epoch {epoch}; a smaller train.lr, train.clip=1 or "
            "train.precision=fp32 may help if the images and labels are correct"
        )


def _format_metrics(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in row.items() if name not in ("epoch", "lr"))
