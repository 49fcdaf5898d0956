"""On what a network runs, and how: device, precision and memory format from settings, this machine, and a short probe."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fivefold.choose import choose
from fivefold.distributed.replicas import BY_ITSELF, Replicas
from fivefold.errors import SettingsError
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.machine import keep_freed_memory
from fivefold.models.convolution import quicken
from fivefold.models.depthwise import quicken_depthwise
from fivefold.models.grouped import has_slow_groups
from fivefold.recipe import Settings
from fivefold.training.probing import Probe, decided_once, probe_images

log = logging.getLogger("fivefold")
RUNTIME = "runtime"
"""What a checkpoint calls the Manner of its run."""
FORMATS = {"NHWC": True, "NCHW": False}
"""Memory formats by whether they are channels-last, the usual one first."""


class Manner:
    """How a run trains, for its checkpoints: one that goes on keeps precision and memory format."""

    def __init__(self, runtime: Runtime) -> None:
        self.found = {"precision": precision_name(runtime), "channels_last": runtime.channels_last}

    def state_dict(self) -> dict[str, Any]:
        return self.found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.found:
            raise ValueError(f"it was trained with {state}, and this is {self.found}")


def choose_device(name: str, key: str = "train.device") -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU; a device that is not there is a SettingsError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, has in there.items() if has)
    kind, _, number = name.partition(":")
    if not choose(there, "device", kind):
        raise SettingsError(f"{key}={name}, but this machine has no such device; {key}=auto finds one")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if number and not (number.isdecimal() and int(number) < count):
        raise SettingsError(f"{key}={name}, but this machine has {kind}:0 to {kind}:{count - 1}; {key}=auto finds one")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """The precision `name` where the device has it. `auto`, unprobed: bf16 where the machine is fast in it, else fp16 on CUDA, else fp32."""
    if name == "auto":
        return _fast_precision(device)
    dtype, _ = choose(PRECISIONS, "precision", name)
    if dtype == torch.float16 and device.type != "cuda":
        raise SettingsError(f"train.precision=fp16 needs CUDA, and this runs on {device.type}; bf16 or fp32 will do")
    return name


def runtime_of(settings: Settings, replicas: Replicas = BY_ITSELF) -> Runtime:
    """The Runtime that the settings ask for on this machine, for training, alone or with others."""
    device = replicas.own_device(choose_device(settings.train.device))
    if settings.train.compile and device.type != "cuda":
        raise SettingsError(f"train.compile=true needs CUDA, and this runs on {device.type}; leave it at false")
    return _runtime(settings, device, replicas.shared(choose_precision(settings.train.precision, device)), replicas)


def runtime_for_prediction(
    settings: Settings, precision: str, device: str = "auto", replicas: Replicas = BY_ITSELF
) -> Runtime:
    """The Runtime of a trained model wherever it predicts: this machine's device, and the `precision` it was trained in.

    fp16 where there is no CUDA becomes float32.
    """
    chosen = replicas.own_device(choose_device(device, "predict.device"))
    dtype, _ = choose(PRECISIONS, "precision", precision)
    there = chosen.type == "cuda" or dtype != torch.float16
    return _runtime(settings, chosen, precision if there else "fp32", replicas)


def settled(
    settings: Settings, network: nn.Module, replicas: Replicas, before: Mapping[str, Any] | None, folder: Path | None
) -> Settings:
    """The settings with precision and memory format of this run, where they leave them to the machine.

    They are those of `before`, a run that goes on; else those that another stage of this run found for the same
    network and left in `folder`; else the fastest by a short probe on a CPU, and the usual ones elsewhere. Of
    several processes the first decides.
    """
    chosen = settings.train
    if chosen.precision != "auto" and chosen.channels_last != "auto":
        return settings
    found = dict(before or _found(settings, network, folder)) if replicas.place.leads else None
    found = replicas.shared(found)
    return settings.model_copy(update={"train": chosen.model_copy(update=found)})


def quickened(network: nn.Module, runtime: Runtime) -> nn.Module:
    """Convolutions made faster to train on CPUs: depthwise ones, and small ones where units for bf16 products make it pay."""
    if runtime.device.type != "cpu":
        return network
    network = quicken_depthwise(network)
    return quicken(network) if runtime.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else network


def in_words(runtime: Runtime) -> str:
    """Device, precision and threads of a runtime, for the log."""
    return f"device {runtime.device}, precision {precision_name(runtime)}, {torch.get_num_threads()} threads"


def precision_name(runtime: Runtime) -> str:
    """What `train.precision` and `model.json` call it."""
    return next(name for name, value in PRECISIONS.items() if value == (runtime.dtype, runtime.grouped_fp32))


def _runtime(settings: Settings, device: torch.device, precision: str, replicas: Replicas) -> Runtime:
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        same_bits = settings.train.deterministic
        torch.backends.cudnn.benchmark = not same_bits  # kernels chosen by trial: perhaps others each time
        torch.use_deterministic_algorithms(same_bits, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is read before it is written
    model, channels_last = settings.model, settings.train.channels_last is not False
    dtype, grouped_fp32 = PRECISIONS[precision]
    return make_runtime(device, dtype, channels_last, model.mean, model.std, replicas, grouped_fp32)


def _found(settings: Settings, network: nn.Module, folder: Path | None) -> Mapping[str, Any]:
    """`precision` and `channels_last` of this run, from its folder or by a probe that is left there."""
    device = choose_device(settings.train.device)
    candidates = _candidates(settings, network, device)
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    images = probe_images(settings.train.batch_size, settings.model.size)
    asked = _asked(settings, images)
    found = decided_once(asked, list(candidates), folder, lambda: _probe(settings, network, candidates, images))
    log.info("%s", found.in_words())
    return candidates[found.choice]


def _candidates(settings: Settings, network: nn.Module, device: torch.device) -> dict[str, dict[str, Any]]:
    """What may be fastest, the simplest first: a name, and `precision` and `channels_last` of it."""
    chosen = settings.train
    precisions = [choose_precision(chosen.precision, device)]
    if chosen.precision == "auto" and device.type == "cpu" and precisions == ["bf16"]:
        precisions = ["fp32", "bf16", *(["bf16_grouped_fp32"] if has_slow_groups(network) else [])]
    formats = dict(FORMATS) if chosen.channels_last == "auto" else {"": chosen.channels_last}
    formats = {"": True} if chosen.channels_last == "auto" and device.type != "cpu" else formats
    return {
        f"{precision} {format_}".rstrip(): {"precision": precision, "channels_last": channels_last}
        for precision in precisions
        for format_, channels_last in formats.items()
    }


def _probe(settings: Settings, network: nn.Module, candidates: Mapping[str, Mapping[str, Any]], images: int) -> Probe:
    probe = Probe(settings.model.size, images, network)
    for name, chosen in candidates.items():
        runtime = runtime_of(settings.model_copy(update={"train": settings.train.model_copy(update=chosen)}))
        probe.add(name, runtime, lambda copied, runtime=runtime: runtime.place(quickened(copied, runtime)))
    return probe.run()


def _asked(settings: Settings, images: int) -> dict[str, Any]:
    """What is asked of a run once. The machine is not in it: folds that differed in precision could not be blended."""
    model = settings.model.model_dump(exclude={"pretrained", "weights", "mean", "std"})
    wanted = {"precision": settings.train.precision, "channels_last": settings.train.channels_last}
    return {"model": model, "wanted": wanted, "images": images}


def _fast_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


PRECISIONS: dict[str, tuple[torch.dtype | None, bool]] = {
    "fp32": (None, False),
    "bf16": (torch.bfloat16, False),
    "bf16_grouped_fp32": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
}
"""Each precision's autocast type (None: float32), and whether grouped convolutions that bf16 slows stay in float32."""
