"""Checkpoints: all that decides the further bytes of a training run, so that a killed one goes on as if it had not been.

What has a state has `state_dict` and `load_state_dict`: network, average, optimiser, schedule,
scaler, phases, and how far the loop is. A sample's augmentation and a batch's mixing come from
(seed, epoch, row) and (seed, epoch, step), so of the random generators it is those that dropout
and its like draw from which count.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fivefold.contract.files import atomic
from fivefold.errors import DataError

log = logging.getLogger("fivefold")
KEPT = 2
"""The newest, and the one before it for the case that the newest cannot be read."""


class Stateful(Protocol):
    """What a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, texts, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Takes over what `state_dict` gave."""


class Checkpoints:
    """The newest checkpoints of one run in a folder of its own, numbered; each is whole or not there.

    `minutes` and `steps`: how much of an epoch may be lost at most, 0: a whole one. `saved` is told each new file.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float = 0.0,
        steps: int = 0,
        saved: Callable[[Path], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.minutes, self.steps, self.saved, self._clock = folder, minutes, steps, saved, clock
        self._last, self._steps_since = clock(), 0

    def due(self) -> bool:
        """Whether it is time for one within an epoch; to be asked once after each step."""
        self._steps_since += 1
        late = self.minutes > 0 and self._clock() - self._last >= 60 * self.minutes
        return late or (self.steps > 0 and self._steps_since >= self.steps)

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the next one, then removes all but the newest two.

        A full disk is a RetryableError, and leaves the earlier ones as they were.
        """
        found = self._newest_first()
        number = int(found[0].stem) + 1 if found else 1
        path = self.folder / f"{number:08d}.pt"
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save(dict(state), file)
        if self.saved is not None:
            self.saved(path)
        for path in found[KEPT - 1 :]:
            path.unlink(missing_ok=True)
        self._last, self._steps_since = self._clock(), 0

    def load(self) -> dict[str, Any] | None:
        """The newest that can be read, on the CPU; None where there is none. Nothing but tensors and plain values is read."""
        for path in self._newest_first():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # zipfile's, torch's and the unpickler's have no class in common
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                log.warning("the checkpoint %s cannot be read (%s): the one before it is taken", path, reason)
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.pt"), reverse=True)


def captured(parts: Mapping[str, Stateful], device: torch.device) -> dict[str, Any]:
    """The states of all parts and of the random generators."""
    return {"random": _random(device), **{name: part.state_dict() for name, part in parts.items()}}


def restore(parts: Mapping[str, Stateful], device: torch.device, state: Mapping[str, Any]) -> None:
    """Gives each part its state, and the random generators theirs.

    Raises a DataError where they do not fit, as those of another version of the code may not.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        kept = state["random"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the checkpoint does not fit this training ({type(error).__name__}: {error}), as one of another version "
            "of the code may not: remove the checkpoints to start over, or go on with that version"
        ) from error
    set_random_state(device, kept["torch"])
    version, words, gauss = kept["python"]
    random.setstate((version, tuple(words), gauss))
    name, words, *rest = kept["numpy"]
    np.random.set_state((name, np.array(words, np.uint32), *rest))


def _random(device: torch.device) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, numbers, *rest = np.random.get_state()
    return {
        "torch": random_state(device),
        "python": [version, list(words), gauss],
        "numpy": [str(name), numbers.tolist(), *rest],
    }


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the CPU's default generator, and of the device's where it has its own."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def set_random_state(device: torch.device, state: Sequence[Tensor]) -> None:
    """Sets what `random_state` gave: the same draws follow again."""
    torch.default_generator.set_state(state[0])
    for own in state[1:]:
        torch.get_device_module(device).set_rng_state(own)
