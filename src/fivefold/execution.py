"""Choose device, precision and memory format from settings, this machine, and a short probe."""

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fivefold.config.schema import Settings
from fivefold.contract.files import folder_lock, read_json, write_json
from fivefold.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from fivefold.errors import DataError, SettingsError
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.log import log
from fivefold.lookup import choose
from fivefold.models.cpu_convs import has_slow_grouped_convs, use_fast_convs
from fivefold.system import TICK, count_cores, count_cpus, other_cpu_seconds

RUNTIME = "runtime"
"""The key of a run's precision and memory format (`PrecisionState`) in a checkpoint."""
PRECISIONS: dict[str, tuple[torch.dtype | None, bool]] = {
    "fp32": (None, False),
    "bf16": (torch.bfloat16, False),
    "bf16_grouped_fp32": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
}
"""Autocast type of each precision (None: float32), and whether grouped convolutions that are slow in bf16 stay in float32."""
MAX_PROBE_PIXELS = 4 * 224 * 224
"""Maximum pixels of the images of a timed step, which has at least two images."""
PROBE_S, MAX_ROUNDS = 2.0, 7
"""Seconds after which no further round of steps starts, and the maximum number of rounds after the warm-up."""
MIN_GAIN = 0.03
"""A less simple precision must be faster by this fraction."""
MAX_DISTURBANCE = 0.1
"""Fraction of the threads' CPU time that other processes may take during a probe."""
MAX_PROBES, PROBE_PAUSE_S = 3, 2.0
"""Maximum number of probes while other processes disturb them, and the seconds between two probes."""
USUAL, CLEAR_FACTOR = "bf16", 1.5
"""In a disturbed probe, a precision must be this many times as fast as the usual one to be chosen."""


class PrecisionState:
    """Precision and memory format of a run, for its checkpoints: a resumed run must use the same."""

    def __init__(self, runtime: Runtime) -> None:
        self.state = {"precision": precision_name(runtime), "channels_last": runtime.channels_last}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.state:
            raise ValueError(f"it was trained with {state}, and this run uses {self.state}")


