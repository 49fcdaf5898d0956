"""Recipe to objects: the only place where settings and the parts meet."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.choose import choose
from fivefold.data.dataset import ImageSet, count_batches
from fivefold.data.folds import FoldTable
from fivefold.data.meta import count_numbers
from fivefold.data.sampling import SAMPLERS
from fivefold.data.store import ImageStore
from fivefold.data.transforms import build_transforms
from fivefold.errors import MissingInputError, SettingsError
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.inference.tta import build_views
from fivefold.machine import count_cores, keep_freed_memory
from fivefold.models.backbones import build_backbone, count_features
from fivefold.models.classifier import Classifier, Standardised
from fivefold.models.convolution import quicken
from fivefold.models.heads import build_head
from fivefold.models.norms import with_norms_of_all
from fivefold.models.weights import start_from
from fivefold.recipe import Model, Settings
from fivefold.replicas import BY_ITSELF, Replicas
from fivefold.training import memory
from fivefold.training.ema import Ema
from fivefold.training.freezing import Freezing
from fivefold.training.groups import learning_rates
from fivefold.training.loop import MONITORS, Duration, Loop, TrainRows, ValidRows
from fivefold.training.losses import Loss, balanced_weights, build_loss
from fivefold.training.mixing import MIXINGS, Mixing
from fivefold.training.objectives import Objective, by_labels, by_teacher, once, rdrop
from fivefold.training.optim import OPTIMIZER_STATES, Schedule, build_optimizer
from fivefold.training.resume import Stateful
from fivefold.training.teaching import Annealing, Cooling, lesson_plan
from fivefold.training.updates import UPDATES, build_scaler

log = logging.getLogger("fivefold")


def choose_device(name: str, key: str = "train.device") -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU; a device that is not there is a SettingsError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, has in there.items() if has)
    if not choose(there, "device", name.split(":")[0]):
        raise SettingsError(f"{key}={name}, but this machine has no such device; {key}=auto finds one")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for float32. `auto`: bf16 where the machine is fast in it, else fp16 on CUDA, else fp32."""
    if name == "auto":
        return _fast_type(device)
    dtype = choose(PRECISIONS, "precision", name)
    if dtype == torch.float16 and device.type != "cuda":
        raise SettingsError(f"train.precision=fp16 needs CUDA, and this runs on {device.type}; bf16 or fp32 will do")
    return dtype


def runtime_of(settings: Settings, replicas: Replicas = BY_ITSELF) -> Runtime:
    """The Runtime that the settings ask for on this machine, for training, alone or with others."""
    device = replicas.own_device(choose_device(settings.train.device))
    precision = replicas.shared(precision_name(choose_precision(settings.train.precision, device)))
    return _runtime(settings, device, PRECISIONS[precision], replicas)


def runtime_for_prediction(
    settings: Settings, precision: str, device: str = "auto", replicas: Replicas = BY_ITSELF
) -> Runtime:
    """The Runtime of a trained model wherever it predicts: this machine's device, and the `precision` it was trained in.

    fp16 where there is no CUDA becomes float32.
    """
    chosen = replicas.own_device(choose_device(device, "predict.device"))
    dtype = choose(PRECISIONS, "precision", precision)
    return _runtime(settings, chosen, None if dtype == torch.float16 and chosen.type != "cuda" else dtype, replicas)


def _runtime(settings: Settings, device: torch.device, dtype: torch.dtype | None, replicas: Replicas) -> Runtime:
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and settings.train.deterministic:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = settings.model
    return make_runtime(device, dtype, settings.train.channels_last, model.mean, model.std, replicas)


def build_classifier(model: Model, classes: int) -> Classifier:
    """The network of `[model]` with random weights, or those of its hub."""
    meta = count_numbers(model.meta)
    backbone = build_backbone(model.backbone, model.pretrained, model.options, model.drop_path)
    head = build_head(model.head, count_features(backbone, model.size) + meta, classes, model.dropout)
    return Classifier(backbone, head, Standardised(meta) if meta else None)


