"""One stage as several processes of this host that train together: started, told of signals, and their ends as one exit code."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from fivefold.contract.storage import SCRATCH
from fivefold.distributed.place import PARENT, SHARED_SCRATCH, Hosts
from fivefold.errors import FivefoldError, RetryableError
from fivefold.launchers.scheduler import SECONDS_BETWEEN_SIGNALS, Signals
from fivefold.machine import GLIBC_TUNABLES, count_cores

SECONDS_FOR_THE_REST = 30.0
"""Where one failed, the others find out at the next thing that they tell it, and have so long to end."""
PORTS = range(20_000, 29_000)
OF_ITS_OWN = (64, 65, 66, 1)
"""Exit codes that say what went wrong; 75 may only mean that another process is gone."""


def start(arguments: Sequence[str], hosts: Hosts, processes: int, environ: Mapping[str, str]) -> int:
    """Runs `python -m fivefold.jobs` with `arguments` as so many processes; the exit code of the one that says what happened.

    130 or 143 after SIGINT or SIGTERM, which are passed on; a second one kills. Errors as for `as_one`.
    """
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", "fivefold.jobs", *arguments]
    port, shared = hosts.port or free_port(), shared_variables(hosts, processes, environ)
    with Signals() as signals, tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        children: list[subprocess.Popen[bytes]] = []
        try:
            for local_rank in range(processes):
                own = {**shared, SHARED_SCRATCH: scratch, **hosts.variables(processes, local_rank, port)}
                # a session of its own: what Ctrl-C sends to the terminal's processes comes once, from here
                children.append(subprocess.Popen(command, env=own, start_new_session=True))
            killed = _wait(children, signals)
        except BaseException:
            for child in children:
                child.kill()
            raise
    first = hosts.index * processes
    codes = {first + n: child.returncode for n, child in enumerate(children) if child not in killed}
    return as_one(codes, hosts.count * processes, signals.received)


def shared_variables(hosts: Hosts, processes: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of all processes of this host; what the user has set stays."""
    # where all are on one host nothing that they tell each other need leave it
    stays = hosts.count == 1 and sys.platform.startswith("linux")
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if stays else {}
    # as many threads as go round: another number would give other bits
    threads = {"OMP_NUM_THREADS": str(max(1, count_cores() // processes)), "GOMP_SPINCOUNT": "20000"}
    return {**loopback, **threads, "GLIBC_TUNABLES": GLIBC_TUNABLES, **environ, PARENT: str(os.getpid())}


def free_port() -> int:
    """A port of this host that nobody listens at, below those that outgoing connections take by themselves."""
    while True:
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return port


def _wait(children: Sequence[subprocess.Popen[bytes]], signals: Signals) -> list[subprocess.Popen[bytes]]:
    """Waits for all to end, and passes signals on; those that had to be killed since they did not end by themselves."""
    passed_on, told, since = 0, 0, None
    while running := [child for child in children if child.poll() is None]:
        while passed_on < len(signals.received):
            told = signals.received[passed_on]
            _send(running, told if passed_on == 0 else signal.SIGKILL)
            passed_on += 1
        failed = [child.returncode for child in children if child.returncode]
        if failed and since is None:
            since = time.monotonic()
            if not told and (stopped := _signal_of(failed[0])) in (signal.SIGTERM, signal.SIGINT):
                told = stopped
                _send(running, told)
        if since is not None and not told and time.monotonic() - since > SECONDS_FOR_THE_REST:
            _send(running, signal.SIGKILL)
            for child in running:
                child.wait()
            return running
        time.sleep(SECONDS_BETWEEN_SIGNALS)
    return []


def _send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)
            child.send_signal(signal.SIGCONT)  # one that stands still hears nothing


def as_one(codes: Mapping[int, int], world: int, received: Sequence[int] = ()) -> int:
    """The exit code that those of all ranks amount to, negative ones being signals, after the signals `received`.

    What says what went wrong goes before 75, which others end with that miss a process. Raises RetryableError for one
    that was killed, FivefoldError for one that crashed.
    """
    failed = {rank: code for rank, code in codes.items() if code}
    if not failed:
        return 0
    if received:
        return 128 + received[0]
    for code in failed.values():
        if code in OF_ITS_OWN:
            return code
    for rank, code in failed.items():
        if code == -signal.SIGKILL:
            raise RetryableError(
                f"process {rank} of {world} was killed by SIGKILL, as is done where memory runs out: the same command goes on "
                "from the last checkpoint; a smaller train.batch_size or fewer processes (NPROC) take less"
            )
        if _signal_of(code) in (signal.SIGTERM, signal.SIGINT):
            return 128 + _signal_of(code)
        if code < 0:
            raise FivefoldError(
                f"process {rank} of {world} crashed ({signal.Signals(-code).name}); its last lines are above"
            )
    return next(iter(failed.values()))


def _signal_of(code: int) -> int:
    """The signal that an exit code speaks of; 0 for none."""
    return -code if code < 0 else max(0, code - 128)
