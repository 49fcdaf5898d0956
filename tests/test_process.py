"""A process that leaves at once has waited for its threads, run its exit functions and flushed its streams, like any other."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.process import importing, leave, load

PROGRAM = """
import atexit, logging, sys, threading, time
from fivefold.process import leave

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
kept.itself = kept
atexit.register(print, "exit function", flush=True)
logging.basicConfig(filename=sys.argv[1], format="%(message)s")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread", end=" "))).start()
logging.warning("logged")
print("printed", end=" ")
"""


def ended(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("code", [0, 3, 143])
def test_all_that_was_begun_is_done_and_nothing_is_taken_apart(code: int, tmp_path: Path):
    found = ended(f"{PROGRAM}\nleave({code})", tmp_path / "log")
    assert (found.returncode, found.stdout, found.stderr) == (code, "printed thread exit function\n", "")
    assert (tmp_path / "log").read_text() == "logged\n"
    usual = ended(f"{PROGRAM}\nsys.exit({code})", tmp_path / "log")
    assert (usual.returncode, usual.stdout) == (code, "printed thread exit function\ntaken apart\n")


def test_a_reader_that_is_gone_changes_no_code():
    program = "import os, sys\nfrom fivefold.process import leave\nprint('x')\n{}\nleave(5)"
    for loss in ("sys.stdout.close()", "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"):
        found = ended(program.format(loss))
        assert (found.returncode, found.stderr) == (5, "")


def test_a_profiler_gets_to_write_its_profile(tmp_path: Path):
    (tmp_path / "program.py").write_text("from fivefold.process import leave\nleave(0)\n")
    command = [sys.executable, "-m", "cProfile", "-o", tmp_path / "profile", tmp_path / "program.py"]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "profile").stat().st_size > 100
    sys.setprofile(lambda *_: None)
    try:
        with pytest.raises(SystemExit) as left:
            leave(7)
    finally:
        sys.setprofile(None)
    assert left.value.code == 7


def test_what_an_import_made_is_not_looked_through_again():
    program = """
import gc
from fivefold.process import load

load("json")
kept = gc.get_freeze_count()
load("json")
assert gc.get_freeze_count() == kept, "nothing new was imported"
assert kept > 1000
assert len(gc.get_objects()) < kept / 10
"""
    assert ended(program).stderr == ""


def test_garbage_is_looked_for_again_after_imports_however_they_end():
    assert gc.isenabled()
    with importing(), importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        load("fivefold.no_such_module")
    assert gc.isenabled()
    gc.disable()
    try:
        assert load("json").__name__ == "json"
        assert not gc.isenabled(), "who had it off keeps it off"
    finally:
        gc.enable()
