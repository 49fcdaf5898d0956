"""The hosts that train one model together, and how many processes each has.

They are named by NNODES, NODE_RANK and MASTER_ADDR (or PET_…, as Kubeflow's Trainer writes them) or by SageMaker's
SM_HOSTS; NPROC or SM_NUM_GPUS say how many processes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fivefold.contract.files import read_json
from fivefold.contract.job import base_dir
from fivefold.contract.place import below, whole
from fivefold.errors import SettingsError

PORT = 29500
"""Where hosts meet if nobody says it; torchrun's own."""
COUNTED = ("", "auto", "gpu")
"""What stands for as many processes as there are GPUs."""


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
    port = whole(environ, _either(environ, "MASTER_PORT"), 1, PORT if count > 1 else 0)
    if count == 1:
        return Hosts(port=port)
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
    path = base_dir(environ) / "input" / "config" / "resourceconfig.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
