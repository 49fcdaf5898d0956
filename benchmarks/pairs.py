"""Fresh processes in turns, and what their figures say: medians of paired ratios with their spread.

A machine's speed drifts by more than the few percent in question, so that figures of two runs may not be compared.
Here A and B take turns, A B A B …, each in a process of its own with the same number of threads; only the ratio of two
neighbours counts, and the median over the pairs with its quartiles and extremes is the figure.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.options import ROOT
from benchmarks.turns import VARIABLE, take_turns
from fivefold.errors import FivefoldError
from fivefold.launchers.local import settings_variables
from fivefold.progress import track

A = TypeVar("A")
B = TypeVar("B")
LINES_OF_A_FAILURE = 12
METER = Path(__file__).with_name("meter.py")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Spread:
    """The median of `n` values, with quartiles and extremes."""

    median: float
    q1: float
    q3: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value at least."""
        if len(values) == 1:
            return cls(*[float(values[0])] * 5, n=1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, min(values), max(values), len(values))

    def as_json(self) -> dict[str, float]:
        return {name: float(f"{value:.6g}") if name != "n" else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Ended:
    """A process that ended well: seconds on the wall and of all cores, peak of memory, the JSON of its last line."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    told: Any
    begun: float
    """`time.monotonic()` before it was started, which is the same clock in all processes."""


@dataclass(frozen=True)
class Call:
    """`python ARGUMENTS` with variables of its own."""

    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)


def run(arguments: Sequence[str], threads: int, variables: Mapping[str, str] | None = None) -> Ended:
    """`python ARGUMENTS` as a fresh process from the repository's root; a FivefoldError tells its last words.

    `threads` 0: as many as it takes by itself. What it and the processes that it waited for used is counted
    together; the peak is the largest one's.
    """
    with _started(Call(arguments, variables or {}), threads) as end:
        return end()


def side_by_side(first: Call, second: Call, threads: int) -> tuple[Ended, Ended]:
    """Both as fresh processes that take turns (`turns.my_turn`): one works while the other waits."""
    with ExitStack() as stack:
        ours, ends = [], []
        for call in (first, second):
            own, its = socket.socketpair()
            with its:
                told = replace(call, variables={**call.variables, VARIABLE: str(its.fileno())})
                ends.append(stack.enter_context(_started(told, threads, its.fileno())))
            ours.append(stack.enter_context(own))
        take_turns(ours)
        one, other = (end() for end in ends)
    return one, other


@contextmanager
def _started(call: Call, threads: int, *lines: int) -> Iterator[Callable[[], Ended]]:
    """The process, which has the files `lines` too; what waits for it. It does not outlive this context, nor does what it started."""
    with tempfile.TemporaryDirectory() as folder:
        said, logged, metered = (Path(folder) / name for name in ("stdout", "stderr", "used.json"))
        with open(said, "wb") as stdout, open(logged, "wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", METER, metered, sys.executable, *call.arguments],
                cwd=ROOT,
                env=_environment(threads) | dict(call.variables),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                pass_fds=lines,
            )
        try:
            yield lambda: _ended(process, call, said, logged, metered)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ended(process: subprocess.Popen, call: Call, said: Path, logged: Path, metered: Path) -> Ended:
    process.wait()
    words = f"python {' '.join(call.arguments)[:300]}"
    if not metered.is_file():
        raise FivefoldError(f"{words}: {logged.read_text(errors='replace')}")
    used = json.loads(metered.read_text(encoding="utf-8"))
    if code := used.pop("code"):
        tail = logged.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
        raise FivefoldError("\n  ".join([f"{words} ended with {code}:", *tail]))
    return Ended(**used, told=_last_json(said.read_text(encoding="utf-8", errors="replace")))


def in_turns(first: Callable[[], A], second: Callable[[A], B], pairs: int, label: str) -> list[tuple[A, B]]:
    """What both give, in turns, so many times, under a progress bar; the second one is told what the first one gave."""
    found = []
    for _ in track(range(pairs), pairs, label):
        given = first()
        found.append((given, second(given)))
    return found


def repeated(what: Callable[[], A], times: int, label: str) -> list[A]:
    """What it gives, so many times, under a progress bar."""
    return [what() for _ in track(range(times), times, label)]


def _environment(threads: int) -> dict[str, str]:
    """This process's variables without those that are settings of stages or speak of threads, and with these threads."""
    dropped = {*settings_variables(os.environ), *THREADS}
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SM_")}
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | (dict.fromkeys(THREADS, str(threads)) if threads else {})


def _last_json(text: str) -> Any:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
