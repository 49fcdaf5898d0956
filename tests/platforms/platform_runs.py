"""A run of the demo's digits, made small: on this machine, to compare with the same on another platform."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from jobs.demo import write_digits

REPOSITORY = Path(__file__).parents[2]
SETTINGS = ("recipe=demo", "run=r", "split.folds=2", "train.epochs=1", "train.warmup_epochs=0")
THREADS = {"OMP_NUM_THREADS": "1"}
FILES = {
    "split": ("output/folds.parquet", "output/classes.json"),
    "train-fold": ("model/model.safetensors", "model/model.json", "model/oof.parquet", "model/train_log.csv"),
    "ensemble": ("output/predictions.parquet", "output/submission.csv", "output/ensemble.json"),
    "evaluate": ("output/metrics.json",),
    "distill": ("model/model.safetensors", "model/model.json", "model/train_log.csv"),
}
"""What must be the same bytes on every platform."""
STEPS = {
    "split": "split", "fold-0": "train-fold", "fold-1": "train-fold", "ensemble": "ensemble", "evaluate": "evaluate",
    "distill": "distill", "ensemble-student": "ensemble", "evaluate-student": "evaluate",
}  # fmt: skip


def digits(folder: Path) -> Path:
    """The demo's `train/` and `test/`, and `train.zip`."""
    write_digits(folder)
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for path in sorted((folder / "train").rglob("*.png")):
            archive.write(path, path.relative_to(folder / "train").as_posix())
    return folder


def run_here(data: Path, runs: Path, train: str = "train") -> Path:
    """The run's folder, after all its steps ran as processes of this machine; `train` is the folder or the zip."""
    ended = submit(["platform=local", f"train={data / train}", f"eval={data / 'test'}", f"runs={runs}"], THREADS)
    assert ended.returncode == 0, ended.stdout
    return runs / "r"


def submit(given: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`submit` of the small run, as a command; what it said is its stdout."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "jobs", "submit", *SETTINGS, *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=REPOSITORY, env={**own, **variables}, check=False, timeout=1200, **pipes)


def differing(one: Path, other: Path, steps: dict[str, str]) -> list[str]:
    """The files of these steps that are not the same bytes in both folders, or are in neither."""
    names = [f"{step}/{name}" for step, stage in steps.items() for name in FILES[stage]]
    assert all((one / name).is_file() for name in names)
    return [n for n in names if not (other / n).is_file() or (one / n).read_bytes() != (other / n).read_bytes()]
