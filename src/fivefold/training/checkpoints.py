"""Checkpoints: the complete state of a training run, so that a resumed run gives the same bytes as an uninterrupted one.

Augmentation is seeded by (seed, epoch, row) and mixing by (seed, epoch, step), so the only random generators to save are
torch's, which dropout and similar layers use.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fivefold.contract.files import atomic
from fivefold.errors import DataError
from fivefold.log import log

MAX_CHECKPOINTS = 2
"""Checkpoints to keep: the newest, and the one before it in case the newest cannot be read."""


class Stateful(Protocol):
    """A component whose state a checkpoint contains."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, texts, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore a state that `state_dict` returned."""


class Checkpoints:
    """The newest checkpoints of one run, numbered, in its own folder.

    `minutes` and `steps`: maximum work between two checkpoints of an epoch; 0: no limit. `saved` gets each new file's path.
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
        """Return whether a checkpoint within the epoch is due. Call it once after each step."""
        self._steps_since += 1
        late = self.minutes > 0 and self._clock() - self._last >= 60 * self.minutes
        return late or (self.steps > 0 and self._steps_since >= self.steps)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the next checkpoint, then remove all but the newest two.

        Raise a RetryableError if the disk is full; the earlier checkpoints remain.
        """
        earlier = self._newest_first()
        number = int(earlier[0].stem) + 1 if earlier else 1
        path = self.folder / f"{number:08d}.pt"
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save(dict(state), file)
        if self.saved is not None:
            self.saved(path)
        for path in earlier[MAX_CHECKPOINTS - 1 :]:
            path.unlink(missing_ok=True)
        self._last, self._steps_since = self._clock(), 0

    def load(self) -> dict[str, Any] | None:
        """Return the newest readable checkpoint on the CPU, or None. Load only tensors and plain values."""
        for path in self._newest_first():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # errors of zipfile, torch and pickle share no base class
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                log.warning("the checkpoint %s cannot be read (%s); trying the one before it", path, reason)
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.pt"), reverse=True)


def collect_state(components: Mapping[str, Stateful], device: torch.device) -> dict[str, Any]:
    """Return the states of all components and of torch's random generators."""
    return {"random": random_state(device), **{name: part.state_dict() for name, part in components.items()}}


def restore(components: Mapping[str, Stateful], device: torch.device, state: Mapping[str, Any]) -> None:
    """Restore the states of `collect_state`. Raise a DataError if they do not fit, as those of another version of the code."""
    try:
        for name, part in components.items():
            part.load_state_dict(state[name])
        set_random_state(device, state["random"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the checkpoint does not fit this training ({type(error).__name__}: {error}); it may come from another "
            "version of the code: remove the checkpoints to start over, or resume with that version"
        ) from error


def random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the CPU's default generator and, for other devices, of the device's generator."""
    device_states = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *device_states]


def set_random_state(device: torch.device, state: Sequence[Tensor]) -> None:
    """Restore the states that `random_state` returned, so that the same random numbers follow."""
    torch.default_generator.set_state(state[0])
    for device_state in state[1:]:
        torch.get_device_module(device).set_rng_state(device_state)
