"""The order, the limits and the ends of steps, on a backend whose steps end as a script says."""

import io
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fivefold.errors import RetryableError
from fivefold.launchers.scheduler import MAX_FAILED_POLLS, Scheduler
from fivefold.launchers.terminal import SharedTerminal


@dataclass(frozen=True)
class Node:
    name: str
    needs: tuple[str, ...] = ()


@dataclass
class Scripted:
    """Each running step ends at the next poll with its code of `codes`; `room` steps fit, `done` have nothing to do."""

    codes: Mapping[str, int] = field(default_factory=dict)
    room: int = 99
    done: Sequence[str] = ()
    failures: int = 0
    interrupt: bool = False
    waits_for_stopped: bool = True
    log: list[Any] = field(default_factory=list)
    running: int = 0

    def start(self, step: Node, alone: bool) -> int | None:
        if self.running >= self.room:
            raise RetryableError("the quota is used up")
        self.log.append(f"{step.name}{' alone' if alone else ''}")
        self.running += step.name not in self.done
        return 0 if step.name in self.done else None

    def poll(self, running: Sequence[Node]) -> dict[str, int]:
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

    def stop(self, running: Sequence[Node], number: int, again: bool) -> bool:
        self.log.append((number, again))
        return self.waits_for_stopped

    def describe(self, step: Node) -> str:
        return "as it is"


GRAPH = [Node("a"), Node("b", ("a",)), Node("c", ("a",)), Node("d", ("b", "c")), Node("e", ("b",))]


def run(backend: Scripted, parallel: int = 0) -> tuple[int, str]:
    stream = io.StringIO()
    code = Scheduler(GRAPH, backend, SharedTerminal(stream), parallel, poll_interval=0.001).run()
    return code, stream.getvalue()


@pytest.mark.parametrize(
    ("backend", "parallel", "log"),
    [
        (Scripted(), 0, ["a alone", ["a"], "b", "c", ["b", "c"], "d", "e", ["d", "e"]]),
        (Scripted(), 1, ["a alone", ["a"], "b alone", ["b"], "c alone", ["c"], "d alone", ["d"], "e alone", ["e"]]),
        (Scripted(done=["a", "b"]), 2, ["a alone", "b", "c", "e", ["c", "e"], "d alone", ["d"]]),
        (Scripted(room=1), 0, ["a alone", ["a"], "b", ["b"], "c", ["c"], "d", ["d"], "e alone", ["e"]]),
        (Scripted(failures=MAX_FAILED_POLLS - 1), 0, ["a alone", ["a"], "b", "c", ["b", "c"], "d", "e", ["d", "e"]]),
    ],
)
def test_steps_start_in_order_as_far_as_there_is_room(backend: Scripted, parallel: int, log: list[Any]) -> None:
    failed_polls, limited = backend.failures, backend.room == 1
    code, said = run(backend, parallel)
    assert (code, backend.log) == (0, log)
    assert said.count("away; ") == bool(failed_polls)
    assert said.count("c waits: the quota is used up") == limited


def test_the_first_failure_is_the_exit_code_and_what_needs_it_does_not_start() -> None:
    backend = Scripted(codes={"b": 66, "c": 143})
    code, said = run(backend)
    assert code == 66
    assert backend.log == ["a alone", ["a"], "b", "c", ["b", "c"]]
    assert said.splitlines() == [
        "b failed (exit code 66): as it is",
        "c was stopped by SIGTERM (exit code 143): as it is",
        "d was not started: it needs b, c",
        "e was not started: it needs b",
    ]


@pytest.mark.parametrize(("waits", "log"), [(True, [(15, False), ["a"]]), (False, [(15, False)])])
def test_a_signal_stops_the_backend_and_nothing_more_starts(waits: bool, log: list[Any]) -> None:
    backend = Scripted(interrupt=True, waits_for_stopped=waits)
    code, said = run(backend)
    assert code == 143
    assert backend.log == ["a alone", *log]
    assert "b was not started" in said


@pytest.mark.parametrize("backend", [Scripted(failures=MAX_FAILED_POLLS), Scripted(room=0)])
def test_a_platform_that_stays_away_is_an_error_and_steps_are_stopped(backend: Scripted) -> None:
    with pytest.raises(RetryableError):
        run(backend)
    assert backend.log[-1] == (signal.SIGTERM, False)
