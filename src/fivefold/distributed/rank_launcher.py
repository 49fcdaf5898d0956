"""Run one stage as several processes of this host, forward signals to them and merge their exit codes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from fivefold.contract.s3.sync import SCRATCH
from fivefold.distributed.ranks import PARENT, SHARED_SCRATCH, HostGroup
from fivefold.errors import FivefoldError, RetryableError
from fivefold.launchers.scheduler import SIGNAL_INTERVAL_S, Signals
from fivefold.system import GLIBC_TUNABLES, count_cores

KILL_AFTER_S = 30.0
"""After one process failed, the others have this many seconds to notice at their next communication, and to end."""
ROOT_CAUSE_CODES = (64, 65, 66, 1)
"""Exit codes of the process that caused the failure. 75 may only mean that another process is gone."""


def run_ranks(arguments: Sequence[str], hosts: HostGroup, processes: int, environ: Mapping[str, str]) -> int:
    """Run `python -m fivefold.jobs` with `arguments` in `processes` processes; return the exit code of the one that caused a failure.

    Return 130 or 143 after SIGINT or SIGTERM, which are forwarded; a second signal kills. Errors as for `merge_exit_codes`.
    """
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", "fivefold.jobs", *arguments]
    shared = shared_variables(hosts, processes, environ)
    with Signals() as signals, tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        children: list[subprocess.Popen[bytes]] = []
        try:
            for local_rank in range(processes):
                variables = {**shared, SHARED_SCRATCH: scratch, **hosts.variables(processes, local_rank)}
                # a new session: Ctrl-C reaches the child once, from this process, not also from the terminal
                children.append(subprocess.Popen(command, env=variables, start_new_session=True))
            killed = _wait(children, signals)
        except BaseException:
            for child in children:
                child.kill()
            raise
    first = hosts.index * processes
    codes = {first + n: child.returncode for n, child in enumerate(children) if child not in killed}
    return merge_exit_codes(codes, hosts.count * processes, signals.received)


def shared_variables(hosts: HostGroup, processes: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of all processes of this host. Variables that the user has set stay."""
    # on one host use the loopback interface only
    is_local = hosts.count == 1 and sys.platform.startswith("linux")
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if is_local else {}
    # the same number of threads for every process: another number would change the last bits of results
    threads = {"OMP_NUM_THREADS": str(max(1, count_cores() // processes)), "GOMP_SPINCOUNT": "20000"}
    return {**loopback, **threads, "GLIBC_TUNABLES": GLIBC_TUNABLES, **environ, PARENT: str(os.getpid())}


def _wait(children: Sequence[subprocess.Popen[bytes]], signals: Signals) -> list[subprocess.Popen[bytes]]:
    """Wait for all to end, and forward signals. Return the processes that were killed because they did not end."""
    handled, forwarded, failed_at = 0, 0, None
    while running := [child for child in children if child.poll() is None]:
        while handled < len(signals.received):
            forwarded = signals.received[handled]
            _send(running, forwarded if handled == 0 else signal.SIGKILL)
            handled += 1
        failed = [child.returncode for child in children if child.returncode]
        if failed and failed_at is None:
            failed_at = time.monotonic()
            if not forwarded and (stopped := _signal_of(failed[0])) in (signal.SIGTERM, signal.SIGINT):
                forwarded = stopped
                _send(running, forwarded)
        if failed_at is not None and not forwarded and time.monotonic() - failed_at > KILL_AFTER_S:
            _send(running, signal.SIGKILL)
            for child in running:
                child.wait()
            return running
        time.sleep(SIGNAL_INTERVAL_S)
    return []


def _send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        child.send_signal(number)
        child.send_signal(signal.SIGCONT)  # a stopped process does not handle signals


def merge_exit_codes(codes: Mapping[int, int], world: int, received: Sequence[int] = ()) -> int:
    """Merge the exit codes of all ranks (negative: signals) to one, after the signals `received`.

    Codes that name a cause precede 75, the code of ranks that lost another one. Raise a RetryableError if a process
    was killed, a FivefoldError if one crashed.
    """
    failed = {rank: code for rank, code in codes.items() if code}
    if received and failed:
        return 128 + received[0]
    if causes := [code for code in failed.values() if code in ROOT_CAUSE_CODES]:
        return causes[0]
    for rank, code in failed.items():
        if code == -signal.SIGKILL:
            raise RetryableError(
                f"process {rank} of {world} was killed by SIGKILL, as happens if memory runs out: the same command resumes "
                "from the last checkpoint; a smaller train.batch_size or fewer processes (NPROC) need less memory"
            )
        if _signal_of(code) in (signal.SIGTERM, signal.SIGINT):
            return 128 + _signal_of(code)
        if code < 0:
            raise FivefoldError(
                f"process {rank} of {world} crashed ({signal.Signals(-code).name}); see its last lines above"
            )
    return next(iter(failed.values()), 0)


def _signal_of(code: int) -> int:
    """Return the signal of an exit code, or 0 if there is none."""
    return -code if code < 0 else max(0, code - 128)
