import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fivefold.errors import RetryableError
from fivefold.launchers.scheduler import MAX_FAILED_POLLS, Scheduler


@dataclass(frozen=True)
class Step:
    name: str
    needs: tuple[str, ...] = ()


@dataclass
class ScriptedBackend:
    """Each running step ends at the next poll with its code in `codes`; `capacity` steps can run, `done` steps have nothing to do."""

    codes: Mapping[str, int] = field(default_factory=dict)
    capacity: int = 99
    done: Sequence[str] = ()
    failures: int = 0
    interrupt: bool = False
    waits_for_stopped: bool = True
    log: list[Any] = field(default_factory=list)
    running: int = 0

    def start(self, step: Step) -> int | None:
        if self.running >= self.capacity:
            raise RetryableError("the quota is used up")
        self.log.append(step.name)
        self.running += step.name not in self.done
        return 0 if step.name in self.done else None

    def poll(self, running: Sequence[Step]) -> dict[str, int]:
        if self.failures:
            self.failures -= 1
            raise RetryableError("away")
        if self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            self.interrupt = False
            return {}
        self.running = 0
        self.log.append([step.name for step in running])
        return {step.name: self.codes.get(step.name, 0) for step in running}

    def stop(self, running: Sequence[Step], number: int, again: bool) -> bool:
        self.log.append((number, again))
        return self.waits_for_stopped

    def describe(self, step: Step) -> str:
        return "as it is"


STEPS = [Step("a"), Step("b", ("a",)), Step("c", ("a",)), Step("d", ("b", "c")), Step("e", ("b",))]


def run(backend: ScriptedBackend, parallel: int = 0) -> int:
    return Scheduler(STEPS, backend, parallel, poll_interval=0.001).run()


@pytest.mark.parametrize(
    ("backend", "parallel", "log"),
    [
        (ScriptedBackend(), 0, ["a", ["a"], "b", "c", ["b", "c"], "d", "e", ["d", "e"]]),
        (ScriptedBackend(), 1, ["a", ["a"], "b", ["b"], "c", ["c"], "d", ["d"], "e", ["e"]]),
        (ScriptedBackend(done=["a", "b"]), 2, ["a", "b", "c", "e", ["c", "e"], "d", ["d"]]),
        (ScriptedBackend(capacity=1), 0, ["a", ["a"], "b", ["b"], "c", ["c"], "d", ["d"], "e", ["e"]]),
        (ScriptedBackend(failures=MAX_FAILED_POLLS - 1), 0, ["a", ["a"], "b", "c", ["b", "c"], "d", "e", ["d", "e"]]),
    ],
)
def test_steps_start_in_order_within_the_capacity(capsys, backend, parallel, log):
    failed_polls, is_limited = backend.failures, backend.capacity == 1
    assert (run(backend, parallel), backend.log) == (0, log)
    output = capsys.readouterr().err
    assert output.count("away; ") == bool(failed_polls)
    assert output.count("c waits: the quota is used up") == is_limited


def test_first_failure_sets_the_exit_code_and_dependent_steps_do_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ScriptedBackend(codes={"b": 66, "c": 143})
    assert run(backend) == 66
    assert backend.log == ["a", ["a"], "b", "c", ["b", "c"]]
    assert capsys.readouterr().err.splitlines() == [
        "b failed (exit code 66): as it is",
        "c was stopped by SIGTERM (exit code 143): as it is",
        "d was not started: it needs b, c",
        "e was not started: it needs b",
    ]


@pytest.mark.parametrize(("waits", "log"), [(True, [(15, False), ["a"]]), (False, [(15, False)])])
def test_signal_stops_the_backend_and_no_more_steps_start(waits: bool, log: list[Any]) -> None:
    backend = ScriptedBackend(interrupt=True, waits_for_stopped=waits)
    assert run(backend) == 143
    assert backend.log == ["a", *log]


@pytest.mark.parametrize("backend", [ScriptedBackend(failures=MAX_FAILED_POLLS), ScriptedBackend(capacity=0)])
def test_platform_that_stays_unreachable_raises_an_error_and_steps_are_stopped(backend: ScriptedBackend) -> None:
    with pytest.raises(RetryableError):
        run(backend)
    assert backend.log[-1] == (signal.SIGTERM, False)
