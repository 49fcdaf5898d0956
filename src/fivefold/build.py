"""Build objects from settings: network, datasets, training loop. Lower layers do not read settings."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.config.schema import Model, Settings
from fivefold.data.image_io import decode_options
from fivefold.data.pipeline.dataset import ImageDataset, batches_in_shared_memory, count_batches, count_stats
from fivefold.data.pipeline.loader import SAMPLERS
from fivefold.data.readers.stores import ImageStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.transforms.registry import Transform, build_transforms
from fivefold.distributed.process_group import convert_sync_batchnorm
from fivefold.errors import MissingInputError, SettingsError
from fivefold.execution import PRECISIONS, RUNTIME, PrecisionState, choose_device, describe_runtime, optimize_for_cpu
from fivefold.execution import make_prediction_runtime as make_prediction_runtime
from fivefold.execution import make_training_runtime as make_training_runtime
from fivefold.execution import precision_name as precision_name
from fivefold.execution import resolve_precision as resolve_precision
from fivefold.inference.predictor import Runtime
from fivefold.inference.tta import build_views
from fivefold.log import log
from fivefold.lookup import choose, parse_spec, require_packages
from fivefold.models.backbones import build_backbone, count_features
from fivefold.models.classifier import HEADS, Classifier, Standardize, build_head
from fivefold.models.pretrained import WeightsFile, find_file, find_weights, published
from fivefold.models.weights import load_matching
from fivefold.progress import MIB
from fivefold.system import DEADLINE, count_cores, free_shared_memory
from fivefold.training import memory
from fivefold.training.callbacks import Ema, FreezeBackbone, freeze_norms
from fivefold.training.loggers import TRACKERS
from fivefold.training.losses import Loss, balanced_weights, build_loss
from fivefold.training.mixing import MIXINGS, Mixing
from fivefold.training.objectives import (
    DistillSchedule,
    Objective,
    distillation_loss,
    is_stochastic,
    label_loss,
    rdrop,
    single_pass,
)
from fivefold.training.optim import (
    OPTIMIZER_STATES,
    OPTIMIZERS,
    SCHEDULES,
    Schedule,
    build_optimizer,
    check_warmup,
    lr_scales,
)
from fivefold.training.steps import build_scaler, build_update
from fivefold.training.time_limit import TimeLimit
from fivefold.training.trainer import MONITORS, LoopConfig, TrainData, Trainer, ValidData


def build_classifier(model: Model, classes: int) -> Classifier:
    """Build the network of `[model]` with random weights."""
    meta = count_stats(model.image_stats)
    backbone = build_backbone(model.backbone, model.backbone_kwargs, model.drop_path)
    head = build_head(model.head, count_features(backbone, model.size) + meta, classes, model.dropout)
    return Classifier(backbone, head, Standardize(meta) if meta else None)


def resolve_inputs(settings: Settings) -> Settings:
    """Return the settings with the image size, mean, std and filter that pretrained weights expect, except for keys that were set.

    Raise a SettingsError if `model.pretrained` is true and nobody publishes weights for the backbone.
    """
    model = settings.model
    offer = published(model.backbone) if model.pretrained else None
    if offer is None:
        if model.pretrained is True and not model.weights:
            raise SettingsError(f"{model.backbone} has no pretrained weights; set model.pretrained=false")
        return settings
    expected = {
        "image_size": offer.size[0] if offer.size[0] == offer.size[1] else list(offer.size),
        "mean": list(offer.mean),
        "std": list(offer.std),
        "interpolation": offer.interpolation,
    }
    changes = {key: value for key, value in expected.items() if key not in model.model_fields_set}
    return settings.model_copy(update={"model": model.model_copy(update=changes)})


def find_initial_weights(settings: Settings, channel: Path | None, offline: bool = False) -> WeightsFile | None:
    """Return the file that the backbone starts from: `model.weights`, or pretrained weights; None for random weights.

    `channel`: the weights channel. With `model.pretrained=auto` its only file counts, without its name.
    Raise the errors of `find_file` and `find_weights`.
    """
    model = settings.model
    file = find_file(model.weights, channel) if model.weights or model.pretrained == "auto" else None
    if file is None and model.pretrained:
        return find_weights(model.backbone, model.pretrained, offline or settings.offline)
    return file


def check_weights(settings: Settings, channel: Path | None) -> None:
    """Raise the error of `find_initial_weights` for weights that are missing and cannot be downloaded; download nothing."""
    try:
        find_initial_weights(settings, channel, offline=True)
    except MissingInputError:
        if settings.offline or settings.model.weights:
            raise


def load_initial_weights(network: Classifier, settings: Settings, channel: Path | None) -> None:
    """Load the file of `find_initial_weights` into the backbone, and log where it comes from."""
    file = find_initial_weights(settings, channel)
    if file is not None:
        load_matching(network.backbone, file.path)
        network.initial_weights = file.describe()
        words = "initial weights: %(file)s from %(source)s, licence %(licence)s, SHA-256 %(sha256)s"
        log.info(words, network.initial_weights)


def split_dataset(
    store: ImageStore, table: FoldTable, rows: np.ndarray, settings: Settings, training: bool
) -> ImageDataset:
    """Return the images of some rows of the split, with the transforms of training or of evaluation."""
    return image_dataset(store, table.paths_of(rows), table.sha256_of(rows), settings, training)


def image_dataset(
    store: ImageStore, paths: Sequence[str], sha256: Sequence[str | None], settings: Settings, training: bool
) -> ImageDataset:
    """Return the images at `paths`, verified by their digests; `train.cache_in_memory` keeps training images that fit."""
    transform = build_train_transforms(settings) if training else build_eval_transforms(settings)
    images = ImageDataset(
        store, paths, transform, settings.seed, sha256, settings.model.image_stats, decode_options(settings.data)
    )
    if training and settings.train.cache_in_memory:
        images.cache_in_memory()
    return images


def build_train_transforms(settings: Settings) -> Transform:
    return build_transforms(settings.augment.train, train_size(settings), False, settings.model.interpolation)


def train_size(settings: Settings) -> tuple[int, ...]:
    """Return the (height, width) of training images in pixels."""
    side = settings.augment.image_size
    return (side, side) if side else settings.model.size


def build_eval_transforms(settings: Settings) -> Transform:
    return build_transforms(settings.augment.eval, settings.model.size, True, settings.model.interpolation)


def one_hot(codes: np.ndarray, classes: int, device: torch.device) -> Tensor:
    """Return targets float [N, C]; a code of -1 (no label) gives a row of zeros."""
    shifted = torch.from_numpy(codes.astype(np.int64)) + 1
    return nn.functional.one_hot(shifted, classes + 1)[:, 1:].float().to(device)


def build_trainer(
    label: str,
    network: Classifier,
    train: TrainData,
    valid: ValidData | None,
    settings: Settings,
    runtime: Runtime,
    select: bool,
    patience: int,
    deadline: float = math.inf,
) -> Trainer:
    """Build all components of a training run; if `train` has a teacher, it is a distillation.

    `deadline`: when the run must end, in seconds since 1970.
    """
    check_training(settings)
    seed_everything(settings.seed)
    chosen = settings.train
    loss = _build_loss(settings, train)
    if network.meta is not None:
        network.meta.fit(torch.from_numpy(train.images.compute_image_stats()))
    model = _place(network, runtime, chosen.cpu_convs)
    shares = lr_scales(network.backbone, chosen.backbone_lr_scale, chosen.layer_decay)
    optimizer = build_optimizer(chosen.optimizer, model, chosen.lr, chosen.weight_decay, chosen.momentum, shares)
    steps = -(-count_batches(len(train.images), chosen.batch_size, chosen.drop_last) // chosen.grad_accum_steps)
    limit = _time_limit(settings, runtime, deadline, 0 if valid is None else len(valid.images))
    schedule = _build_schedule(settings, optimizer, steps, limit)
    scaler = build_scaler(runtime)
    objective = _build_objective(settings, loss, train)
    update = build_update(model, objective, optimizer, runtime, chosen.max_grad_norm, chosen.sam_rho, scaler)
    callbacks: dict[str, Any] = {"ema": Ema(model, chosen.ema_decay)} if chosen.ema_decay else {}
    scored = {name: ema.model for name, ema in callbacks.items()}
    if not scored or chosen.save_raw_weights:
        scored["raw"] = model
    callbacks |= {"schedule": schedule, **_callbacks(settings, network, train, steps)}
    if chosen.compile:
        network.backbone.compile()  # in place, to keep names; after the EMA copy, which is not trained
    sampler = choose(SAMPLERS, "sampler", chosen.sampler)
    codes = torch.where(train.targets.sum(dim=1) > 0, train.targets.argmax(dim=1), -1)  # -1: no label
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, **callbacks}
    return Trainer(
        label=label,
        model=model,
        scored_models=scored,
        train=train,
        valid=valid,
        config=_loop_config(settings, runtime, patience),
        batches=partial(sampler, codes.cpu().numpy(), chosen.batch_size, settings.seed, drop_last=chosen.drop_last),
        mixing=_build_mixing(settings),
        update=update,
        after_step=list(callbacks.values()),
        schedule=schedule,
        loss=loss,
        monitor=chosen.monitor,
        select=select,
        runtime=runtime,
        limit=limit,
        components=parts | {RUNTIME: PrecisionState(runtime), "limit": limit},
    )


def _place(network: Classifier, runtime: Runtime, cpu_convs: bool) -> nn.Module:
    """Return the network on the runtime's device, with the convolutions and the BatchNorm that the training needs there."""
    single = runtime.process_group.is_single
    synchronised = network if single else convert_sync_batchnorm(network, runtime.device)
    return runtime.to_device(optimize_for_cpu(synchronised, runtime, cpu_convs))


