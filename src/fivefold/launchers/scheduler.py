"""Run steps in the order of their dependencies.

A `Backend` runs the steps. The Scheduler handles the order, the limit of parallel steps, failed polls, signals and the
exit code. It uses only `name` and `needs` of a step, so that a backend can also run Jobs of several steps.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Protocol

from fivefold.errors import RetryableError
from fivefold.launchers.plan import Step
from fivefold.launchers.status import BY_SIGNAL
from fivefold.launchers.terminal import write_line

MAX_FAILED_POLLS = 20
"""The run fails after this many failed polls in a row."""
SIGNAL_INTERVAL_S = 0.05


class Backend(Protocol):
    """A platform that runs steps. It also shows their output on the screen and writes it to their logs."""

    def start(self, step: Step) -> int | None:
        """Start a step, or attach to a running one, and return None. Return an exit code if there is nothing to do.

        The Scheduler calls this again after a RetryableError (e.g. a quota); the error ends the run only if no other
        step runs.
        """

    def poll(self, running: Sequence[Step]) -> Mapping[str, int]:
        """Return the exit codes, by name, of the `running` steps that have ended, including since a failed poll.

        After a RetryableError the Scheduler polls again, up to MAX_FAILED_POLLS times in a row.
        """

    def stop(self, running: Sequence[Step], number: int, again: bool) -> bool:
        """Handle a signal, or an error that ends the run (as SIGTERM). `again`: it is not the first signal.

        Return True if the steps were asked to end; the Scheduler then waits for them. Return False if they continue without
        this process; the backend has then printed the commands that follow and stop them.
        """

    def describe(self, step: Step) -> str:
        """Return the reason why a step failed, and the path of its log."""


class Clock(Protocol):
    """The time of a run: `left` seconds, whether a step `fits`; `save` is called often."""

    @property
    def left(self) -> float: ...

    def fits(self, step: Step) -> bool: ...

    def save(self) -> None: ...


class Signals:
    """Record SIGINT and SIGTERM while the block runs, instead of exiting."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> "Signals":
        self._before = {n: signal.signal(n, self._record) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: object) -> None:
        self.received.append(number)


class Scheduler:
    """Runs the steps of one plan on one backend."""

    def __init__(
        self,
        steps: Sequence[Step],
        backend: Backend,
        parallel: int = 0,
        poll_interval: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        """Run at most `parallel` steps at the same time (0: no limit), and poll them every `poll_interval`.

        `clock` leaves out steps that do not fit the time, and ends the run.
        """
        self.clock, self.left_out = clock, {}
        self.backend, self.parallel, self.seconds = backend, parallel, poll_interval
        self.steps = {step.name: step for step in steps}
        self.running: dict[str, Step] = {}
        self.ended: dict[str, int] = {}
        self._ready: list[str] = []
        self._sorter = TopologicalSorter({step.name: step.needs for step in steps})
        self._sorter.prepare()
        self._postponed: dict[str, str] = {}
        self._failed_polls = 0

    def run(self) -> int:
        """Run the steps. Return 0, the exit code of the first failed step, or 128 + the first signal.

        Steps that a clock leaves out or stops do not count as failed.
        """
        with Signals() as signals:
            try:
                self._run(signals.received)
            except BaseException:
                self.backend.stop(list(self.running.values()), signal.SIGTERM, again=False)
                raise
        self._print_skipped()
        if signals.received:
            return 128 + signals.received[0]
        return next((code for name, code in self.ended.items() if code and name not in self.left_out), 0)

    def _run(self, received: Sequence[int]) -> None:
        handled, time_over = 0, False
        while True:
            self._start_ready(received)
            if not self.running:
                return
            if self.clock is not None:
                self.clock.save()
                if self.clock.left <= 0 and not time_over and not received:
                    time_over = True
                    self.left_out |= dict.fromkeys(self.running, "the time is over")
                    self.backend.stop(list(self.running.values()), signal.SIGTERM, again=False)
            if handled < len(received):
                if not self.backend.stop(list(self.running.values()), received[handled], again=handled > 0):
                    return
                handled += 1
            self._poll()
            until = time.monotonic() + self.seconds
            while self.running and handled == len(received) and (remaining := until - time.monotonic()) > 0:
                time.sleep(min(remaining, SIGNAL_INTERVAL_S))

    def _start_ready(self, received: Sequence[int]) -> None:
        """Start the ready steps in the order of the plan. After a signal, start none."""
        while not received and (not self.parallel or len(self.running) < self.parallel):
            self._ready = sorted([*self._ready, *self._sorter.get_ready()], key=list(self.steps).index)
            if not self._ready:
                return
            step = self.steps[self._ready[0]]
            if self.clock is not None and not self.clock.fits(step):
                self.left_out[step.name] = "the time that is left is too short"
                self._ready.remove(step.name)
                continue
            try:
                code = self.backend.start(step)
            except RetryableError as error:
                if not self.running:
                    raise
                if self._postponed.get(step.name) != str(error):
                    self._postponed[step.name] = str(error)
                    write_line(f"{step.name} waits: {error}")
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
            self._failed_polls += 1
            if self._failed_polls == 1:
                write_line(f"{error}; trying again")
            if self._failed_polls >= MAX_FAILED_POLLS:
                raise
            return
        self._failed_polls = 0
        for name, code in codes.items():
            self._end(self.running.pop(name), code)

    def _end(self, step: Step, code: int) -> None:
        self.ended[step.name] = code
        if code == 0:
            self._sorter.done(step.name)
            return
        verb = f"was stopped by {BY_SIGNAL[code]}" if code in BY_SIGNAL else "failed"
        write_line(f"{step.name} {verb} (exit code {code}): {self.backend.describe(step)}")

    def _print_skipped(self) -> None:
        for step in self.steps.values():
            missing = [name for name in step.needs if self.ended.get(name) != 0]
            if step.name not in self.ended and step.name not in self.running:
                reason = self.left_out.get(step.name) or (
                    f"it needs {', '.join(missing)}" if missing else "a signal arrived before"
                )
                write_line(f"{step.name} was not started: {reason}")
