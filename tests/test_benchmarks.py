"""The benchmarks: their statistics, their photographs, what they refuse; and, slow, that each runs to its end when made small."""

import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks import results, table
from benchmarks.__main__ import BENCHMARKS, main, plan
from benchmarks.bars import BARS, Bar
from benchmarks.clocks import ratio_of_rounds
from benchmarks.options import Options, parse
from benchmarks.pairs import Call, Spread, in_turns, run, side_by_side
from benchmarks.peer import given_setting, in_words
from benchmarks.photos import FEWEST, crop, photographs, two_photographs
from benchmarks.results import Finding
from fivefold.errors import DataError, FivefoldError, SettingsError

ROOT = Path(__file__).parents[1]


def test_the_spread_is_what_numpy_says():
    values = [1.02, 0.97, 1.4, 0.99, 1.0, 1.01, 0.2]
    found = Spread.of(values)
    assert [found.q1, found.median, found.q3] == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert (found.least, found.most, found.n) == (0.2, 1.4, 7)
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5, 2.5, 2.5, 1)


def test_turns_alternate_and_their_ratios_are_of_neighbours():
    # a machine that slows down by a tenth with every process: the ratio stays, that of medians of all would not
    speed, order = iter(100 * 0.9**number for number in range(14)), []

    def turn(name: str, factor: float) -> float:
        order.append(name)
        return factor * next(speed)

    told = []
    turns = in_turns(lambda: turn("A", 2), lambda given: told.append(given) or turn("B", 1), 7, "turns")
    assert told == [a for a, _ in turns]
    assert "".join(order) == "AB" * 7
    assert Spread.of([a / b for a, b in turns]).most == pytest.approx(2 / 0.9)
    assert Spread.of([a / b for a, b in turns]).least == pytest.approx(2 / 0.9)


SIDE = (
    "import json, sys, time\n"
    "from benchmarks.turns import my_turn\n"
    "passes = []\n"
    "for _ in range(int(sys.argv[1])):\n"
    "    my_turn()\n"
    "    begun = time.monotonic()\n"
    "    time.sleep(.02)\n"
    "    passes.append([begun, time.monotonic()])\n"
    "    time.sleep(.03)  # as a validation\n"
    "print(json.dumps(passes))\n"
)


def test_side_by_side_one_works_while_the_other_waits():
    first, second = side_by_side(Call(["-c", SIDE, "4"]), Call(["-c", SIDE, "3"]), threads=1)
    told = sorted([*[(*each, "A") for each in first.told], *[(*each, "B") for each in second.told]])
    assert "".join(name for *_, name in told) == "ABABABA"
    for (_, end, _), (begun, *_) in itertools.pairwise(told):
        assert begun > end + 0.03, "what follows a pass is done in its turn"


def test_side_by_side_one_that_fails_is_told_when_the_other_is_over():
    begun = time.monotonic()
    with pytest.raises(FivefoldError, match=r"(?s)ended with 65.*broken"):
        side_by_side(
            Call(["-c", SIDE, "3"]), Call(["-c", "import sys; print('broken', file=sys.stderr); sys.exit(65)"]), 1
        )
    assert time.monotonic() - begun < 20


def test_a_ratio_is_of_neighbouring_passes_less_the_first():
    def told(*seconds: float) -> dict:
        return {"passes": [{"images": 10, "seconds": each, "cpu_seconds": each} for each in seconds]}

    assert ratio_of_rounds(told(9, 1, 2, 4), told(1, 2, 4, 8)) == pytest.approx(2), "whatever the machine's speed does"
    assert ratio_of_rounds(told(2), told(4)) == pytest.approx(2), "of a single pass that one"


def test_a_process_is_measured_whole():
    code = (
        "import json, os, subprocess, sys, time\n"
        "held = bytearray(200_000_000)\n"
        "subprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < .4: pass'], check=True)\n"
        "time.sleep(.2)\n"
        "print('a line before'); print(json.dumps({'threads': os.environ['OMP_NUM_THREADS'], 'now': time.monotonic()}))"
    )
    ended = run(["-c", code], threads=3)
    assert ended.told["threads"] == "3"
    assert 0.4 <= ended.cpu_seconds < ended.seconds
    assert ended.seconds >= 0.6
    assert 200e6 < ended.peak_bytes < 400e6
    assert ended.begun < ended.told["now"] < time.monotonic()


