"""On what a network runs, and how: device, precision and memory format from settings, this machine, and a short probe."""

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fivefold.choose import choose
from fivefold.contract.files import one_at_a_time, read_json, write_json
from fivefold.distributed.replicas import BY_ITSELF, Replicas
from fivefold.errors import DataError, SettingsError
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.machine import TICK, count_cores, count_cpus, cpu_name, seconds_of_others
from fivefold.models.cpu_convs import has_slow_groups, quicken
from fivefold.recipe import Settings

log = logging.getLogger("fivefold")
RUNTIME = "runtime"
"""What a checkpoint calls the Manner of its run."""
PROBED_PIXELS = 4 * 224 * 224
"""Of all images of a step that is timed, if they are not fewer than two."""
SECONDS, ROUNDS = 2.0, 7
"""A further round of steps begins before so many seconds are over, and never after so many rounds."""
MARGIN = 0.03
"""What is less simple must be faster by this share."""
QUIET = 0.1
"""The share of its threads' time that others may take from a probe."""
PROBES, PAUSE = 3, 2.0
"""A probe that others disturb is repeated so often in all, after so many seconds."""
CLEAR = 1.5
"""What a disturbed probe prefers to the usual precision must be so many times as fast."""


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
    """The settings with the precision of this run, where they leave it to the machine.

    It is that of `before`, a run that goes on; else the one that another stage of this run found for the same network
    and left in `folder`; else the fastest by a short probe on a CPU, and the usual one elsewhere. Of several processes
    the first decides.
    """
    if settings.train.precision != "auto":
        return settings
    precision = None
    if replicas.place.leads:
        precision = before["precision"] if before else _fastest_precision(settings, network, folder)
    train = settings.train.model_copy(update={"precision": replicas.shared(precision)})
    return settings.model_copy(update={"train": train})


def quickened(network: nn.Module, runtime: Runtime, wanted: bool) -> nn.Module:
    """The network with convolutions that train faster on CPUs, where it runs on one and they are `wanted`."""
    if runtime.device.type != "cpu" or not wanted:
        return network
    return quicken(network, runtime.dtype == torch.bfloat16 and _has("amx_tile"))


def in_words(runtime: Runtime) -> str:
    """Device, precision and threads of a runtime, for the log."""
    return f"device {runtime.device}, precision {precision_name(runtime)}, {torch.get_num_threads()} threads"


def precision_name(runtime: Runtime) -> str:
    """What `train.precision` and `model.json` call it."""
    return next(name for name, value in PRECISIONS.items() if value == (runtime.dtype, runtime.grouped_fp32))