def choose_device(name: str, key: str = "train.device") -> torch.device:
    """Return the device; `auto` is CUDA, else MPS, else the CPU. Raise a SettingsError if the device does not exist."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    kind, _, number = name.partition(":")
    if (number or "0") not in map(str, range(choose(counts, "device", kind))):
        raise SettingsError(f"{key}={name}, but this machine has no such device; set {key}=auto")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision `name`; `auto` without a probe is bf16 if the device is fast in it, else fp16 on CUDA, else fp32."""
    if name != "auto":
        dtype, _ = choose(PRECISIONS, "precision", name)
        if dtype == torch.float16 and device.type != "cuda":
            raise SettingsError(f"train.precision=fp16 needs CUDA, but the device is {device.type}; set bf16 or fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and (_cpu_has("amx_tile") or _cpu_has("avx512_bf16")) else "fp32"


def make_training_runtime(settings: Settings, process_group: ProcessGroup = SINGLE_PROCESS) -> Runtime:
    """Return the Runtime of the settings for training on this machine, with one or several ranks."""
    device = process_group.local_device(choose_device(settings.train.device))
    if settings.train.compile and device.type != "cuda":
        raise SettingsError(f"train.compile=true needs CUDA, but the device is {device.type}; set it to false")
    precision = process_group.broadcast(choose_precision(settings.train.precision, device))
    return _make_runtime(settings, device, precision, process_group)


def make_prediction_runtime(
    settings: Settings, precision: str, device: str = "auto", process_group: ProcessGroup = SINGLE_PROCESS
) -> Runtime:
    """Return the Runtime for prediction: this machine's device, and the `precision` that the model was trained in.

    fp16 becomes float32 if the device is not CUDA.
    """
    chosen = process_group.local_device(choose_device(device, "predict.device"))
    dtype, _ = choose(PRECISIONS, "precision", precision)
    supported = chosen.type == "cuda" or dtype != torch.float16
    return _make_runtime(settings, chosen, precision if supported else "fp32", process_group)


def resolve_precision(
    settings: Settings,
    network: nn.Module,
    process_group: ProcessGroup,
    resumed: Mapping[str, Any] | None,
    folder: Path | None,
) -> Settings:
    """Replace `train.precision=auto` in the settings by the precision of this run; the first rank decides for all.

    It is that of `resumed`, the state of a resumed run; else the one that another stage of this run chose for the same
    network and stored in `folder`; else the fastest by a short probe on a CPU, and the usual one on other devices.
    """
    if settings.train.precision != "auto":
        return settings
    precision = None
    if process_group.rank.is_main:
        precision = resumed["precision"] if resumed else _fastest_precision(settings, network, folder)
    train = settings.train.model_copy(update={"precision": process_group.broadcast(precision)})
    return settings.model_copy(update={"train": train})


def optimize_for_cpu(network: nn.Module, runtime: Runtime, enabled: bool) -> nn.Module:
    """Give the network convolutions that train faster on CPUs, if it runs on one and they are `enabled`; return it."""
    if runtime.device.type == "cpu" and enabled:
        use_fast_convs(network, runtime.dtype == torch.bfloat16 and _cpu_has("amx_tile"))
    return network


def describe_runtime(runtime: Runtime) -> str:
    return f"device {runtime.device}, precision {precision_name(runtime)}, {torch.get_num_threads()} threads"


def precision_name(runtime: Runtime) -> str:
    """Return the name of the runtime's precision in `train.precision` and `model.json`."""
    return next(name for name, value in PRECISIONS.items() if value == (runtime.dtype, runtime.grouped_fp32))


def _make_runtime(settings: Settings, device: torch.device, precision: str, process_group: ProcessGroup) -> Runtime:
    if device.type == "cuda":
        same_bits = settings.train.deterministic
        torch.backends.cudnn.benchmark = not same_bits  # choosing kernels by timing can differ between runs
        torch.use_deterministic_algorithms(same_bits, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is read before it is written
    dtype, grouped_fp32 = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = dtype is not None  # TF32 would reduce float32 convolutions to 10 bits
    mean, std = settings.model.mean, settings.model.std
    return make_runtime(device, dtype, settings.train.channels_last, mean, std, process_group, grouped_fp32)


def _fastest_precision(settings: Settings, network: nn.Module, folder: Path | None) -> str:
    """Return the precision that another stage of this run stored in `folder`, or the fastest by a probe."""
    candidates = _candidates(settings, network)
    if len(candidates) == 1:
        return candidates[0]
    images = max(2, min(settings.train.batch_size, MAX_PROBE_PIXELS // math.prod(settings.model.size)))
    model = settings.model.model_dump(exclude={"pretrained", "weights", "mean", "std", "interpolation"})
    question = {"model": model, "channels_last": settings.train.channels_last, "images": images}
    return cached_probe(question, candidates, folder, lambda: _probe(settings, network, candidates, images))


def cached_probe(
    question: Mapping[str, Any], candidates: Sequence[str], folder: Path | None, probe: Callable[[], Mapping[str, Any]]
) -> str:
    """Return the choice stored in `folder` under the digest of `question`; else run `probe` and store its choice.

    Concurrent callers wait for one probe. A stored choice that cannot be read or is not a candidate is replaced. The digest
    does not include the machine, because folds of different precisions cannot be blended.
    """
    if folder is None:
        return probe()["choice"]
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:16]}.json"
    with folder_lock(folder):
        with suppress(OSError, DataError, KeyError, TypeError, ValueError):
            if (choice := read_json(path)["choice"]) in candidates:
                return choice
        decision = probe()
        write_json(path, {**decision, "asked": question})
        return decision["choice"]


def _candidates(settings: Settings, network: nn.Module) -> list[str]:
    """Return the precisions to compare for `auto`, the simplest first."""
    device = choose_device(settings.train.device)
    default = choose_precision("auto", device)
    if device.type != "cpu" or default != USUAL:
        return [default]
    return ["fp32", USUAL, *(["bf16_grouped_fp32"] if has_slow_grouped_convs(network) else [])]


def _probe(settings: Settings, network: nn.Module, candidates: Sequence[str], images: int) -> dict[str, Any]:
    """Return the `choice`, its reasons, and whether other processes disturbed every probe; keep network and random state."""
    with torch.random.fork_rng(devices=[]):
        steps = {name: _training_step(settings, network, name, images) for name in candidates}
        milliseconds, disturbed = time_undisturbed(steps)
    choice = choose_fastest(milliseconds, disturbed)
    figures = ", ".join(f"{name} {value:.4g} ms" for name, value in milliseconds.items())
    level, note = (logging.WARNING, ", disturbed by other processes") if disturbed else (logging.INFO, "")
    log.log(level, "precision %s by a probe%s: a step of %d images takes %s", choice, note, images, figures)
    return {"choice": choice, "milliseconds": milliseconds, "images": images, "disturbed": disturbed}


def choose_fastest(milliseconds: Mapping[str, float], disturbed: bool) -> str:
    """Return the fastest precision; each must be faster by MIN_GAIN than the choice among those before it.

    If `disturbed`, return USUAL unless the fastest is CLEAR_FACTOR times as fast.
    """
    chosen = next(iter(milliseconds))
    for name, value in milliseconds.items():
        if value < (1 - MIN_GAIN) * milliseconds[chosen]:
            chosen = name
    return USUAL if disturbed and milliseconds[chosen] * CLEAR_FACTOR > milliseconds[USUAL] else chosen


def time_undisturbed(steps: Mapping[str, Callable[[], None]]) -> tuple[dict[str, float], bool]:
    """Return the times of the steps, and whether every probe was disturbed: other processes left fewer CPUs than threads."""
    times = dict.fromkeys(steps, math.inf)
    threads, cpus = min(torch.get_num_threads(), count_cores()), count_cpus()
    for number in range(MAX_PROBES):
        time.sleep(PROBE_PAUSE_S if number else 0)
        before, start = other_cpu_seconds(), time.perf_counter()
        latest = time_steps(steps)
        taken, wall = other_cpu_seconds() - before, time.perf_counter() - start
        times = {name: min(value, latest[name]) for name, value in times.items()}
        # CPU times have the resolution of a tick, which matters in a short probe.
        if cpus - (taken - 2 * TICK * cpus) / wall >= (1 - MAX_DISTURBANCE) * threads:
            return times, False
        log.info("other processes took %.1f of %d CPUs during the precision probe", taken / wall, cpus)
    return times, True


def time_steps(steps: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Return the milliseconds of the fastest run of each step, in interleaved rounds; the first round is a warm-up."""
    times, start = dict.fromkeys(steps, math.inf), time.perf_counter()
    for done in range(1 + MAX_ROUNDS):
        if done > 1 and time.perf_counter() - start > PROBE_S:
            break
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if done:
                times[name] = min(times[name], 1000 * (time.perf_counter() - begun))
    return times


def _training_step(settings: Settings, network: nn.Module, precision: str, images: int) -> Callable[[], None]:
    """Return a training step (forward and backward) of a copy of the network in the given precision."""
    runtime = _make_runtime(settings, torch.device("cpu"), precision, SINGLE_PROCESS)
    model = runtime.to_device(optimize_for_cpu(copy.deepcopy(network).train(), runtime, settings.train.cpu_convs))
    pixels = torch.zeros(images, 3, *settings.model.size, dtype=torch.uint8)
    meta = getattr(network, "meta", None)
    numbers = () if meta is None else (meta.mean.new_zeros(images, len(meta.mean)),)

    def step() -> None:
        with runtime.autocast():
            logits = model(runtime.images(pixels), *numbers)
        logits.float().logsumexp(dim=1).mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def _cpu_has(feature: str) -> bool:
    """Return whether the CPU has a feature, by torch's name of it."""
    return bool(torch.cpu.get_capabilities().get(feature))