def _build_schedule(settings: Settings, optimizer: torch.optim.Optimizer, steps: int, limit: TimeLimit) -> Schedule:
    """Return the schedule of a run with so many `steps` an epoch."""
    chosen, total = settings.train, steps * settings.train.epochs
    drops = chosen.lr_step_epochs, chosen.lr_gamma
    return Schedule(
        chosen.schedule, optimizer, total, steps, chosen.warmup_epochs, *drops, passed=lambda: limit.progress
    )


def _time_limit(settings: Settings, runtime: Runtime, deadline: float, valid: int) -> TimeLimit:
    """Return the limit of a run; after its last step `valid` rows are validated, and predicted in all views."""
    if deadline < math.inf and not runtime.process_group.is_single:
        log.warning("ignored: %s, because several processes train together", DEADLINE)
        return TimeLimit()
    scale = math.prod(settings.model.size) / math.prod(train_size(settings))
    return TimeLimit(deadline, valid * (1 + len(settings.predict.tta)) * scale)


def _loop_config(settings: Settings, runtime: Runtime, patience: int) -> LoopConfig:
    chosen = settings.train
    return LoopConfig(
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        predict_batch_size=predict_batch_size(settings),
        accumulate=chosen.grad_accum_steps,
        patience=patience,
        validate_every=chosen.validate_every,
        seed=settings.seed,
        workers=choose_workers(chosen.num_workers, runtime, largest_batch_bytes(settings)),
    )


