"""Hosts, rank and world size of distributed training, from the environment.

NNODES, NODE_RANK and MASTER_ADDR (or PET_…, as Kubeflow's Trainer writes them) or SageMaker's SM_HOSTS define the
hosts. NPROC or SM_NUM_GPUS define the processes per host. torchrun, Kubeflow's Trainer and Fivefold's launcher set
RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fivefold.errors import SettingsError

DEFAULT_PORT = 29500
"""Default of MASTER_PORT, as in torchrun."""
COUNT_GPUS = ("", "auto", "gpu")
"""Values of NPROC that mean one process per GPU."""


@dataclass(frozen=True)
class Rank:
    """Process `index` of `world_size` processes; `local_index` of `local_world_size` on its host.

    The processes rendezvous by the file `rendezvous_file`, or at MASTER_ADDR and MASTER_PORT if it is empty.
    """

    index: int = 0
    world_size: int = 1
    local_index: int = 0
    local_world_size: int = 1
    rendezvous_file: str = ""

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes the files."""
        return self.index == 0


SINGLE_RANK = Rank()
PARENT = "FIVEFOLD_PARENT"
"""Variable with the id of the parent process. A process ends if its parent ends."""
SHARED_SCRATCH = "FIVEFOLD_SCRATCH"
"""Variable with a folder for downloads that the processes of one host share. Their parent removes it."""
RENDEZVOUS_FILE = "meeting"
"""The rendezvous file in that folder for processes of one host."""
MIN_ROWS_PER_RANK = 2
"""Minimum rows of a batch per process. BatchNorm needs two."""


