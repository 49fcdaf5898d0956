"""Launching the ranks of a training: their environment variables and merged exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from fivefold.distributed.rank_launcher import merge_exit_codes, run_ranks, shared_variables
from fivefold.distributed.ranks import SHARED_SCRATCH, HostGroup, rank_from_env
from fivefold.errors import FivefoldError, RetryableError
from fivefold.system import count_cores

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
def test_exit_codes_with_a_cause_take_precedence_over_lost_connections(codes, received, expected):
    assert merge_exit_codes(dict(enumerate(codes)), len(codes), received) == expected


def test_killed_process_is_retryable_and_a_crash_is_an_internal_error():
    with pytest.raises(RetryableError, match=r"process 5 of 8 was killed by SIGKILL.*memory runs out"):
        merge_exit_codes({4: 75, 5: KILL}, 8)
    with pytest.raises(FivefoldError, match=r"process 1 of 2 crashed \(SIGSEGV\)") as caught:
        merge_exit_codes({0: 75, 1: SEGV}, 2)
    assert caught.value.exit_code == 1


def test_cores_are_divided_among_ranks_and_user_variables_are_kept():
    shared = shared_variables(HostGroup(), 2, {"PATH": "/bin"})
    assert shared["OMP_NUM_THREADS"] == str(max(1, count_cores() // 2))
    assert (shared["PATH"], shared["FIVEFOLD_PARENT"]) == ("/bin", str(os.getpid()))
    assert shared_variables(HostGroup(), 2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert "GLOO_SOCKET_IFNAME" not in shared_variables(HostGroup(2, 0, "a", 1), 2, {})


LISTENING_RANK = """
import json, os, psutil
from fivefold.distributed.process_group import init_process_group
from fivefold.distributed.ranks import rank_from_env
with init_process_group(rank_from_env(os.environ)) as group:
    sockets = psutil.Process().net_connections(kind="inet")
    word = group.broadcast(f"of {group.rank.index}")
    group.broadcast(None)
print(json.dumps([word, [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]]))
"""


def test_ranks_of_one_host_listen_only_on_localhost(tmp_path):
    environ = shared_variables(HostGroup(), 2, {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)})
    environ |= {SHARED_SCRATCH: str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", LISTENING_RANK]
    processes = [
        subprocess.Popen(command, env={**environ, **HostGroup().variables(2, rank)}, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    assert [word for word, _ in results] == ["of 0", "of 0"]
    assert {address for _, addresses in results for address in addresses} <= {"127.0.0.1"}, "or on no port"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hosts", [HostGroup(), HostGroup(2, 1, "host-0", 29500, "eth0")])
def test_ranks_of_one_host_rendezvous_in_a_file(hosts, tmp_path):
    rank = rank_from_env({SHARED_SCRATCH: str(tmp_path), **hosts.variables(2, 1)})
    assert rank.rendezvous_file == (str(tmp_path / "meeting") if hosts.count == 1 else "")
    shared = shared_variables(hosts, 2, {})
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        assert {**shared, **hosts.variables(2, 1)}[name] == ("lo" if hosts.count == 1 else "eth0")


def test_run_ranks_returns_the_exit_code_of_all_ranks(capfd):
    environ = {**os.environ, "NODE_RANK": "0"}
    assert run_ranks(["no-such-stage"], HostGroup(), 2, environ) == 64
    assert capfd.readouterr().err.count("no-such-stage") == 2
