"""Processes that train together: what they are given, and what their ends amount to."""

import os
import signal
import socket

import pytest

from fivefold.distributed.launch import as_one, free_port, shared_variables, start
from fivefold.distributed.place import Hosts
from fivefold.errors import FivefoldError, RetryableError
from fivefold.machine import count_cores

TERM, KILL, SEGV = -signal.SIGTERM, -signal.SIGKILL, -signal.SIGSEGV


@pytest.mark.parametrize(
    ("codes", "received", "expected"),
    [
        ((0, 0), (), 0),
        ((75, 65), (), 65),
        ((64, 64), (), 64),
        ((1, 75), (), 1),
        ((75, 143), (), 143),
        ((TERM, 75), (), 143),
        ((75, 75), (), 75),
        ((0, 75), (), 75),
        ((143, 143), (15,), 143),
        ((130, KILL), (2, 2), 130),
        ((0, 0), (15,), 0),
    ],
)
def test_who_says_what_happened_goes_before_who_misses_it(codes, received, expected: int) -> None:
    assert as_one(dict(enumerate(codes)), len(codes), received) == expected


def test_a_process_that_was_killed_is_worth_another_try_and_a_crash_is_ours() -> None:
    with pytest.raises(RetryableError, match=r"process 5 of 8 was killed by SIGKILL.*memory runs out"):
        as_one({4: 75, 5: KILL}, 8)
    with pytest.raises(FivefoldError, match=r"process 1 of 2 crashed \(SIGSEGV\)") as caught:
        as_one({0: 75, 1: SEGV}, 2)
    assert caught.value.exit_code == 1


def test_cores_go_round_and_what_the_user_says_stays() -> None:
    shared = shared_variables(Hosts(), 2, {"PATH": "/bin"})
    assert shared["OMP_NUM_THREADS"] == str(max(1, count_cores() // 2))
    assert (shared["PATH"], shared["FIVEFOLD_PARENT"]) == ("/bin", str(os.getpid()))
    assert shared_variables(Hosts(), 2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert "GLOO_SOCKET_IFNAME" not in shared_variables(Hosts(2, 0, "a", 1), 2, {})


def test_a_free_port_can_be_listened_at() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", free_port()))


def test_what_all_say_is_the_code(capfd: pytest.CaptureFixture[str]) -> None:
    environ = {**os.environ, "NODE_RANK": "0"}
    assert start(["no-such-stage"], Hosts(), 2, environ) == 64
    assert capfd.readouterr().err.count("no-such-stage") == 2