def _runtime(settings: Settings, device: torch.device, precision: str, replicas: Replicas) -> Runtime:
    if device.type == "cuda":
        same_bits = settings.train.deterministic
        torch.backends.cudnn.benchmark = not same_bits  # kernels chosen by trial: perhaps others each time
        torch.use_deterministic_algorithms(same_bits, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is read before it is written
    dtype, grouped_fp32 = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = dtype is not None  # else convolutions of float32 would have 10 bits on new GPUs
    mean, std = settings.model.mean, settings.model.std
    return make_runtime(device, dtype, settings.train.channels_last, mean, std, replicas, grouped_fp32)


def _fastest_precision(settings: Settings, network: nn.Module, folder: Path | None) -> str:
    """The precision that another stage of this run has left in `folder`, or the fastest by a probe."""
    candidates = _candidates(settings, network)
    if len(candidates) == 1:
        return candidates[0]
    images = max(2, min(settings.train.batch_size, PROBED_PIXELS // (settings.model.size[0] * settings.model.size[1])))
    model = settings.model.model_dump(exclude={"pretrained", "weights", "mean", "std"})
    asked = {"model": model, "channels_last": settings.train.channels_last, "images": images}
    return decided_once(asked, candidates, folder, lambda: _probe(settings, network, candidates, images))


def decided_once(
    asked: Mapping[str, Any], candidates: Sequence[str], folder: Path | None, probe: Callable[[], Mapping[str, Any]]
) -> str:
    """The choice that lies in `folder` under the digest of what is `asked`; else that of `probe`, which is left there.

    Who asks at the same time waits, so all get one answer, and no probe runs beside another. One that cannot be read, or
    names no candidate, is made anew. The machine is not asked for: folds that differed in precision could not be blended.
    """
    if folder is None:
        return probe()["choice"]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:16]}.json"
    with one_at_a_time(folder):
        choice = _choice_at(path, candidates)
        if choice is None:
            decision = probe()
            machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            write_json(path, {**decision, "asked": dict(asked), "by": machine})
            choice = decision["choice"]
    return choice


def _choice_at(path: Path, candidates: Sequence[str]) -> str | None:
    """The candidate that the file at `path` names; None where it names none or cannot be read."""
    try:
        choice = read_json(path)["choice"]
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return None
    return choice if choice in candidates else None


def _candidates(settings: Settings, network: nn.Module) -> list[str]:
    """The precisions that may be fastest for `auto`, the simplest first."""
    device = choose_device(settings.train.device)
    usual = choose_precision("auto", device)
    if device.type != "cpu" or usual != "bf16":
        return [usual]
    return ["fp32", "bf16", *(["bf16_grouped_fp32"] if has_slow_groups(network) else [])]


def _probe(settings: Settings, network: nn.Module, candidates: Sequence[str], images: int) -> dict[str, Any]:
    """The `choice` of the candidates, the `milliseconds` of each one's quickest step, the `images` of a step, and whether
    others `disturbed` it to the end.

    The network and the random state stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        steps = {name: _step(settings, network, name, images) for name in candidates}
        milliseconds, disturbed = timed_in_quiet(steps)
    choice = decide(milliseconds, "bf16" if "bf16" in candidates else candidates[0], disturbed)
    figures = ", ".join(f"{name} {value:.4g} ms" for name, value in milliseconds.items())
    log.info("precision %s by a probe: a step of %d images takes %s", choice, images, figures)
    if disturbed:
        log.warning(
            "other processes used the cores during %d probes of the precision, so it is the usual one of this CPU unless "
            "another is ×%g as fast; train.precision sets it",
            PROBES,
            CLEAR,
        )
    return {"choice": choice, "milliseconds": milliseconds, "images": images, "disturbed": disturbed}


def timed_in_quiet(
    steps: Mapping[str, Callable[[], None]], pause: float = PAUSE, seconds: float = SECONDS
) -> tuple[dict[str, float], bool]:
    """The times of the steps, measured again while others use the cores, and whether they did so every time.

    They disturb where what they leave of the CPUs is less than this process's threads.
    """
    times: dict[str, float] = {}
    threads = min(torch.get_num_threads(), count_cores())
    for number in range(PROBES):
        time.sleep(pause if number else 0)
        before, start = seconds_of_others(), time.perf_counter()
        found = timed(steps, seconds)
        taken, wall = seconds_of_others() - before, time.perf_counter() - start
        times = {name: min(value, times.get(name, value)) for name, value in found.items()}
        cores = count_cpus()
        # counted in ticks, which a short probe cannot see below
        if cores - (taken - 2 * TICK * cores) / wall >= (1 - QUIET) * threads:
            return times, False
        log.info("others took %.1f of %d CPUs during the probe of the precision", taken / wall, cores)
    return times, True


def decide(milliseconds: Mapping[str, float], usual: str, disturbed: bool) -> str:
    """The fastest precision; of a `disturbed` probe the usual one, unless the fastest is CLEAR times as fast."""
    chosen = fastest(milliseconds)
    return usual if disturbed and milliseconds[chosen] * CLEAR > milliseconds[usual] else chosen


def _step(settings: Settings, network: nn.Module, precision: str, images: int) -> Callable[[], None]:
    """A training step (forward and backward) of a copy of the network in the given precision."""
    runtime = _runtime(settings, torch.device("cpu"), precision, BY_ITSELF)
    model = runtime.place(quickened(copy.deepcopy(network).train(), runtime, settings.train.cpu_convs))
    pixels = torch.zeros(images, 3, *settings.model.size, dtype=torch.uint8)
    meta = getattr(network, "meta", None)
    numbers = () if meta is None else (meta.mean.new_zeros(images, len(meta.mean)),)

    def step() -> None:
        with runtime.autocast():
            logits = model(runtime.images(pixels), *numbers)
        logits.float().logsumexp(dim=1).mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def timed(steps: Mapping[str, Callable[[], None]], seconds: float = SECONDS) -> dict[str, float]:
    """Milliseconds of the quickest run of each step, in rounds in which each has its turn; the first round warms up.

    The quickest counts: what else the machine does makes steps longer, never shorter.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(1 + ROUNDS):
        if done > 1 and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            times[name] += [1000 * (time.perf_counter() - begun)] if done else []
    return {name: min(runs) for name, runs in times.items()}


def fastest(times: Mapping[str, float]) -> str:
    """The first of `times`, or a later one that is faster by MARGIN than what would be chosen without it."""
    chosen = next(iter(times))
    for name, value in times.items():
        if value < (1 - MARGIN) * times[chosen]:
            chosen = name
    return chosen


def _fast_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and (_has("amx_tile") or _has("avx512_bf16")) else "fp32"


def _has(feature: str) -> bool:
    """Whether the CPU has a feature by torch's name for it."""
    return bool(torch.cpu.get_capabilities().get(feature))


PRECISIONS: dict[str, tuple[torch.dtype | None, bool]] = {
    "fp32": (None, False),
    "bf16": (torch.bfloat16, False),
    "bf16_grouped_fp32": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
}
"""Each precision's autocast type (None: float32), and whether grouped convolutions that bf16 slows stay in float32."""