def test_settings_of_this_process_do_not_reach_the_measured_ones(monkeypatch):
    monkeypatch.setenv("TRAIN__EPOCHS", "3")
    monkeypatch.setenv("SM_CHANNEL_TRAIN", "/somewhere")
    code = "import json, os; print(json.dumps([name for name in os.environ if name.startswith(('TRAIN', 'SM_'))]))"
    assert run(["-c", code], threads=1).told == []


def test_a_process_may_choose_its_threads_itself(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(["-c", "import os; print(int('OMP_NUM_THREADS' in os.environ))"], threads=0).told == 0


def test_a_process_that_fails_tells_its_last_words():
    with pytest.raises(FivefoldError, match=r"(?s)ended with 64.*unknown backbone source"):
        run(["-c", "import sys; print('unknown backbone source', file=sys.stderr); sys.exit(64)"], threads=1)


@pytest.mark.parametrize(("size", "kilobytes"), [((500, 375), (25, 130)), ((1600, 1200), (250, 900))])
def test_photographs_are_jpegs_as_large_as_a_cameras_and_the_same_each_time(size, kilobytes):
    photos = two_photographs()
    found = [crop(photos, size, seed) for seed in range(4)]
    assert found[0] == crop(photos, size, 0)
    assert len(set(found)) == 4
    for content in found:
        image = Image.open(BytesIO(content))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
    low, high = (1000 * each for each in kilobytes)
    assert low < statistics.mean(map(len, found)) < high


def test_photographs_lie_in_class_folders_and_are_made_once(tmp_path):
    folder = photographs(tmp_path, "341x256", 12)
    files = sorted(folder.glob("*/*.jpg"))
    assert len(files) == 12
    assert len({path.parent.name for path in files}) == 10
    before = [path.stat().st_mtime_ns for path in files]
    assert photographs(tmp_path, "341x256", 12) == folder
    assert [path.stat().st_mtime_ns for path in files] == before
    (folder / "photos.json").unlink()  # as if it had been stopped
    assert sorted(photographs(tmp_path, "341x256", 12).glob("*/*.jpg")) == files


def test_a_folder_of_ones_own_is_taken_as_it_is(tmp_path):
    own = tmp_path / "own" / "deep"
    own.mkdir(parents=True)
    photos = two_photographs()
    for seed in range(FEWEST):
        (own / f"{seed}.jpg").write_bytes(crop(photos, (64, 48), seed))
    folder = photographs(tmp_path / "work", "500x375", 10**6, str(tmp_path / "own"))
    assert {path.read_bytes() for path in folder.glob("*/*.jpg")} == {path.read_bytes() for path in own.iterdir()}
    (own / "0.jpg").unlink()
    with pytest.raises(DataError, match=f"{FEWEST - 1} image files; at least {FEWEST}"):
        photographs(tmp_path / "other", "500x375", 50, str(tmp_path / "own"))


def test_options_are_typed_and_unknown_ones_refused():
    assert parse(["pairs=3", "cases=a,b", "work=/w"]) == Options(pairs=3, cases="a,b", work="/w")
    for argument, message in (
        ("pair=3", "did you mean 'pairs'"),
        ("pairs=many", "whole number"),
        ("pairs=0", "at least 1"),
        ("pairs", "not KEY=VALUE"),
        ("device=tpu", "unknown device"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse([argument])
    with pytest.raises(SettingsError, match="unknown case 'resnet'"):
        parse(["cases=resnet"]).chosen(["resnet18@64"])


def test_timms_settings_may_be_given_instead_of_searched():
    assert given_setting("bf16,NHWC,2") == ("bf16", True, 2)
    assert in_words(given_setting("fp32,NCHW,0")) == "fp32, NCHW, 0 workers"
    for text in ("shrt", "bf16,NHWC", "fp16,NHWC,0", "fp32,NCHW,-1"):
        with pytest.raises(SettingsError, match="short, full, or a setting"):
            given_setting(text)


def test_a_plan_is_checked_before_anything_runs():
    with pytest.raises(SettingsError, match="did you mean 'train'"):
        plan(["start", "trian"], [])
    with pytest.raises(SettingsError, match="no benchmark"):
        plan([], ["pairs=3"])
    quick = dict(plan(["quick"], ["pairs=2"]))
    assert {options.pairs for options in quick.values()} == {2}
    assert {options.results for options in quick.values()} == {"build/benchmarks/results"}
    assert [name for name, _ in plan(["all"], [])] == [name for name in BENCHMARKS if name != "gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_what_the_machine_lacks_is_said(caplog):
    assert main(["gpu"]) == 64
    assert "needs a GPU with CUDA" in caplog.text


def test_every_benchmark_has_its_bars_and_its_module(capsys):
    assert set(BARS) == set(BENCHMARKS)
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for name, bars in BARS.items():
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()
        assert all(bar.what in told for bar in bars.values())


def test_a_bar_judges_and_shows():
    least, most = Bar("a ratio", 0.97), Bar("seconds", 4, "s", most=True)
    assert [least.verdict(value) for value in (0.97, 0.969)] == ["reached", "missed"]
    assert [most.verdict(value) for value in (4, 4.01)] == ["reached", "missed"]
    assert (least.wanted, most.wanted) == ("≥ 0.97", "≤ 4 s")
    assert Bar("nothing asked", None).verdict(1) == ""


def test_rows_are_kept_beside_earlier_ones_and_shown_in_the_table(tmp_path):
    options = parse([f"results={tmp_path}", "pairs=3", "images=/home/me/photos", "count=99"])
    about = {"processor": "one", "flags": ["amx_bf16"], "cores": 2}
    results.keep(
        "start", [Finding("small", Spread.of([3.0, 3.2, 3.9])), Finding("timm", Spread.of([5.0]))], options, about
    )
    other = {"processor": "two", "flags": ["avx512f"], "cores": 4}
    path = results.keep("start", [Finding("timm", Spread.of([4.25]))], parse([f"results={tmp_path}"]), other)
    rows = json.loads(path.read_text())["rows"]
    assert rows["small"]["verdict"] == "reached"
    assert rows["timm"]["figure"]["median"] == 4.25
    assert rows["small"]["options"] == {"pairs": 3, "count": 99}
    assert "/home" not in path.read_text()
    text = table.text(tmp_path)
    assert "| 3.20 s [3.10, 3.55] (count=99) | 3 | A | `start` |" in text
    assert "| 4.25 s | 1 | B | `start` |" in text
    assert text.endswith("\n\nA: one, 2 cores (amx_bf16); B: two, 4 cores (no units for bf16).")
    assert text.count("\n") == 3 + sum(map(len, BARS.values()))


def test_the_readme_has_the_table_of_what_was_measured():
    assert table.text(ROOT / "benchmarks" / "results") in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_benchmark_prints_its_figure_beside_its_bar_and_keeps_it(tmp_path, capsys):
    assert main(["start", "cases=help", "pairs=2", f"work={tmp_path / 'w'}", f"results={tmp_path / 'r'}"]) == 0
    row = json.loads((tmp_path / "r" / "start.json").read_text())["rows"]["help"]
    assert (row["bar"], row["at"], row["unit"], row["figure"]["n"]) == (0.5, "most", "s", 2)
    line = next(line for line in capsys.readouterr().out.splitlines() if "jobs --help" in line)
    assert f"{row['figure']['median']:.2f} s" in line
    assert "≤ 0.5 s" in line
    assert row["verdict"] in line


def test_told_to_stop_it_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "start", "cases=small", f"work={tmp_path}", f"results={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(measured := psutil.Process(process.pid).children(recursive=True)) < 2:  # the meter, and what it measures
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    _, alive = psutil.wait_procs(measured, timeout=10)
    assert alive == []


def test_nothing_that_is_shipped_imports_the_benchmarks_and_their_files_are_short():
    shipped = [path for folder in ("src", "jobs") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in shipped if re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.MULTILINE)]
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "benchmarks").glob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


SMALL = ("pairs=1", "threads=1", "count=50", "size=32", "batch=8", "epochs=2", "rows=2000")
FIRST = {"train": "resnet18@64", "peer": "resnet18@64"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "gpu"])
def test_each_runs_to_its_end(name, tmp_path):
    arguments = [name, *SMALL, f"work={tmp_path / 'work'}", f"results={tmp_path / 'results'}"]
    arguments += [f"cases={FIRST[name]}"] if name in FIRST else []
    arguments += ["search=fp32,NHWC,0"] if name == "folds" else []
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"]
    assert set(rows) == ({FIRST[name]} if name in FIRST else set(BARS[name]))
    for key, row in rows.items():
        assert row["figure"]["n"] >= 1
        assert row["figure"]["median"] > 0 or key == "curve"
        assert row["verdict"] in ("reached", "missed", "")
        assert row["machine"]["packages"]["torch"] == torch.__version__.split("+")[0]
        assert row["what"] in ended.stdout
    if name == "train":  # the clocks around the stage and its own say the same
        assert rows[FIRST[name]]["stage_json"]["median"] == pytest.approx(rows[FIRST[name]]["ours"]["median"], rel=0.05)
    if name == "step":
        assert rows["curve"]["figure"]["median"] < 1e-3