def start_weights(network: Classifier, model: Model, channel: Path | None) -> None:
    """Loads `model.weights` into the backbone: a path, or a name in the weights channel."""
    if not model.weights:
        return
    candidates = [Path(model.weights), *([channel / model.weights] if channel else [])]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise MissingInputError(
            f"model.weights={model.weights}: no such file, nor one of that name in SM_CHANNEL_WEIGHTS"
        )
    start_from(network.backbone, found)


def image_set(store: ImageStore, table: FoldTable, rows: np.ndarray, settings: Settings, training: bool) -> ImageSet:
    """The images of the given rows of the split, with the transforms of training or of evaluation."""
    return images_at(store, table.paths_of(rows), table.sha256_of(rows), settings, training)


def images_at(
    store: ImageStore, paths: Sequence[str], sha256: Sequence[str | None], settings: Settings, training: bool
) -> ImageSet:
    """The images at `paths`, checked against their digests; those to train on are kept in memory if they fit and the settings want it."""
    specs = settings.augment.train if training else settings.augment.eval
    transform = build_transforms(specs, settings.model.size, evaluation=not training)
    images = ImageSet(store, paths, transform, settings.seed, sha256, settings.model.meta)
    if training:
        images.read_once(settings.train.keep_in_memory)
    return images


def one_hot(codes: np.ndarray, classes: int, device: torch.device) -> Tensor:
    """Targets float [N, C]; a code of -1 gives a row of zeros: no label."""
    targets = torch.zeros(len(codes), classes, device=device)
    known = torch.from_numpy(np.flatnonzero(codes >= 0)).to(device)
    targets[known, torch.from_numpy(codes[codes >= 0].astype(np.int64)).to(device)] = 1.0
    return targets


