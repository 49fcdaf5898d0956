"""The training loop: train each epoch, validate, and keep the weights of the best epoch.

The loop does not depend on training options: the objective computes the loss, the update makes the optimiser step, and
`after_step` lists the callbacks that follow a step (weight averaging, the schedule).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.data.pipeline.dataset import Batch, ImageDataset, Sample, derive_seed, load_batches
from fivefold.data.pipeline.eval_cache import EvalImageCache
from fivefold.data.pipeline.loader import prefetch_to_device
from fivefold.errors import DataError, SettingsError, StoppedError
from fivefold.evaluation.metrics import compute_metrics
from fivefold.inference.predictor import Runtime, predict_all
from fivefold.log import log
from fivefold.progress import format_duration, track
from fivefold.training.checkpoints import Checkpoints, Stateful, collect_state, restore
from fivefold.training.losses import Loss
from fivefold.training.mixing import Mixing
from fivefold.training.objectives import MicroBatch, Result, Teacher
from fivefold.training.optim import Schedule
from fivefold.training.steps import Update
from fivefold.training.time_limit import TimeLimit

CHECK_INTERVAL_STEPS = 50
MONITORS = {"loss": 1, "logloss": 1, "acc": -1, "f1_macro": -1}
"""Validation metrics that can select the best epoch: 1 if lower is better, -1 if higher is better."""
Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainData:
    """The N training rows: `images`; `targets` [N, C] on the device; the `teacher` of the rows, or None; their `groups` [N], or None."""

    images: ImageDataset
    targets: Tensor
    teacher: Teacher | None = None
    groups: np.ndarray | None = None


@dataclass(frozen=True)
class ValidData:
    """The N validation rows: `images` and class indices `codes` [N]."""

    images: ImageDataset | EvalImageCache
    codes: np.ndarray


@dataclass(frozen=True)
class LoopConfig:
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
class BestCheckpoint:
    """The best epoch so far by the metric `monitor`, with its scores and weights."""

    monitor: str
    epoch: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

    def update(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        """Keep this epoch's weights if its score is better than all before."""
        sign = MONITORS[self.monitor]
        if not self.epoch or sign * scores[self.monitor] < sign * self.scores[self.monitor]:
            self.store(epoch, scores, model)

    def store(self, epoch: int, scores: Mapping[str, float], model: nn.Module) -> None:
        self.epoch, self.scores = epoch, dict(scores)
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass
class TrainState:
    """Position of a run: the current `epoch`, its completed `step`s and their `totals`, its first `lr`; `rows` of ended epochs.

    `best` has one entry per contender. The loop changes it only between steps, so a checkpoint can save it at any time.
    """

    best: dict[str, BestCheckpoint]
    epoch: int = 1
    step: int = 0
    lr: float = 0.0
    totals: list[Tensor] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        totals = torch.stack(self.totals).cpu() if self.totals else None
        return {**vars(self), "totals": totals, "best": {name: vars(best) for name, best in self.best.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.lr, self.rows = (state[name] for name in ("epoch", "step", "lr", "rows"))
        self.totals = [] if state["totals"] is None else list(state["totals"])
        self.best = {name: BestCheckpoint(**best) for name, best in state["best"].items()}


@dataclass(frozen=True)
class Trainer:
    """All components of a training run.

    `scored_models`: the models to validate; the first one's scores are reported and decide early stopping. `batches`:
    function from an epoch to its batches of (epoch, row) pairs. `select`: keep each contender's best epoch, else the
    last one, whatever its scores. `components`: the components with a state, which `checkpoints` save. When a run resumes,
    `observers` get the rows of its earlier epochs again; `live_observers` do not. `limit` ends the run, in the middle of an epoch too. `speeds`: images per second of each
    epoch trained by this process, with loading and without validation.
    """

    label: str
    model: nn.Module
    scored_models: Mapping[str, nn.Module]
    train: TrainData
    valid: ValidData | None
    config: LoopConfig
    batches: Callable[[int], list[list[Sample]]]
    mixing: Mixing
    update: Update
    after_step: Sequence[Callable[[], None]]
    schedule: Schedule
    loss: Loss
    monitor: str
    select: bool
    runtime: Runtime
    components: Mapping[str, Stateful] = field(default_factory=dict)
    limit: TimeLimit = field(default_factory=TimeLimit)
    checkpoints: Checkpoints | None = None
    observers: Sequence[Observer] = ()
    live_observers: Sequence[Observer] = ()
    speeds: list[float] = field(default_factory=list)

    def speed_metrics(self) -> dict[str, float]:
        """Return `images_per_second` for the stage's record: the median without the first epoch, which warms up."""
        return {"images_per_second": round(statistics.median(self.speeds[1:] or self.speeds), 2)} if self.speeds else {}


def fit(trainer: Trainer) -> dict[str, BestCheckpoint]:
    """Train from the newest checkpoint to the last epoch or until patience runs out; return each contender's best (or last) epoch.

    Raise a DataError if a loss is not finite, a SettingsError if a batch does not fit on the device, and a StoppedError,
    after saving a checkpoint, if the process received a signal to stop.
    """
    progress = _start_or_resume(trainer)
    try:
        return _run_epochs(trainer, progress)
    except StoppedError:
        _save_checkpoint(trainer, progress)
        raise
    except torch.OutOfMemoryError as error:
        size, accumulate = trainer.config.batch_size, trainer.config.accumulate
        raise SettingsError(
            f"a batch of {size} images does not fit in the memory of {trainer.runtime.device}; "
            f"train.batch_size={max(1, size // 2)} train.grad_accum_steps={2 * accumulate} needs half and keeps the step's size"
        ) from error


def _start_or_resume(trainer: Trainer) -> TrainState:
    """Return the progress of a new run, or restore all parts and the progress from the newest readable checkpoint."""
    progress = TrainState({name: BestCheckpoint(trainer.monitor) for name in trainer.scored_models})
    process_group, device = trainer.runtime.process_group, trainer.runtime.device
    process_group.broadcast_weights(trainer.model)
    state = process_group.broadcast(trainer.checkpoints.load() if trainer.checkpoints else None)
    if state is not None:
        restore({**trainer.components, "progress": progress}, device, state)
        progress.totals = [total.to(device) for total in progress.totals]  # new steps append device tensors
        log.info("%s resumes after step %d of epoch %d", trainer.label, progress.step, progress.epoch)
        for row in progress.rows:
            for observe in trainer.observers:
                observe(row)
    return progress


def _save_checkpoint(trainer: Trainer, progress: TrainState) -> None:
    if trainer.checkpoints:
        trainer.checkpoints.save(collect_state({**trainer.components, "progress": progress}, trainer.runtime.device))


def _run_epochs(trainer: Trainer, progress: TrainState) -> dict[str, BestCheckpoint]:
    start, before, epochs, last = time.monotonic(), len(progress.rows), trainer.config.epochs, False
    while not (last or progress.epoch > epochs or _patience_is_out(trainer, progress)):
        epoch = progress.epoch
        if not progress.step:
            progress.lr = trainer.schedule.lr
        row = {"epoch": epoch, **train_epoch(trainer, progress), "lr": progress.lr}
        last = epoch == epochs or trainer.limit.progress >= 1
        if last and epoch < epochs:
            log.info("%s ends in epoch %d of %d: its time is over", trainer.label, epoch, epochs)
        scores = _validate_contenders(trainer, progress, last) if last or _is_validated(trainer, epoch) else {}
        row |= {f"val_{name}": value for name, value in scores.items()}
        for observe in (*trainer.observers, *trainer.live_observers):
            observe(row)
        left = format_duration((time.monotonic() - start) / (epoch - before) * (epochs - epoch))
        speed = f"{trainer.speeds[-1]:.4g} images/s, " if trainer.speeds else ""
        metrics = " ".join(f"{name}={value:.4g}" for name, value in row.items() if name not in ("epoch", "lr"))
        log.info("%s epoch %d/%d %s, %s%s left", trainer.label, epoch, epochs, metrics, speed, left)
        progress.rows.append(row)
        progress.epoch, progress.step, progress.totals = epoch + 1, 0, []
        _save_checkpoint(trainer, progress)
    return progress.best


def _is_validated(trainer: Trainer, epoch: int) -> bool:
    return epoch % trainer.config.validate_every == 0 or epoch == trainer.config.epochs


def _patience_is_out(trainer: Trainer, progress: TrainState) -> bool:
    allowed, ended = trainer.config.patience, len(progress.rows)
    waited = ended - next(iter(progress.best.values())).epoch
    out = 0 < allowed <= waited and _is_validated(trainer, ended)
    if out:
        log.info("%s stops: %s did not improve for %d epochs", trainer.label, trainer.monitor, allowed)
    return out


def train_epoch(trainer: Trainer, progress: TrainState) -> dict[str, float]:
    """Train on the remaining batches of the epoch; return `train_loss` and `train_acc` (against the mixed targets)."""
    batches = trainer.batches(progress.epoch)[progress.step * trainer.config.accumulate :]
    start, before = time.perf_counter(), progress.step
    _run_steps(trainer, progress, batches)
    _check_finite(progress.totals, progress.epoch)  # waits for the GPU
    if batches:
        trained = batches[: (progress.step - before) * trainer.config.accumulate]
        trainer.speeds.append(sum(map(len, trained)) / (time.perf_counter() - start))
    loss, right, rows_seen, mass = torch.stack(progress.totals).cpu().double().sum(dim=0).tolist()
    return {"train_loss": loss / rows_seen, "train_acc": right / max(mass, 1e-12)}


def _run_steps(trainer: Trainer, progress: TrainState, batches: list[list[Sample]]) -> None:
    """Run the steps of the given batches, with checks and checkpoints between steps."""
    plan, epoch, runtime = trainer.config, progress.epoch, trainer.runtime
    label = f"{trainer.label} epoch {epoch}/{plan.epochs}"
    shards = [list(runtime.process_group.shard(len(batch)).take(batch)) for batch in batches]
    loaded = load_batches(trainer.train.images, shards, plan.workers, pin=runtime.device.type == "cuda")
    prefetched = prefetch_to_device(loaded, runtime.device)
    micro = zip(track(prefetched, len(batches), label), batches, strict=True)
    trainer.model.train()
    while group := runtime.process_group.run_collectively(lambda: list(islice(micro, plan.accumulate))):
        step_seed = (plan.seed, epoch, progress.step)
        if not runtime.process_group.is_single:  # each rank draws its own numbers for dropout, again if it resumes
            torch.manual_seed(derive_seed(*step_seed, runtime.process_group.rank.index))
        rows = [
            to_micro_batch(trainer, batch, samples, epoch, (*step_seed, n)) for n, (batch, samples) in enumerate(group)
        ]
        results = trainer.update(rows)
        for call in trainer.after_step:
            call()
        count = sum(len(part.targets) for part in rows)
        trainer.limit.count(count)
        progress.totals += [_totals(result, part, count) for result, part in zip(results, rows, strict=True)]
        progress.step += 1
        if progress.step % CHECK_INTERVAL_STEPS == 0:
            _check_finite(progress.totals, epoch)
        if trainer.checkpoints and trainer.checkpoints.due():
            _save_checkpoint(trainer, progress)
        if trainer.limit.progress >= 1:
            return


def validate(model: nn.Module, rows: ValidData, trainer: Trainer) -> dict[str, float]:
    """Return `loss`, `acc`, `logloss` and `f1_macro` on the validation rows, without test-time augmentation."""
    size, workers, label = trainer.config.predict_batch_size, trainer.config.workers, f"{trainer.label} validation"
    logits = torch.from_numpy(
        predict_all(model, rows.images, size, workers, trainer.runtime, ["plain"], label, reduce_views=itemgetter(0))
    )
    # the first rank's, because rounding differs
    return trainer.runtime.process_group.broadcast(score_logits(logits, rows.codes, trainer.loss))


def score_logits(logits: Tensor, codes: np.ndarray, loss: Loss) -> dict[str, float]:
    """Return `loss`, `acc`, `logloss` and `f1_macro` of logits [N, C] against class indices [N]."""
    figures = compute_metrics(loss.scores(logits).log_softmax(dim=1).numpy(), codes)
    targets = nn.functional.one_hot(torch.from_numpy(codes).long(), logits.shape[1]).float()
    metrics = {"loss": float(loss(logits, targets)), "acc": float(figures["accuracy"])}
    return metrics | {name: float(figures[name]) for name in ("logloss", "f1_macro")}


def to_micro_batch(
    trainer: Trainer, batch: Batch, samples: Sequence[Sample], epoch: int, seed: tuple[int, ...]
) -> MicroBatch:
    """Return the rows on the device, mixed; `batch` is this rank's part of the `samples`.

    Mixing partners are drawn for the whole batch, so a partner's image can come from another rank.
    """
    train, runtime, device = trainer.train, trainer.runtime, trainer.runtime.device
    shard = runtime.process_group.shard(len(samples))
    numbers = torch.tensor([row for _, row in samples]) if shard.is_sharded else batch.rows
    index = numbers.to(device, non_blocking=True)
    teacher = None if train.teacher is None else train.teacher[index]
    images, meta = runtime.images(batch.images), runtime.meta(batch.meta)
    rows = MicroBatch(images, train.targets[index], teacher, meta, shard.all_gather_logits)
    if not shard.is_sharded:
        return trainer.mixing(rows, epoch, seed)

    def partners(order: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = shard.take(order)
        others = shard.all_gather(batch.images.to(device, non_blocking=True))[chosen]
        return runtime.images(others), None if meta is None else shard.all_gather(meta)[chosen]

    return trainer.mixing(rows, epoch, seed, partners)


def _validate_contenders(trainer: Trainer, progress: TrainState, last: bool) -> dict[str, float]:
    """Validate all contenders and keep their best epochs; return the first contender's scores (empty without validation rows).

    `last`: no epoch follows.
    """
    # Validate all contenders before keeping any: after a stop in between, a resumed run validates the epoch again.
    scores = {
        name: validate(model, trainer.valid, trainer) if trainer.valid else {}
        for name, model in trainer.scored_models.items()
    }
    for name, model in trainer.scored_models.items():
        if trainer.select and scores[name]:
            progress.best[name].update(progress.epoch, scores[name], model)
        elif last:
            progress.best[name].store(progress.epoch, scores[name], model)
    return scores[next(iter(trainer.scored_models))]


def _totals(result: Result, rows: MicroBatch, of_step: int) -> Tensor:
    """Return [part of the loss · rows `of_step`, mass of the hit targets, rows, mass] on the device, without synchronising."""
    hit = rows.targets.gather(1, result.logits.argmax(dim=1, keepdim=True)).sum()
    count = torch.full_like(hit, len(rows.targets))
    return torch.stack([result.loss.detach() * of_step, hit, count, rows.targets.sum()])


def _check_finite(totals: Sequence[Tensor], epoch: int) -> None:
    finite = torch.isfinite(torch.stack(list(totals))[:, 0])
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0]) + 1
        raise DataError(
            f"the loss is not finite at batch {step} of epoch {epoch}; a smaller train.lr, train.max_grad_norm=1 or "
            "train.precision=fp32 may help if the images and labels are correct"
        )
