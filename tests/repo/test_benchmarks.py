"""The benchmarks: statistics, processes, options; a slow test runs each benchmark at a small size."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import results
from benchmarks.__main__ import plan
from benchmarks.options import Options, parse
from benchmarks.processes import Call, ratio_of_passes, run, run_side_by_side, spread
from benchmarks.results import TARGETS, Finding
from benchmarks.training import parse_setting
from fivefold.errors import FivefoldError, SettingsError
from reference_run import wait_until

ROOT = Path(__file__).parents[2]
TIMED_PASSES = """
import json, sys, time
from benchmarks.processes import wait_for_turn
passes = []
for _ in range(int(sys.argv[1])):
    wait_for_turn()
    started = time.monotonic()
    time.sleep(.02)
    passes.append([started, time.monotonic()])
    time.sleep(.03)  # as a validation
print(json.dumps(passes))
"""


def make_output(*seconds: float) -> dict:
    return {"passes": [{"images": 10, "seconds": duration} for duration in seconds]}


def test_figures_are_percentiles_and_ratios_of_neighbouring_passes_without_the_first():
    values = [1.02, 0.97, 1.4, 0.99, 1.0, 1.01, 0.2]
    summary = spread(values)
    assert [summary["q1"], summary["median"], summary["q3"]] == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert (summary["least"], summary["most"], summary["n"]) == (0.2, 1.4, 7)
    assert set(spread([2.5]).values()) == {2.5, 1}
    assert ratio_of_passes(make_output(9, 1, 2, 4), make_output(1, 2, 4, 8)) == pytest.approx(2)
    assert ratio_of_passes(make_output(2), make_output(4)) == pytest.approx(2)


def test_side_by_side_processes_take_turns_and_report_a_failed_process():
    first, second = run_side_by_side(Call(["-c", TIMED_PASSES, "4"]), Call(["-c", TIMED_PASSES, "3"]), threads=1)
    passes = sorted([*[(*times, "A") for times in first.output], *[(*times, "B") for times in second.output]])
    assert "".join(name for *_, name in passes) == "ABABABA"
    for (_, end, _), (start, *_) in itertools.pairwise(passes):
        assert start > end + 0.03, "the pause after a pass belongs to the same turn"
    failing = Call(["-c", "import sys; print('broken', file=sys.stderr); sys.exit(65)"])
    with pytest.raises(FivefoldError, match=r"(?s)65.*broken"):
        run_side_by_side(failing, failing, 1)


def test_run_measures_time_and_memory_without_inherited_settings(monkeypatch):
    for name, value in {"TRAIN__EPOCHS": "3", "SM_CHANNEL_TRAIN": "/somewhere", "OMP_NUM_THREADS": "7"}.items():
        monkeypatch.setenv(name, value)
    code = (
        "import json, os, time\nheld = bytearray(200_000_000)\ntime.sleep(.3)\nprint('a line before')\n"
        "names = [name for name in os.environ if name.startswith(('TRAIN', 'SM_'))]\n"
        "print(json.dumps([os.environ.get('OMP_NUM_THREADS'), names, time.monotonic()]))"
    )
    result = run(Call(["-c", code]), threads=3)
    assert result.output[:2] == ["3", []]
    assert result.seconds >= 0.3
    assert 200e6 < result.peak_bytes < 400e6
    assert result.started < result.output[2] < time.monotonic()
    assert run(Call(["-c", "import os; print(os.environ.get('OMP_NUM_THREADS', 0))"]), threads=0).output == 0


def test_options_select_benchmarks_rows_and_settings_and_invalid_ones_are_rejected():
    assert parse(["pairs=3", "cases=a,b", "work=/w"]) == Options(pairs=3, cases="a,b", work="/w")
    for argument in ("pair=3", "pairs=many", "pairs=0", "pairs", "device=tpu", "photo=big"):
        with pytest.raises(SettingsError, match=argument.split("=")[0]):
            parse([argument])
    with pytest.raises(SettingsError, match="'resnet'"):
        parse(["cases=resnet"]).select(["resnet18@64"])
    assert parse_setting("bf16,NHWC,2") == ("bf16", "NHWC", 2)
    for text in ("shrt", "bf16,NHWC", "fp16,NHWC,0", "fp32,NCHW,-1"):
        with pytest.raises(SettingsError, match=re.escape(text)):
            parse_setting(text)
    for names in (["loader", "trian"], []):
        with pytest.raises(SettingsError):
            plan(names, ["pairs=3"])
    assert [name for name, _ in plan(["all"], [])] == list(TARGETS)


def test_saved_rows_keep_earlier_rows_and_their_machines(tmp_path):
    options = parse([f"results={tmp_path}", "pairs=3", "images=/home/me/photos", "count=99"])
    machine_a = {"processor": "one", "flags": ["amx_bf16"], "cores": 2}
    machine_b = {"processor": "two", "flags": [], "cores": 4}
    results.save_row("loader", Finding("loader", spread([4100, 4200, 4900])), options, machine_a)
    other = Finding("of_torchvision", spread([1.25]))
    path = results.save_row("loader", other, parse([f"results={tmp_path}"]), machine_b)
    rows = json.loads(path.read_text())["rows"]
    assert rows["loader"]["outcome"] == "reached"
    assert rows["loader"]["options"] == {"pairs": 3, "count": 99}
    text = results.markdown_table(tmp_path)
    assert "| 4,200 images/s [4,150, 4,550] (count=99) | 3 | A | `loader` |" in text
    assert "| 1.250 | 1 | B | `loader` |" in text
    assert text.endswith("\n\nA: one, 2 cores (amx_bf16); B: two, 4 cores (no units for bf16).")


def test_performance_page_contains_the_results_table():
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert results.markdown_table(ROOT / "benchmarks" / "results") in page


@pytest.mark.slow
def test_sigterm_ends_the_measured_process(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "loader", "count=1", f"work={tmp_path}", f"results={tmp_path}"]
    process = psutil.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(process.children(recursive=True)) > 1)  # the rusage process and the stage
    children = process.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert psutil.wait_procs(children, timeout=10)[1] == []


SMALL = ("pairs=1", "threads=1", "count=50", "size=32", "batch=8", "epochs=2")
LONG = ("peer", "step", "folds", "ensemble", "accuracy")
"""Benchmarks that take minutes even when small: only `FIVEFOLD_BENCHMARKS=all` runs them."""
ONE_CASE = {"train": "resnet18@64", "peer": "resnet18@64", "step": "curve"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_each_benchmark_completes_at_a_small_size(name, tmp_path):
    if name in LONG and os.environ.get("FIVEFOLD_BENCHMARKS") != "all":
        pytest.skip("takes minutes: FIVEFOLD_BENCHMARKS=all")
    arguments = [name, *SMALL, f"work={tmp_path / 'work'}", f"results={tmp_path / 'results'}"]
    arguments += [f"cases={ONE_CASE[name]}"] if name in ONE_CASE else []
    arguments += ["search=fp32,NHWC,0"] if name in ("folds", "peer") else []
    command = [sys.executable, "-m", "benchmarks", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"]
    assert set(rows) == ({ONE_CASE[name]} if name in ONE_CASE else set(TARGETS[name]))
    for key, row in rows.items():
        assert row["figure"]["n"] >= 1
        assert row["figure"]["median"] > 0 or key == "curve"
        assert row["what"] in result.stdout
    if name == "step":
        assert rows["curve"]["figure"]["median"] < 1e-3
