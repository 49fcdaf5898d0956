"""Which way of running a network trains fastest here: a few steps of each, in turns; one decision for all who ask."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fivefold.contract.files import one_at_a_time, read_json, write_json
from fivefold.errors import DataError
from fivefold.inference.predictor import Runtime
from fivefold.machine import cpu_name
from fivefold.training.randomness import random_state, set_random_state

PIXELS = 4 * 224 * 224
"""Of all images of a step that is timed, if they are not fewer than two."""
SECONDS, ROUNDS = 2.0, 7
"""A further round of steps begins before so many seconds are over, and never after so many rounds."""
CLEARLY, FIRST_ROUNDS = 1.2, 2
"""After so many rounds a candidate is out whose quickest step took so many times another one's slowest."""
MARGIN = 0.03
"""What is less simple must be faster by this share."""


@dataclass(frozen=True)
class Decision:
    """The choice, the milliseconds of the quickest step of each candidate that was timed, and the images of that step."""

    choice: str
    milliseconds: Mapping[str, float]
    images: int

    def in_words(self) -> str:
        figures = ", ".join(f"{name} {value:.4g} ms" for name, value in self.milliseconds.items())
        return f"precision {self.choice} by a probe: a step of {self.images} images takes {figures}"


def probe_images(batch_size: int, size: tuple[int, ...]) -> int:
    """Images of a step that is timed: the batch, or as many as have PIXELS pixels together; at least two, for BatchNorm."""
    return max(2, min(batch_size, PIXELS // (size[0] * size[1])))


class Probe:
    """Times training steps (forward and backward) of copies of `network`, one for each candidate.

    The network and the random state stay as they are.
    """

    def __init__(self, size: tuple[int, ...], images: int, network: nn.Module, seconds: float = SECONDS) -> None:
        self.size, self.images, self.network, self.seconds = size, images, network, seconds
        self.steps: dict[str, Callable[[], None]] = {}

    def add(self, name: str, runtime: Runtime, made: Callable[[nn.Module], nn.Module]) -> None:
        """A candidate: how a copy of the network is `made` ready for its `runtime`. The simplest one comes first."""
        meta = getattr(self.network, "meta", None)
        network = made(copy.deepcopy(self.network).train())
        pixels = torch.zeros(self.images, 3, *self.size, dtype=torch.uint8)
        company = () if meta is None else (meta.mean.new_zeros(self.images, len(meta.mean)).to(runtime.device),)

        def step() -> None:
            with runtime.autocast():
                logits = network(runtime.images(pixels), *company)
            logits.float().logsumexp(dim=1).mean().backward()
            network.zero_grad(set_to_none=True)

        self.steps[name] = step

    def run(self) -> Decision:
        """The fastest of the candidates, in rounds in which each has a step; the first round warms up.

        Of each its quickest step counts: what else the machine does makes steps longer, never shorter.
        """
        state = random_state(torch.device("cpu"))
        times = timed(self.steps, self.seconds)
        set_random_state(torch.device("cpu"), state)
        milliseconds = {name: 1000 * min(found) for name, found in times.items()}
        return Decision(fastest(milliseconds), milliseconds, self.images)


def timed(
    steps: Mapping[str, Callable[[], None]], seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step in several rounds, of which the first is left out; one more round at least.

    What is clearly slower than another runs in the first rounds alone, and a single one that is left need not run on.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = clock()
    for done in range(1 + ROUNDS):
        running = list(steps) if done <= FIRST_ROUNDS else _not_clearly_slower(times)
        if done > 1 and (clock() - start > seconds or (done > FIRST_ROUNDS and len(running) == 1)):
            break
        for name in running:
            begun = clock()
            steps[name]()
            times[name] += [clock() - begun] if done else []
    return times


def _not_clearly_slower(times: Mapping[str, Sequence[float]]) -> list[str]:
    most = min(max(found) for found in times.values())
    return [name for name, found in times.items() if min(found) < CLEARLY * most]


def fastest(times: Mapping[str, float]) -> str:
    """The first of `times`, or a later one that is faster by MARGIN than what would be chosen without it."""
    chosen = next(iter(times))
    for name, each in times.items():
        if each < (1 - MARGIN) * times[chosen]:
            chosen = name
    return chosen


def decided_once(
    asked: Mapping[str, Any], candidates: Sequence[str], folder: Path | None, probe: Callable[[], Decision]
) -> Decision:
    """The decision that lies in `folder` under the digest of what is `asked`; else that of `probe`, which is left there.

    Who asks at the same time waits, so all get one answer, and no probe runs beside another. One that cannot be
    read, or names no candidate, is made anew. Without a folder it is the probe's.
    """
    if folder is None:
        return probe()
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:16]}.json"
    with one_at_a_time(folder):
        kept = _read(path, candidates)
        if kept is None:
            kept = probe()
            machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            write_json(path, {**asdict(kept), "asked": dict(asked), "by": machine})
    return kept


def _read(path: Path, candidates: Sequence[str]) -> Decision | None:
    try:
        found = read_json(path)
        decision = Decision(found["choice"], dict(found["milliseconds"]), int(found["images"]))
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return None
    return decision if decision.choice in candidates else None