def build_loop(
    label: str,
    network: Classifier,
    train: TrainRows,
    valid: ValidRows | None,
    settings: Settings,
    runtime: Runtime,
    select: bool,
    patience: int,
) -> Loop:
    """All parts of a training run; a teacher's probabilities in `train` make it a distillation."""
    _check_names(settings)
    seed_everything(settings.seed)
    chosen = settings.train
    loss = _loss(settings, train)
    if network.meta is not None:
        network.meta.fit(torch.from_numpy(train.images.measure()))
    model = runtime.place(_quickened(network, runtime))
    shares = learning_rates(network.backbone, chosen.backbone_lr, chosen.layer_decay)
    optimizer = build_optimizer(chosen.optimizer, model, chosen.lr, chosen.weight_decay, chosen.momentum, shares)
    ema = Ema(model, chosen.ema_decay) if chosen.ema_decay else None
    steps = -(-count_batches(len(train.images), chosen.batch_size) // chosen.accumulate)
    if chosen.schedule == "plateau" and not (select and valid):
        raise SettingsError("train.schedule=plateau needs validation scores to watch, and this run selects by none")
    schedule = Schedule(
        chosen.schedule, optimizer, steps * chosen.epochs, steps, chosen.warmup_epochs, chosen.step_epochs, chosen.gamma
    )
    raw = {"raw": model} if ema is None or chosen.keep_raw else {}
    update, scaler = choose(UPDATES, "update", chosen.update), build_scaler(runtime)
    after_step = [*([ema] if ema else []), schedule, *_phases(settings, network, train, steps)]
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    sampler = choose(SAMPLERS, "sampler", chosen.sampler)
    predicted, workers = predict_batch_size(settings), choose_workers(chosen.workers, runtime)
    duration = Duration(
        chosen.epochs, chosen.batch_size, predicted, chosen.accumulate, patience, settings.seed, workers
    )
    return Loop(
        label=label,
        model=model,
        contenders=({"ema": ema.model} if ema else {}) | raw,
        train=train,
        valid=valid,
        duration=duration,
        batches=partial(sampler, _codes(train.targets), chosen.batch_size, settings.seed),
        mixing=_mixing(settings),
        update=update(
            model, _objective(settings, loss, train), optimizer, runtime, chosen.clip, chosen.sam_rho, scaler
        ),
        after_step=after_step,
        schedule=schedule,
        loss=loss,
        monitor=chosen.monitor,
        select=select,
        runtime=runtime,
        parts=parts | {type(part).__name__: part for part in after_step},
    )


def check_memory(network: nn.Module, settings: Settings, runtime: Runtime) -> None:
    """Logs what a step will take; a SettingsError names a batch size that fits, when this one does not."""
    chosen = settings.train
    copies = 1 + choose(OPTIMIZER_STATES, "optimizer", chosen.optimizer)
    copies += (chosen.ema_decay > 0) + (chosen.update == "sam")
    meta = count_numbers(settings.model.meta)
    found = memory.estimate(runtime.place(network), settings.model.size, runtime, copies, meta)
    place, passes = runtime.replicas.place, 2 if chosen.rdrop_alpha else 1  # two passes: one batch of twice the rows
    found = replace(found, image=-(-passes * found.image // place.world))  # of a batch each process holds its part
    log.info(in_words(runtime))
    free = memory.available(runtime.device, place.local_world)
    log.info("memory: %s", memory.check_fits(found, settings.train.batch_size, free))


def seed_everything(seed: int) -> None:
    """Seeds what draws the weights, dropout and stochastic depth; samples have seeds of their own."""
    torch.manual_seed(seed)


def predict_batch_size(settings: Settings) -> int:
    return settings.predict.batch_size or 2 * settings.train.batch_size


def choose_workers(wanted: int, runtime: Runtime) -> int:
    """-1: none on a CPU, where they would take the cores from training; else up to eight, one a core of this process's part."""
    if wanted >= 0:
        return wanted
    return 0 if runtime.device.type == "cpu" else min(8, max(1, count_cores() // runtime.replicas.place.local_world))


def in_words(runtime: Runtime) -> str:
    """Device, precision and threads of a runtime, for the log."""
    return f"device {runtime.device}, precision {precision_name(runtime.dtype)}, {torch.get_num_threads()} threads"


def precision_name(dtype: torch.dtype | None) -> str:
    return next(name for name, value in PRECISIONS.items() if value == dtype)


def _check_names(settings: Settings) -> None:
    """Raises a SettingsError for a name that would be looked up only after an epoch, or after the last one."""
    choose(MONITORS, "monitor", settings.train.monitor)
    choose(MIXINGS, "mixing", settings.augment.mix)
    build_views(settings.predict.views)


def _loss(settings: Settings, train: TrainRows) -> Loss:
    weights = balanced_weights(train.targets) if settings.train.class_weights == "balanced" else None
    return build_loss(settings.train.loss, settings.train.label_smoothing, weights)


def _mixing(settings: Settings) -> Mixing:
    chosen, epochs = settings.augment, settings.train.epochs
    if choose(MIXINGS, "mixing", chosen.mix) and chosen.mix_off_epochs >= epochs:
        log.warning("augment.mix_off_epochs=%d of %d epochs: no image is mixed", chosen.mix_off_epochs, epochs)
    return Mixing(chosen.mix, chosen.mix_alpha, chosen.mix_p, epochs - chosen.mix_off_epochs)


def _objective(settings: Settings, loss: Loss, train: TrainRows) -> Objective:
    teacher, alpha = train.teacher, settings.train.rdrop_alpha
    if teacher is None:
        criterion = by_labels(loss)
    else:
        criterion = by_teacher(loss, lambda: teacher.alpha, lambda: teacher.temperature)
    return rdrop(criterion, alpha) if alpha else once(criterion)


def _phases(
    settings: Settings, network: Classifier, train: TrainRows, steps: int
) -> list[Freezing | Cooling | Annealing]:
    """What changes with the steps besides the learning rate; `steps` of an epoch."""
    epochs, first = settings.train.epochs, settings.train.freeze_epochs
    freezing = [Freezing(network.backbone, first * steps)] if first else []
    return [*freezing, *(lesson_plan(train.teacher, settings.distill, steps, epochs) if train.teacher else [])]


def _codes(targets: Tensor) -> np.ndarray:
    """The class of each row of targets [N, C], -1 where it has none."""
    return torch.where(targets.sum(dim=1) > 0, targets.argmax(dim=1), -1).cpu().numpy()


def _quickened(network: nn.Module, runtime: Runtime) -> nn.Module:
    """Small convolutions made faster to train, on the CPUs whose bf16 units make it pay; BatchNorm for several processes."""
    network = network if runtime.replicas.alone else with_norms_of_all(network, runtime.device)
    fast = runtime.device.type == "cpu" and runtime.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return quicken(network) if fast else network


def _fast_type(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return None


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