def started_as_rank(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process as a rank, also as the only one."""
    has_rank = bool(environ.get("RANK") and environ.get("WORLD_SIZE"))
    return has_rank and bool(environ.get("LOCAL_RANK") or not environ.get("PET_NNODES"))


def rank_from_env(environ: Mapping[str, str]) -> Rank:
    """Return the rank from RANK, WORLD_SIZE and LOCAL_RANK, or SINGLE_RANK if not set. Raise a SettingsError if they are invalid."""
    if not started_as_rank(environ):
        return SINGLE_RANK
    world = int_from_env(environ, "WORLD_SIZE", 1, 1)
    local_world = int_from_env(environ, "LOCAL_WORLD_SIZE", 1, 1)
    shared = environ.get(SHARED_SCRATCH) if local_world == world else ""  # on one host a file suffices: open no port
    if world > 1 and not shared and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        raise SettingsError(f"WORLD_SIZE={world} processes need MASTER_ADDR and MASTER_PORT: set both")
    return Rank(
        index_from_env(environ, "RANK", "WORLD_SIZE", world),
        world,
        index_from_env(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE", local_world),
        local_world,
        str(Path(shared) / RENDEZVOUS_FILE) if shared else "",
    )


def check_batch(size: int, world: int) -> None:
    """Raise a SettingsError if a batch has fewer than MIN_ROWS_PER_RANK rows for each of `world` processes."""
    minimum = MIN_ROWS_PER_RANK * world
    if world > 1 and size < minimum:
        raise SettingsError(
            f"train.batch_size={size} is the batch of all {world} processes together, and each process needs at least "
            f"{MIN_ROWS_PER_RANK} rows: set train.batch_size={minimum} or more, or use fewer processes (NPROC, NNODES)"
        )


def int_from_env(environ: Mapping[str, str], name: str, minimum: int, default: int) -> int:
    """Return the integer in a variable, or `default` if it is not set. Raise a SettingsError unless it is at least `minimum`."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdigit() or int(text) < minimum:
        raise SettingsError(f"{name}={text} is not a whole number from {minimum}")
    return int(text)


def index_from_env(environ: Mapping[str, str], name: str, count_name: str, count: int) -> int:
    """Return the index in a variable, 0 if not set. Raise a SettingsError unless it is below `count`, the value of the variable `count_name`."""
    index = int_from_env(environ, name, 0, 0)
    if index >= count:
        raise SettingsError(f"{name}={index} is out of range: {count_name}={count} allows 0 to {count - 1}")
    return index


@dataclass(frozen=True)
class HostGroup:
    """Host `index` of `count`. Several hosts rendezvous at `address`:`port`, through the network `interface` if set."""

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    interface: str = ""

    def variables(self, processes: int, local_rank: int) -> dict[str, str]:
        """Return the variables of the process `local_rank` of this host's `processes`."""
        interfaces = {name: self.interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if self.interface}
        return interfaces | {
            "RANK": str(self.index * processes + local_rank),
            "WORLD_SIZE": str(self.count * processes),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def hosts_from_env(environ: Mapping[str, str]) -> HostGroup:
    """Return the hosts on which to start processes: those of NNODES or PET_NNODES, else SageMaker's, else only this one.

    In a process that a launcher started, it is also only this one. Raise a SettingsError if variables contradict each other.
    """
    if started_as_rank(environ):
        return HostGroup()
    names, current, interface = _sagemaker_hosts(environ)
    count_variable = _set_variable(environ, "NNODES")
    count = int_from_env(environ, count_variable, 1, max(1, len(names)))
    if names and count not in (1, len(names)):
        raise SettingsError(f"NNODES={count}, but SM_HOSTS names {len(names)}: {', '.join(names)}; unset NNODES")
    if count == 1:
        return HostGroup()
    port = int_from_env(environ, _set_variable(environ, "MASTER_PORT"), 1, DEFAULT_PORT)
    if names:
        if current not in names:
            raise SettingsError(f"SM_CURRENT_HOST={current} is none of the hosts {', '.join(names)}")
        return HostGroup(count, names.index(current), names[0], port, interface)
    address, index_variable = environ.get(_set_variable(environ, "MASTER_ADDR")), _set_variable(environ, "NODE_RANK")
    if not address or not environ.get(index_variable):
        raise SettingsError(
            f"NNODES={count} hosts need NODE_RANK (0 to {count - 1}) and MASTER_ADDR (the address of the host with NODE_RANK=0)"
        )
    return HostGroup(count, index_from_env(environ, index_variable, count_variable, count), address, port, interface)


def processes_from_env(environ: Mapping[str, str]) -> int | None:
    """Return the processes per host from NPROC, PET_NPROC_PER_NODE or SM_NUM_GPUS; None: count the GPUs; 1 in a started rank."""
    if started_as_rank(environ):
        return 1
    name = next((name for name in ("NPROC", "PET_NPROC_PER_NODE") if environ.get(name)), "NPROC")
    if environ.get(name, "") not in COUNT_GPUS:
        return 1 if environ[name] == "cpu" else int_from_env(environ, name, 1, 1)
    return max(1, int_from_env(environ, "SM_NUM_GPUS", 0, 1)) if environ.get("SM_NUM_GPUS") else None


def index_means_host(environ: Mapping[str, str]) -> bool:
    """Return whether several hosts train together. Then the index of their Kubernetes Job is the host, not the fold."""
    counts = [environ.get(name, "") for name in ("NNODES", "PET_NNODES", "GROUP_WORLD_SIZE")]
    return any(count.isdigit() and int(count) > 1 for count in counts)


def _set_variable(environ: Mapping[str, str], name: str) -> str:
    """Return the variable's name, or with the prefix PET_ (Kubeflow's Trainer) if only that variable is set."""
    return f"PET_{name}" if environ.get(f"PET_{name}") and not environ.get(name) else name


def _sagemaker_hosts(environ: Mapping[str, str]) -> tuple[list[str], str, str]:
    """Return SageMaker's hosts, sorted (the first is the rendezvous host), this host's name, and its network interface.

    They come from SM_HOSTS, SM_CURRENT_HOST and SM_NETWORK_INTERFACE_NAME, or else from SageMaker's `resourceconfig.json`.
    """
    path = Path(environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml") / "input" / "config" / "resourceconfig.json"
    text = environ.get("SM_HOSTS", "")
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
        hosts = json.loads(text) if text else config.get("hosts", [])
        if not isinstance(hosts, list) or not all(isinstance(name, str) for name in hosts):
            raise ValueError('not a list such as ["algo-1", "algo-2"]')
    except (ValueError, AttributeError) as error:
        raise SettingsError(f"SM_HOSTS={text} is not a JSON list of names, or {path} is not valid: {error}") from error
    current = environ.get("SM_CURRENT_HOST") or config.get("current_host", "")
    return sorted(hosts), current, environ.get("SM_NETWORK_INTERFACE_NAME") or config.get("network_interface_name", "")
