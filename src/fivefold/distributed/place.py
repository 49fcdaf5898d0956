"""The processes that train one model together: which hosts there are, and where a process stands among them.

Hosts are named by NNODES, NODE_RANK and MASTER_ADDR (or PET_…, as Kubeflow's Trainer writes them) or by SageMaker's
SM_HOSTS; NPROC or SM_NUM_GPUS say how many processes each has. RANK and its like, which torchrun, Kubeflow's Trainer
and our own launcher set, name the process.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.errors import DataError, SettingsError

PORT = 29500
"""Where hosts meet if nobody says it; torchrun's own."""
COUNTED = ("", "auto", "gpu")
"""What stands for as many processes as there are GPUs."""


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`; the `local_rank`th of `local_world` on its host.

    All meet in the file `meeting`, or where it is empty at MASTER_ADDR and MASTER_PORT.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    meeting: str = ""

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0


ALONE = Place()
PARENT = "FIVEFOLD_PARENT"
"""The number of the process that a process is not to outlive."""
SHARED_SCRATCH = "FIVEFOLD_SCRATCH"
"""A folder for what the processes of one host fetch, each for all; their starter removes it."""
MEETING = "meeting"
"""The file in that folder where processes of one host find each other."""
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
    shared = environ.get(SHARED_SCRATCH) if local_world == world else ""  # no port is opened where a file will do
    place = Place(
        below(environ, "RANK", "WORLD_SIZE", world),
        world,
        below(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE", local_world),
        local_world,
        str(Path(shared) / MEETING) if shared else "",
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


@dataclass(frozen=True)
class Hosts:
    """This host is number `index` of `count`; all meet at `address`:`port` (0: none was named), by `interface` if it is named."""

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    interface: str = ""

    def variables(self, processes: int, local_rank: int, port: int) -> dict[str, str]:
        """The environment of one of this host's `processes`."""
        named = {name: self.interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if self.interface}
        return named | {
            "RANK": str(self.index * processes + local_rank),
            "WORLD_SIZE": str(self.count * processes),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
        }


def hosts_of(environ: Mapping[str, str]) -> Hosts:
    """The hosts that train together: those of NNODES or PET_NNODES, else SageMaker's, else this one alone.

    Raises SettingsError for numbers that contradict each other.
    """
    named = _named_hosts(environ)
    count = whole(environ, _either(environ, "NNODES"), 1, max(1, len(named)))
    if named and count not in (1, len(named)):
        raise SettingsError(f"NNODES={count}, but SM_HOSTS names {len(named)}: {', '.join(named)}; leave NNODES out")
    meeting = _either(environ, "MASTER_PORT")
    if count == 1:
        # Kubernetes sets MASTER_PORT=tcp://… in every pod where a Service is called master.
        return Hosts(port=0 if "://" in environ.get(meeting, "") else whole(environ, meeting, 1, 0))
    port = whole(environ, meeting, 1, PORT)
    interface = environ.get("SM_NETWORK_INTERFACE_NAME") or str(_resources(environ).get("network_interface_name", ""))
    if len(named) == count:
        return Hosts(count, _index_of_host(environ, named), named[0], port, interface)
    address, index = environ.get(_either(environ, "MASTER_ADDR")), _either(environ, "NODE_RANK")
    if not address or not environ.get(index):
        raise SettingsError(
            f"NNODES={count} hosts need NODE_RANK (0 to {count - 1}) and MASTER_ADDR (the host of NODE_RANK=0)"
        )
    return Hosts(count, below(environ, index, _either(environ, "NNODES"), count), address, port, interface)


def processes_of(environ: Mapping[str, str]) -> int | None:
    """The processes on each host by NPROC, PET_NPROC_PER_NODE or SM_NUM_GPUS; None where the GPUs are to be counted."""
    name = next((name for name in ("NPROC", "PET_NPROC_PER_NODE") if environ.get(name)), "NPROC")
    if environ.get(name, "") not in COUNTED:
        return 1 if environ[name] == "cpu" else whole(environ, name, 1, 1)
    return max(1, whole(environ, "SM_NUM_GPUS", 0, 1)) if environ.get("SM_NUM_GPUS") else None


def index_is_of_hosts(environ: Mapping[str, str]) -> bool:
    """Whether several hosts train together: then the index of their Kubernetes Job tells hosts apart, not folds."""
    counts = [environ.get(name, "") for name in ("NNODES", "PET_NNODES", "GROUP_WORLD_SIZE")]
    return any(count.isdigit() and int(count) > 1 for count in counts)


def _either(environ: Mapping[str, str], name: str) -> str:
    """The variable's name, or the one by which Kubeflow's Trainer knows it where only that is set."""
    return f"PET_{name}" if environ.get(f"PET_{name}") and not environ.get(name) else name


def _named_hosts(environ: Mapping[str, str]) -> list[str]:
    """SageMaker's hosts, sorted: the first is where all meet."""
    text = environ.get("SM_HOSTS", "")
    try:
        found = json.loads(text) if text else _resources(environ).get("hosts", [])
    except ValueError as error:
        raise SettingsError(f"SM_HOSTS={text} is not a JSON list of names: {error}") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise SettingsError(f'SM_HOSTS={text} is not a JSON list of names, as ["algo-1", "algo-2"] is')
    return sorted(found)


def _index_of_host(environ: Mapping[str, str], named: list[str]) -> int:
    current = environ.get("SM_CURRENT_HOST") or str(_resources(environ).get("current_host", ""))
    if current not in named:
        raise SettingsError(f"SM_CURRENT_HOST={current} is none of the hosts {', '.join(named)}")
    return named.index(current)


def _resources(environ: Mapping[str, str]) -> dict[str, Any]:
    """What SageMaker's `resourceconfig.json` says; empty where there is none, a DataError where it is not JSON."""
    path = Path(environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml") / "input" / "config" / "resourceconfig.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}
