import signal
import subprocess
import sys

import pytest

PROCESS = """
import ctypes, sys, time
from fivefold import signals
from fivefold.errors import StoppedError

signals.HANG_TIMEOUT_S = 0.3
try:
    with signals.defer_signals(watched=True):
        print("ready", flush=True)
        if sys.argv[1] == "hangs":
            mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            library.pthread_mutex_lock(mutex), library.pthread_mutex_lock(mutex)  # the second one waits for ever
        while True:
            time.sleep(0.05)
            signals.raise_if_stopped()
except StoppedError as stopped:
    time.sleep(0.5)  # saving takes longer than the timeout
    print("kept", flush=True)
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(
    ("does", "printed", "number", "code"),
    [("hangs", "", signal.SIGTERM, 143), ("asks", "kept\n", signal.SIGINT, 130)],
)
def test_hanging_process_ends_and_saving_process_gets_time(does: str, printed: str, number: int, code: int) -> None:
    command = [sys.executable, "-c", f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n{PROCESS}", does]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest) == (code, printed), errors


def test_signal_to_a_forked_worker_does_not_end_its_parent() -> None:
    code = """
import os, signal, sys, time
from fivefold import signals

signals.HANG_TIMEOUT_S = 0.2
with signals.defer_signals(watched=True):
    worker = os.fork()
    if not worker:
        time.sleep(60)
    time.sleep(0.1)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
    time.sleep(0.5)
    signals.raise_if_stopped()
print("goes on")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, "goes on\n"), ended.stderr
