"""Runs steps in the order of their needs: which wait, which run, which ended how, and what a signal does.

Where steps run is the matter of a `Backend`; the order, the limit of steps side by side, failed polls, signals and the
exit code are the Scheduler's.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Generic, Protocol, TypeVar

from fivefold.errors import RetryableError
from fivefold.launchers.screen import Screen
from fivefold.launchers.status import BY_SIGNAL

POLLS_IN_VAIN = 20
"""How many polls in a row may fail before the platform is given up."""
SECONDS_BETWEEN_SIGNALS = 0.05
SECONDS_BETWEEN_FEET = 0.5


class Node(Protocol):
    """What a Scheduler runs: a Step, or the Job of several; it starts when all that it needs have ended well."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...


N = TypeVar("N", bound=Node)
Own = TypeVar("Own", bound=Node, contravariant=True)


class Backend(Protocol[Own]):
    """Where steps run. It shows what they print on the Scheduler's screen and in their logs by itself."""

    def start(self, step: Own, alone: bool) -> int | None:
        """Starts a step, or takes up one that runs already: None. An exit code where nothing is left to do.

        `alone`: no other step runs until this one has ended. Called again, later, after a RetryableError (a quota,
        say), which ends the run only if nothing else runs.
        """

    def poll(self, running: Sequence[Own]) -> Mapping[str, int]:
        """The exit codes, by name, of those of `running` that have ended; also where an earlier poll has failed.

        A RetryableError has it called again, POLLS_IN_VAIN times.
        """

    def stop(self, running: Sequence[Own], number: int, again: bool) -> bool:
        """Acts on a signal, or on an error that ends the run (as SIGTERM); `again` where one came before.

        True: the steps were told to end, and are waited for. False: they go on without this process, and the backend has
        printed how they are followed again, and stopped.
        """

    def describe(self, step: Own) -> str:
        """How far a running step is, in a few words; why a step failed, and where to read more."""


class Signals:
    """Notes SIGINT and SIGTERM while the block runs, instead of dying of them."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> "Signals":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received.append(number)


class Scheduler(Generic[N]):
    """Runs the steps of one plan on one backend."""

    def __init__(
        self, steps: Sequence[N], backend: Backend[N], screen: Screen, parallel: int = 0, seconds: float = 1.0
    ) -> None:
        """At most `parallel` steps run side by side (0: all that can), polled every so many seconds."""
        self.backend, self.screen, self.parallel, self.seconds = backend, screen, parallel, seconds
        self.steps = {step.name: step for step in steps}
        self.running: dict[str, N] = {}
        self.ended: dict[str, int] = {}
        self._ready: list[str] = []
        self._sorter = TopologicalSorter({step.name: step.needs for step in steps})
        self._sorter.prepare()
        self._postponed: dict[str, str] = {}
        self._polls_in_vain = 0
        self._last_foot = 0.0

    def run(self) -> int:
        """Runs all that can run; 0, the exit code of the first step that failed, or 128 + the first signal."""
        with Signals() as signals:
            try:
                self._run(signals.received)
            except BaseException:
                self.backend.stop(list(self.running.values()), signal.SIGTERM, again=False)
                raise
            finally:
                self.screen.foot("")
        self._print_what_was_not_started()
        if signals.received:
            return 128 + signals.received[0]
        return next((code for code in self.ended.values() if code), 0)

    def _run(self, received: Sequence[int]) -> None:
        passed_on = 0
        while True:
            self._start_ready(received)
            if not self.running:
                return
            if passed_on < len(received):
                steps, number = list(self.running.values()), received[passed_on]
                if not self.backend.stop(steps, number, again=passed_on > 0):
                    return
                passed_on += 1
            self._poll()
            self._show_progress()
            until = time.monotonic() + self.seconds
            while self.running and passed_on == len(received) and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, SECONDS_BETWEEN_SIGNALS))

    def _start_ready(self, received: Sequence[int]) -> None:
        """Starts what can start, in the order of the plan; nothing more after a signal."""
        order = list(self.steps)
        while not received and (not self.parallel or len(self.running) < self.parallel):
            self._ready = sorted([*self._ready, *self._sorter.get_ready()], key=order.index)
            if not self._ready:
                return
            step = self.steps[self._ready[0]]
            alone = self.parallel == 1 or (not self.running and len(self._ready) == 1)
            try:
                code = self.backend.start(step, alone)
            except RetryableError as error:
                if not self.running:
                    raise
                if self._postponed.get(step.name) != str(error):
                    self._postponed[step.name] = str(error)
                    self.screen.line(f"{step.name} waits: {error}")
                return
            self._ready.remove(step.name)
            if code is None:
                self.running[step.name] = step
            else:
                self._end(step, code)

    def _poll(self) -> None:
        try:
            codes = self.backend.poll(list(self.running.values()))
        except RetryableError as error:
            self._polls_in_vain += 1
            if self._polls_in_vain == 1:
                self.screen.line(f"{error}; asking again")
            if self._polls_in_vain >= POLLS_IN_VAIN:
                raise
            return
        self._polls_in_vain = 0
        for name, code in codes.items():
            self._end(self.running.pop(name), code)

    def _end(self, step: N, code: int) -> None:
        self.ended[step.name] = code
        if code == 0:
            self._sorter.done(step.name)
            return
        verb = f"was stopped by {BY_SIGNAL[code]}" if code in BY_SIGNAL else "failed"
        self.screen.line(f"{step.name} {verb} (exit code {code}): {self.backend.describe(step)}")

    def _show_progress(self) -> None:
        """Keeps the terminal's status line; a step that runs alone shows its own progress."""
        if len(self.running) < 2:
            self.screen.foot("")
        elif self.screen.terminal and time.monotonic() - self._last_foot > SECONDS_BETWEEN_FEET:
            self._last_foot = time.monotonic()
            parts = [f"{name} {self.backend.describe(step)}".rstrip() for name, step in self.running.items()]
            self.screen.foot(" | ".join([f"{len(self.ended)} of {len(self.steps)} steps done", *parts]))

    def _print_what_was_not_started(self) -> None:
        for step in self.steps.values():
            missing = [name for name in step.needs if self.ended.get(name) != 0]
            if step.name not in self.ended and step.name not in self.running:
                reason = f"it needs {', '.join(missing)}" if missing else "a signal came before"
                self.screen.line(f"{step.name} was not started: {reason}")
