"""Run fresh processes that alternate, and summarise what they measure.

The speed of a machine drifts by more than the few percent to be measured, so two separate runs are never compared. A and B alternate
(A B A B …), each in its own process with the same number of threads. Only the ratio of neighbours counts. Two processes can also
run at the same time: each calls `wait_for_turn` before a pass, and one waits while the other works.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks.options import ROOT
from fivefold.errors import FivefoldError
from fivefold.launchers.local import settings_variables
from fivefold.progress import track

T = TypeVar("T")
RUSAGE = Path(__file__).with_name("rusage.py")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TURN_SOCKET = "BENCHMARK_TURN_SOCKET"
"""Variable with the number of the socket that tells a process its turn. If it is not set, the process is measured alone."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, quartiles, extremes and number `n` of the values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    numbers = {"median": median, "q1": q1, "q3": q3, "least": min(values), "most": max(values)}
    return {name: float(f"{value:.6g}") for name, value in numbers.items()} | {"n": len(values)}


@dataclass(frozen=True)
class Call:
    """`python ARGUMENTS` with additional environment variables."""

    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)


class Ended(NamedTuple):
    """A process that succeeded: wall seconds, peak memory, `time.monotonic()` at the start, JSON of the last line of its output."""

    seconds: float
    peak_bytes: int
    started: float
    output: Any


def run(call: Call, threads: int) -> Ended:
    """Run a fresh process from the root of the repository. Raises FivefoldError with its last lines if it fails.

    With `threads` 0 the process chooses the number of threads.
    """
    with _started(call, threads) as wait:
        return wait()


def run_side_by_side(first: Call, second: Call, threads: int) -> tuple[Ended, Ended]:
    """Run both as fresh processes that alternate: one works while the other waits in `wait_for_turn`."""
    with ExitStack() as stack:
        sockets, waits = [], []
        for call in (first, second):
            own, other = socket.socketpair()
            with other:
                variables = {**call.variables, TURN_SOCKET: str(other.fileno())}
                waits.append(stack.enter_context(_started(Call(call.arguments, variables), threads, other.fileno())))
            sockets.append(stack.enter_context(own))
        waiting = deque(each for each in sockets if each.recv(1))
        while waiting:
            turn = waiting.popleft()
            turn.sendall(b".")
            if turn.recv(1):
                waiting.append(turn)
        return waits[0](), waits[1]()


def wait_for_turn() -> None:
    """Let the other process work, and return when it is this one's turn. Without another process, return at once."""
    turn = _turn_socket()
    if turn is not None:
        turn.sendall(b".")
        if not turn.recv(1):
            raise SystemExit("the process that gives the turns has ended")


@lru_cache(maxsize=1)
def _turn_socket() -> socket.socket | None:
    number = os.environ.get(TURN_SOCKET)
    return socket.socket(fileno=int(number)) if number else None


def repeat(measure: Callable[[], T], times: int, label: str) -> list[T]:
    """Call `measure` `times` times with a progress bar; return the results."""
    return [measure() for _ in track(range(times), times, label)]


class Timer:
    """A clock that starts when it is created."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def stop(self, images: int) -> dict[str, float]:
        """Return a pass: its images and seconds."""
        return {"images": images, "seconds": time.perf_counter() - self.started}


def timed_passes(output: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the passes of a process without the first, which is the warm-up. A single pass counts."""
    return output["passes"][1:] or output["passes"]


def rate(passes: Sequence[Mapping[str, float]]) -> float:
    """Return the images per second of several passes together."""
    return sum(each["images"] for each in passes) / sum(each["seconds"] for each in passes)


def ratio_of_passes(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return images/s of the first process ÷ images/s of the second: the median over neighbouring passes."""
    pairs = zip(timed_passes(first), timed_passes(second), strict=True)
    return statistics.median(rate([a]) / rate([b]) for a, b in pairs)


@contextmanager
def _started(call: Call, threads: int, *files: int) -> Iterator[Callable[[], Ended]]:
    """Start the process with the open `files`; yield a function that waits for it. Leaving the context kills it and its children."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr, used = (Path(folder) / name for name in ("stdout", "stderr", "used.json"))
        with open(stdout, "wb") as out, open(stderr, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", RUSAGE, used, sys.executable, *call.arguments],
                cwd=ROOT,
                env=_environment(threads) | dict(call.variables),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,
                pass_fds=files,
            )

        def wait() -> Ended:
            process.wait()
            command, lines = f"python {' '.join(call.arguments)[:300]}", stderr.read_text(errors="replace").splitlines()
            usage = json.loads(used.read_text(encoding="utf-8")) if used.is_file() else {"code": process.returncode}
            if code := usage.pop("code"):
                raise FivefoldError("\n  ".join([f"{command} ended with {code}:", *lines[-12:]]))
            return Ended(**usage, output=_last_json(stdout.read_text(encoding="utf-8", errors="replace")))

        try:
            yield wait
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _environment(threads: int) -> dict[str, str]:
    """Return the variables of this process without settings of stages, and with `threads` as the number of threads."""
    dropped = {*settings_variables(os.environ), *THREADS}
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SM_")}
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | (dict.fromkeys(THREADS, str(threads)) if threads else {})


def _last_json(text: str) -> Any:
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return None
