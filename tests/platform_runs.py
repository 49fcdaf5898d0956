"""A run of the demo's digits, made small: on this machine, to compare with the same on another platform."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from containers import ONE_THREAD
from jobs.demo import write_digits

REPOSITORY = Path(__file__).parents[1]
SETTINGS = ("recipe=demo", "run=r", "split.folds=2", "train.epochs=1", "train.warmup_epochs=0")
STEPS = ("split", "fold-0", "fold-1", "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student")


def digits(folder: Path) -> Path:
    """The demo's `train/` and `test/`, and `train.zip`."""
    write_digits(folder)
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for path in sorted((folder / "train").rglob("*.png")):
            archive.write(path, path.relative_to(folder / "train").as_posix())
    return folder


def run_here(data: Path, runs: Path, train: str = "train") -> Path:
    """The run's folder, after all its steps ran as processes of this machine; `train` is the folder or the zip."""
    ended = submit(["platform=local", f"train={data / train}", f"eval={data / 'test'}", f"runs={runs}"], ONE_THREAD)
    assert ended.returncode == 0, ended.stdout
    return runs / "r"


def submit(given: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`submit` of the small run, as a command; what it said is its stdout."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "jobs", "submit", *SETTINGS, *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=REPOSITORY, env={**own, **variables}, check=False, timeout=1200, **pipes)
