"""Where a process stands among those that train one model together: RANK and its like.

torchrun and Kubeflow's Trainer set these variables, and so does our own launcher.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fivefold.errors import SettingsError


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`; the `local_rank`th of `local_world` on its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0


ALONE = Place()
PARENT = "FIVEFOLD_PARENT"
"""The number of the process that a process is not to outlive."""
SHARED_SCRATCH = "FIVEFOLD_SCRATCH"
"""A folder for what the processes of one host fetch, each for all; their starter removes it."""
FEWEST_ROWS = 2
"""Of a batch that a process takes a part of; BatchNorm needs two."""


def is_member(environ: Mapping[str, str]) -> bool:
    """Whether somebody has started this process as one of several, or as the only one of them."""
    given = bool(environ.get("RANK") and environ.get("WORLD_SIZE"))
    return given and bool(environ.get("LOCAL_RANK") or not environ.get("PET_NNODES"))


def place_of(environ: Mapping[str, str]) -> Place:
    """The place that RANK, WORLD_SIZE and LOCAL_RANK give; alone where they are not set. SettingsError if they cannot be."""
    if not is_member(environ):
        return ALONE
    world = whole(environ, "WORLD_SIZE", 1, 1)
    local_world = whole(environ, "LOCAL_WORLD_SIZE", 1, 1)
    place = Place(
        below(environ, "RANK", "WORLD_SIZE", world),
        world,
        below(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE", local_world),
        local_world,
    )
    if world > 1 and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        raise SettingsError(f"WORLD_SIZE={world} processes meet at MASTER_ADDR and MASTER_PORT: set both")
    return place


def check_batch(size: int, world: int) -> None:
    """A SettingsError for batches that have not so many rows for each of `world` processes."""
    fewest = FEWEST_ROWS * world
    if world > 1 and size < fewest:
        raise SettingsError(
            f"train.batch_size={size} is the batch of all {world} processes together, and each needs {FEWEST_ROWS} "
            f"rows of it: train.batch_size={fewest} or more, or fewer processes (NPROC, NNODES)"
        )


def whole(environ: Mapping[str, str], name: str, least: int, otherwise: int) -> int:
    """The number in a variable, `otherwise` where it is not set; a SettingsError for anything else."""
    text = environ.get(name, "").strip()
    if not text:
        return otherwise
    if not text.isdigit() or int(text) < least:
        raise SettingsError(f"{name}={text} is not a whole number from {least}")
    return int(text)


def below(environ: Mapping[str, str], name: str, of: str, count: int) -> int:
    """The number in a variable that counts up to below `count`, which the variable `of` gives; 0 where it is not set."""
    found = whole(environ, name, 0, 0)
    if found >= count:
        raise SettingsError(f"{name}={found} is out of range: {of}={count} counts from 0 to {count - 1}")
    return found