def _callbacks(settings: Settings, network: Classifier, train: TrainData, steps: int) -> dict[str, Any]:
    """Return the callbacks of freezing and distillation by their keys in a checkpoint; an epoch has this many `steps`."""
    chosen, distill = settings.train, settings.distill
    callbacks: dict[str, Any] = {}
    if chosen.freeze_norms:
        freeze_norms(network.backbone)
    if chosen.freeze_epochs:
        callbacks["freezing"] = FreezeBackbone(network.backbone, chosen.freeze_epochs * steps)
    if train.teacher is not None:
        falling = round(distill.alpha_anneal_fraction * chosen.epochs * steps)
        decay, end = distill.temperature_decay, distill.min_temperature
        callbacks["teacher"] = DistillSchedule(train.teacher, steps, decay, end, falling)
    return callbacks


def check_memory(network: Classifier, settings: Settings, runtime: Runtime, images: int = 0) -> None:
    """Log the device memory that a step needs. Raise a SettingsError with a batch size that fits if this one does not.

    On a CPU, also log the memory of the whole process, which keeps `images` bytes of decoded images.
    """
    chosen, rank = settings.train, runtime.process_group.rank
    copies = 1 + choose(OPTIMIZER_STATES, "optimizer", chosen.optimizer)
    copies += (chosen.ema_decay > 0) + (chosen.sam_rho > 0)
    meta = count_stats(settings.model.image_stats)
    size = train_size(settings)
    try:
        estimate = memory.estimate_memory(runtime.to_device(network), size, runtime, copies, meta)
    except (AssertionError, RuntimeError) as error:
        if size == settings.model.size:
            raise
        raise SettingsError(
            f"augment.image_size={size[0]}: the network takes no images of this size ({error}); "
            "set augment.image_size=0, or another size"
        ) from error
    # R-Drop with a random backbone runs one batch of twice the rows; each rank holds a part of the batch.
    passes = 2 if chosen.rdrop_alpha and _backbone_is_stochastic(network, settings, runtime) else 1
    estimate = replace(estimate, image=-(-passes * estimate.image // rank.world_size))
    log.info(describe_runtime(runtime))
    free = memory.available_bytes(runtime.device, rank.local_world_size)
    log.info("memory: a step takes %s", memory.check_fits(estimate, chosen.batch_size, free, chosen.grad_accum_steps))
    if runtime.device.type == "cpu":
        used = memory.process_bytes(estimate, chosen.batch_size, images) / MIB
        words = f"the process takes about {used:,.0f} MiB, with {images / MIB:,.0f} MiB of decoded images"
        log.info("memory: %s", words)


def _backbone_is_stochastic(network: Classifier, settings: Settings, runtime: Runtime) -> bool:
    images = torch.zeros(2, 3, *settings.model.size, device=runtime.device)
    with runtime.autocast():
        return is_stochastic(network.backbone, images.to(memory_format=runtime.memory_format))


def seed_everything(seed: int) -> None:
    """Seed initial weights, dropout and stochastic depth; samples have their own seeds."""
    torch.manual_seed(seed)


def predict_batch_size(settings: Settings) -> int:
    return settings.predict.batch_size or 2 * settings.train.batch_size


def choose_workers(requested: int, runtime: Runtime, batch_bytes: int) -> int:
    """Return the number of loader processes: `requested`, or for -1 a number for this machine.

    -1 means 0 on a CPU, where they would take cores from training, and up to 8 on a GPU, one per core of this process.
    They pass on batches of `batch_bytes` in shared memory. If it is too small, -1 gives fewer, with a warning. If it is
    too small for `requested` processes, raise a SettingsError.
    """
    local_size, free = runtime.process_group.rank.local_world_size, free_shared_memory()
    automatic = 0 if runtime.device.type == "cpu" else min(8, max(1, count_cores() // local_size))
    workers = requested if requested >= 0 else automatic
    needed = [batches_in_shared_memory(count) * batch_bytes * local_size for count in range(workers + 1)]
    fitting = workers if free is None else max(count for count, size in enumerate(needed) if size <= free)
    if fitting == workers:
        return workers
    figures = f"{needed[workers] / MIB:,.1f} MiB of shared memory, and /dev/shm has {free / MIB:,.1f} MiB free"
    problem = f"{workers} loader processes need {figures}"
    hint = "start the container with --shm-size=2g"
    if requested >= 0:
        raise SettingsError(f"train.num_workers={requested}: {problem}; {hint}, or set train.num_workers={fitting}")
    log.warning("%s: starting %d; %s to start more", problem, fitting, hint)
    return fitting


def largest_batch_bytes(settings: Settings, training: bool = True) -> int:
    """Return the bytes of the largest batch uint8 [B, 3, H, W] that loader processes pass on: in training, or in prediction only."""
    images = max(predict_batch_size(settings), settings.train.batch_size * training)
    return images * 3 * math.prod(settings.model.size)


def check_training(settings: Settings) -> None:
    """Raise a SettingsError for settings that would otherwise fail after reading images, or after epochs of training."""
    chosen, augment = settings.train, settings.augment
    for table, kind, name in (
        (MONITORS, "monitor", chosen.monitor),
        (MIXINGS, "mixing", augment.batch_mix),
        (SAMPLERS, "sampler", chosen.sampler),
        (OPTIMIZERS, "optimizer", chosen.optimizer),
        (SCHEDULES, "schedule", chosen.schedule),
        *((TRACKERS, "tracker", tracker) for tracker in chosen.loggers),
        *([] if chosen.precision == "auto" else [(PRECISIONS, "precision", chosen.precision)]),
    ):
        choose(table, kind, name)
    build_loss(chosen.loss, chosen.label_smoothing)
    build_views(settings.predict.tta)
    build_train_transforms(settings)
    build_eval_transforms(settings)
    check_warmup(chosen.warmup_epochs, chosen.epochs)
    if chosen.method != "fine_tune":
        _check_linear(settings)
    if chosen.batch_size == 1:
        _check_one_image(settings)


def build_trial_network(settings: Settings, shapes_only: bool) -> Classifier:
    """Build the network for two classes. Raise a SettingsError if that fails, or if it cannot take images of its size.

    `shapes_only`: build it without values, on the meta device, if possible.
    """
    network = None
    if shapes_only and not settings.model.backbone.startswith("fivefold/"):  # small networks are faster with values
        with suppress(Exception), torch.device("meta"):  # built again below, which raises the error of a wrong setting
            network = build_classifier(settings.model, 2)
    network = network or build_classifier(settings.model, 2)
    lr_scales(network.backbone, settings.train.backbone_lr_scale, settings.train.layer_decay)
    return network


def check_resources(network: Classifier, settings: Settings) -> None:
    """Raise a SettingsError if this machine cannot train: no such device, too little memory, missing tracker packages."""
    runtime = make_training_runtime(settings)
    choose_device(settings.predict.device, "predict.device")
    for name in settings.train.loggers:
        require_packages([name], "trackers", f"train.loggers={name}")
    check_memory(network, settings, runtime)
    choose_workers(settings.train.num_workers, runtime, largest_batch_bytes(settings))


def _check_linear(settings: Settings) -> None:
    """Raise a SettingsError if the head is not linear, or the loss does not fit logistic regression."""
    head, _ = parse_spec(settings.model.head, HEADS, "head")
    link = build_loss(settings.train.loss).link
    if head != "linear" or link != "softmax":
        problem = f"model.head={head}" if head != "linear" else f"train.loss={settings.train.loss}"
        raise SettingsError(
            f"train.method={settings.train.method} fits a linear head by cross-entropy, but the settings have {problem}; "
            "set model.head=linear and train.loss=cross_entropy, or train.method=fine_tune"
        )


def _check_one_image(settings: Settings) -> None:
    """Raise a SettingsError if a BatchNorm of the network gets only one value per channel from one image."""
    model = settings.model
    network = build_classifier(model, 2).train()
    meta_args = (torch.zeros(1, count_stats(model.image_stats)),) if model.image_stats else ()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, *model.size), *meta_args)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SettingsError(
            "train.batch_size=1: this network has a BatchNorm that gets only one value per channel from one image, too few "
            "for a variance; set train.batch_size=2 or more, or a head without BatchNorm (linear) and larger images"
        ) from None


def _build_loss(settings: Settings, train: TrainData) -> Loss:
    if settings.train.class_weights == settings.train.sampler == "balanced":
        log.warning(
            "train.class_weights=balanced and train.sampler=balanced each balance the classes, and together they give rare "
            "classes too much weight: set only one of them"
        )
    weights = balanced_weights(train.targets) if settings.train.class_weights == "balanced" else None
    return build_loss(settings.train.loss, settings.train.label_smoothing, weights)


def _build_mixing(settings: Settings) -> Mixing:
    chosen, epochs = settings.augment, settings.train.epochs
    if choose(MIXINGS, "mixing", chosen.batch_mix) and chosen.mixup_off_epochs >= epochs:
        log.warning("augment.mixup_off_epochs=%d of %d epochs disables mixing", chosen.mixup_off_epochs, epochs)
    return Mixing(chosen.batch_mix, chosen.mix_alpha, chosen.mix_prob, epochs - chosen.mixup_off_epochs)


def _build_objective(settings: Settings, loss: Loss, train: TrainData) -> Objective:
    teacher, alpha = train.teacher, settings.train.rdrop_alpha
    if teacher is None:
        criterion = label_loss(loss)
    else:
        criterion = distillation_loss(loss, lambda: teacher.alpha, lambda: teacher.temperature)
    return rdrop(criterion, alpha, loss.link) if alpha else single_pass(criterion)
