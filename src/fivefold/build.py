"""Build objects from settings: network, datasets, training loop. Lower layers do not read settings."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.config.schema import Model, Settings
from fivefold.data.image_io import pixels_of
from fivefold.data.pipeline.dataset import ImageSet, batches_in_shared_memory, count_batches
from fivefold.data.pipeline.image_stats import count_numbers
from fivefold.data.pipeline.sampling import SAMPLERS
from fivefold.data.readers.stores import ImageStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.transforms.registry import build_transforms
from fivefold.distributed.process_group import with_norms_of_all
from fivefold.errors import MissingInputError, SettingsError
from fivefold.execution import PRECISIONS, RUNTIME, Manner, choose_device, in_words, quickened
from fivefold.execution import precision_name as precision_name
from fivefold.execution import runtime_for_prediction as runtime_for_prediction
from fivefold.execution import runtime_of as runtime_of
from fivefold.execution import settled as settled
from fivefold.extras import need
from fivefold.inference.predictor import Runtime
from fivefold.inference.tta import build_views
from fivefold.lookup import choose
from fivefold.models.backbones import build_backbone, count_features
from fivefold.models.classifier import Classifier, Standardised, build_head
from fivefold.models.weights import start_from
from fivefold.progress import MIB
from fivefold.system import count_cores, free_shared_memory
from fivefold.training import memory
from fivefold.training.callbacks import Ema, Freezing
from fivefold.training.checkpoints import Stateful
from fivefold.training.loggers import TRACKERS
from fivefold.training.losses import Loss, balanced_weights, build_loss
from fivefold.training.mixing import MIXINGS, Mixing
from fivefold.training.objectives import Objective, by_labels, by_teacher, draws, once, rdrop
from fivefold.training.optim import (
    OPTIMIZER_STATES,
    OPTIMIZERS,
    SCHEDULES,
    Schedule,
    build_optimizer,
    check_warmup,
    learning_rates,
)
from fivefold.training.steps import UPDATES, build_scaler
from fivefold.training.teacher import Lessons
from fivefold.training.trainer import MONITORS, Duration, Loop, TrainRows, ValidRows

log = logging.getLogger("fivefold")


def build_classifier(model: Model, classes: int) -> Classifier:
    """Build the network of `[model]` with random weights, or with the weights of its hub."""
    meta = count_numbers(model.meta)
    backbone = build_backbone(model.backbone, model.pretrained, model.options, model.drop_path)
    head = build_head(model.head, count_features(backbone, model.size) + meta, classes, model.dropout)
    return Classifier(backbone, head, Standardised(meta) if meta else None)


def start_weights(network: Classifier, model: Model, channel: Path | None) -> None:
    """Load `model.weights`, a path or a name in the weights channel, into the backbone."""
    if not model.weights:
        return
    candidates = [Path(model.weights), *([channel / model.weights] if channel else [])]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise MissingInputError(f"model.weights={model.weights}: no such file, here or in SM_CHANNEL_WEIGHTS")
    start_from(network.backbone, path)


def image_set(store: ImageStore, table: FoldTable, rows: np.ndarray, settings: Settings, training: bool) -> ImageSet:
    """Return the images of some rows of the split, with the transforms of training or of evaluation."""
    return images_at(store, table.paths_of(rows), table.sha256_of(rows), settings, training)


def images_at(
    store: ImageStore, paths: Sequence[str], sha256: Sequence[str | None], settings: Settings, training: bool
) -> ImageSet:
    """Return the images at `paths`, verified by their digests; `train.keep_in_memory` keeps training images that fit."""
    specs = settings.augment.train if training else settings.augment.eval
    transform = build_transforms(specs, settings.model.size, evaluation=not training)
    images = ImageSet(store, paths, transform, settings.seed, sha256, settings.model.meta, pixels_of(settings.data))
    if training and settings.train.keep_in_memory:
        images.keep_in_memory()
    return images


def one_hot(codes: np.ndarray, classes: int, device: torch.device) -> Tensor:
    """Return targets float [N, C]; a code of -1 (no label) gives a row of zeros."""
    shifted = torch.from_numpy(codes.astype(np.int64)) + 1
    return nn.functional.one_hot(shifted, classes + 1)[:, 1:].float().to(device)


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
    """Build all components of a training run; if `train` has a teacher, it is a distillation."""
    check_training(settings)
    seed_everything(settings.seed)
    chosen = settings.train
    loss = _build_loss(settings, train)
    if network.meta is not None:
        network.meta.fit(torch.from_numpy(train.images.measure()))
    model = _prepare_model(network, runtime, chosen.cpu_convs)
    shares = learning_rates(network.backbone, chosen.backbone_lr, chosen.layer_decay)
    optimizer = build_optimizer(chosen.optimizer, model, chosen.lr, chosen.weight_decay, chosen.momentum, shares)
    ema = Ema(model, chosen.ema_decay) if chosen.ema_decay else None
    steps = -(-count_batches(len(train.images), chosen.batch_size, chosen.drop_last) // chosen.accumulate)
    schedule = Schedule(
        chosen.schedule, optimizer, steps * chosen.epochs, steps, chosen.warmup_epochs, chosen.step_epochs, chosen.gamma
    )
    raw = {"raw": model} if ema is None or chosen.keep_raw else {}
    scaler = build_scaler(runtime)
    update = choose(UPDATES, "update", chosen.update)(
        model, _build_objective(settings, loss, train), optimizer, runtime, chosen.clip, chosen.sam_rho, scaler
    )
    callbacks = {**({"ema": ema} if ema else {}), "schedule": schedule, **_callbacks(settings, network, train, steps)}
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "scaler": scaler, RUNTIME: Manner(runtime)}
    if chosen.compile:
        network.backbone.compile()  # in place, to keep names; after the EMA copy, which is not trained
    sampler = choose(SAMPLERS, "sampler", chosen.sampler)
    return Loop(
        label=label,
        model=model,
        contenders=({"ema": ema.model} if ema else {}) | raw,
        train=train,
        valid=valid,
        duration=_build_duration(settings, patience, runtime),
        batches=partial(
            sampler, _class_codes(train.targets), chosen.batch_size, settings.seed, drop_last=chosen.drop_last
        ),
        mixing=_build_mixing(settings),
        update=update,
        after_step=list(callbacks.values()),
        schedule=schedule,
        loss=loss,
        monitor=chosen.monitor,
        select=select,
        runtime=runtime,
        parts=parts | callbacks,
    )


def _build_duration(settings: Settings, patience: int, runtime: Runtime) -> Duration:
    chosen = settings.train
    return Duration(
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        predict_batch_size=predict_batch_size(settings),
        accumulate=chosen.accumulate,
        patience=patience,
        validate_every=chosen.validate_every,
        seed=settings.seed,
        workers=choose_workers(chosen.workers, runtime, largest_batch_bytes(settings)),
    )


def check_memory(network: Classifier, settings: Settings, runtime: Runtime, images: int = 0) -> None:
    """Log the device memory that a step needs. Raise a SettingsError with a batch size that fits if this one does not.

    On a CPU, also log the memory of the whole process, which keeps `images` bytes of decoded images.
    """
    chosen = settings.train
    copies = 1 + choose(OPTIMIZER_STATES, "optimizer", chosen.optimizer)
    copies += (chosen.ema_decay > 0) + (chosen.update == "sam")
    meta = count_numbers(settings.model.meta)
    estimate = memory.estimate(runtime.place(network), settings.model.size, runtime, copies, meta)
    place = runtime.replicas.place
    passes = (
        2 if chosen.rdrop_alpha and _backbone_is_stochastic(network, settings, runtime) else 1
    )  # one batch of twice the rows
    estimate = replace(
        estimate, image=-(-passes * estimate.image // place.world)
    )  # each rank holds a part of the batch
    log.info(in_words(runtime))
    free = memory.available(runtime.device, place.local_world)
    log.info("memory: a step takes %s", memory.check_fits(estimate, chosen.batch_size, free, chosen.accumulate))
    if runtime.device.type == "cpu":
        process_mib = memory.of_process(estimate, chosen.batch_size, images) / memory.MEBIBYTE
        images_mib = images / memory.MEBIBYTE
        log.info(
            "memory: the process takes about %s MiB, including libraries and %s MiB of decoded images",
            f"{process_mib:,.0f}",
            f"{images_mib:,.0f}",
        )


def _backbone_is_stochastic(network: Classifier, settings: Settings, runtime: Runtime) -> bool:
    images = torch.zeros(2, 3, *settings.model.size, device=runtime.device)
    with runtime.autocast():
        return draws(network.backbone, images.to(memory_format=runtime.memory_format))


def seed_everything(seed: int) -> None:
    """Seed initial weights, dropout and stochastic depth; samples have their own seeds."""
    torch.manual_seed(seed)


def predict_batch_size(settings: Settings) -> int:
    return settings.predict.batch_size or 2 * settings.train.batch_size


def choose_workers(wanted: int, runtime: Runtime, batch_bytes: int) -> int:
    """Return the number of loader processes: `wanted`, or for -1 a number for this machine.

    -1 means 0 on a CPU, where they would take cores from training, and up to 8 on a GPU, one per core of this process.
    Loader processes pass on batches of `batch_bytes` in shared memory. If it is too small, -1 gives fewer, with a warning.

    Raises:
        SettingsError: The shared memory is too small for `wanted` processes.
    """
    place = runtime.replicas.place
    automatic = 0 if runtime.device.type == "cpu" else min(8, max(1, count_cores() // place.local_world))
    workers, free = wanted if wanted >= 0 else automatic, free_shared_memory()
    fitting = workers
    while free is not None and fitting and batches_in_shared_memory(fitting) * batch_bytes * place.local_world > free:
        fitting -= 1
    if fitting == workers:
        return workers
    needed = batches_in_shared_memory(workers) * batch_bytes * place.local_world / MIB
    problem = f"{workers} loader processes need {needed:,.1f} MiB of shared memory, and /dev/shm has {free / MIB:,.1f} MiB free"
    hint = "start the container with --shm-size=2g"
    if wanted >= 0:
        raise SettingsError(f"train.workers={wanted}: {problem}; {hint}, or set train.workers={fitting}")
    log.warning("%s: starting %d; %s to start more", problem, fitting, hint)
    return fitting


def largest_batch_bytes(settings: Settings, training: bool = True) -> int:
    """Return the bytes of the largest batch uint8 [B, 3, H, W] that loader processes pass on: in training, or in prediction only."""
    images = predict_batch_size(settings)
    if training:
        images = max(images, settings.train.batch_size)
    height, width = settings.model.size
    return images * 3 * height * width


def check_training(settings: Settings) -> None:
    """Raise a SettingsError for settings that would otherwise fail after reading images, or after epochs of training."""
    chosen, augment = settings.train, settings.augment
    for table, kind, name in (
        (MONITORS, "monitor", chosen.monitor),
        (MIXINGS, "mixing", augment.mix),
        (SAMPLERS, "sampler", chosen.sampler),
        (UPDATES, "update", chosen.update),
        (OPTIMIZERS, "optimizer", chosen.optimizer),
        (SCHEDULES, "schedule", chosen.schedule),
        *((TRACKERS, "tracker", tracker) for tracker in chosen.trackers),
        *([] if chosen.precision == "auto" else [(PRECISIONS, "precision", chosen.precision)]),
    ):
        choose(table, kind, name)
    build_loss(chosen.loss, chosen.label_smoothing)
    build_views(settings.predict.views)
    build_transforms(augment.train, settings.model.size)
    build_transforms(augment.eval, settings.model.size, evaluation=True)
    check_warmup(chosen.warmup_epochs, chosen.epochs)
    if chosen.batch_size == 1:
        _check_one_image(settings)


def tried_network(settings: Settings, shapes_alone: bool) -> Classifier:
    """Build the network for two classes. Raise a SettingsError if that fails, or if it cannot take images of its size.

    `shapes_alone`: build it without values, on the meta device, if possible.
    """
    model = settings.model
    # Keep `pretrained` for our own small networks: they have no hub, and the error needs no download.
    hub = model.pretrained and model.backbone.startswith("fivefold/")
    model = model.model_copy(update={"pretrained": hub, "weights": ""})
    network = None
    if shapes_alone and not model.backbone.startswith("fivefold/"):  # our small networks are faster with values
        with suppress(Exception), torch.device("meta"):  # built again below, which raises the error of a wrong setting
            network = build_classifier(model, 2)
    network = network or build_classifier(model, 2)
    learning_rates(network.backbone, settings.train.backbone_lr, settings.train.layer_decay)
    return network


def check_machine(network: Classifier, settings: Settings) -> None:
    """Raise a SettingsError if this machine cannot train: no such device, too little memory, missing tracker packages."""
    runtime = runtime_of(settings)
    choose_device(settings.predict.device, "predict.device")
    for name in settings.train.trackers:
        need([name], "trackers", f"train.trackers={name}")
    check_memory(network, settings, runtime)
    choose_workers(settings.train.workers, runtime, largest_batch_bytes(settings))


def _check_one_image(settings: Settings) -> None:
    """Raise a SettingsError if a BatchNorm of the network gets only one value per channel from one image."""
    model = settings.model.model_copy(update={"pretrained": False, "weights": ""})
    network = build_classifier(model, 2).train()
    meta_args = (torch.zeros(1, count_numbers(model.meta)),) if model.meta else ()
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


def _build_loss(settings: Settings, train: TrainRows) -> Loss:
    if settings.train.class_weights == settings.train.sampler == "balanced":
        log.warning(
            "train.class_weights=balanced and train.sampler=balanced each balance the classes, and together they give rare "
            "classes too much weight: set only one of them"
        )
    weights = balanced_weights(train.targets) if settings.train.class_weights == "balanced" else None
    return build_loss(settings.train.loss, settings.train.label_smoothing, weights)


def _build_mixing(settings: Settings) -> Mixing:
    chosen, epochs = settings.augment, settings.train.epochs
    if choose(MIXINGS, "mixing", chosen.mix) and chosen.mix_off_epochs >= epochs:
        log.warning("augment.mix_off_epochs=%d of %d epochs disables mixing", chosen.mix_off_epochs, epochs)
    return Mixing(chosen.mix, chosen.mix_alpha, chosen.mix_p, epochs - chosen.mix_off_epochs)


def _build_objective(settings: Settings, loss: Loss, train: TrainRows) -> Objective:
    teacher, alpha = train.teacher, settings.train.rdrop_alpha
    if teacher is None:
        criterion = by_labels(loss)
    else:
        criterion = by_teacher(loss, lambda: teacher.alpha, lambda: teacher.temperature)
    return rdrop(criterion, alpha, loss.link) if alpha else once(criterion)


def _callbacks(settings: Settings, network: Classifier, train: TrainRows, steps: int) -> dict[str, Freezing | Lessons]:
    """Return the callbacks after a step besides EMA and schedule, by their keys in a checkpoint; `steps`: per epoch."""
    epochs, first, distill = settings.train.epochs, settings.train.freeze_epochs, settings.distill
    callbacks: dict[str, Freezing | Lessons] = {}
    if first:
        callbacks["freezing"] = Freezing(network.backbone, first * steps)
    if train.teacher is not None:
        falling = round(distill.annealing * epochs * steps)
        callbacks["teacher"] = Lessons(
            train.teacher, steps, distill.temperature_decay, distill.temperature_end, falling
        )
    return callbacks


def _class_codes(targets: Tensor) -> np.ndarray:
    """Return the class of each row of targets [N, C], or -1 if it has no label."""
    return torch.where(targets.sum(dim=1) > 0, targets.argmax(dim=1), -1).cpu().numpy()


def _prepare_model(network: nn.Module, runtime: Runtime, cpu_convs: bool) -> nn.Module:
    """Prepare the network for training on this machine: device, fast convolutions, BatchNorm over all ranks."""
    network = network if runtime.replicas.alone else with_norms_of_all(network, runtime.device)
    return runtime.place(quickened(network, runtime, cpu_convs))
