"""Time and memory limits that users may rely on; generous, so that the tests pass on a busy machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
SYSTEMS, CLASSES = 5, 100


def measure(*arguments: str, **environ: str) -> tuple[float, float]:
    """Run `python -m jobs`; return its duration in seconds and its peak memory in MB."""
    started, peak = time.monotonic(), 0.0
    command = [sys.executable, "-m", "jobs", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **environ}, stdout=subprocess.DEVNULL)
    monitored = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, monitored.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    assert process.wait() == 0
    return time.monotonic() - started, peak


@pytest.mark.slow
def test_split_of_a_million_rows_takes_30_seconds_and_2_gb(tmp_path: Path) -> None:
    rows = 1_000_000
    codes = (CLASSES * np.random.default_rng(0).random(rows) ** 2).astype(int)
    table = pd.DataFrame({"image_path": [f"images/{row:07}.jpg" for row in range(rows)], "target": codes})
    (tmp_path / "data").mkdir()
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    paths = {"SM_CHANNEL_TRAIN": str(tmp_path / "data"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    seconds, megabytes = measure("split", "split.verify_images=false", **paths)
    assert seconds < 30
    assert megabytes < 2000


@pytest.mark.slow
def test_blend_of_five_large_tables_takes_60_seconds_and_2_gb(tmp_path: Path) -> None:
    rows = 100_000
    (tmp_path / "systems").mkdir()
    for number in range(SYSTEMS):
        logits = np.random.default_rng(number).standard_normal((rows, CLASSES), np.float32) * 2
        table = pd.DataFrame(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        table.columns = [f"p/class-{code:02}" for code in range(CLASSES)]
        table.insert(0, "id", [f"{row:07}" for row in range(rows)])
        table.insert(1, "fold", np.full(rows, -1, np.int16))
        table.insert(2, "system", f"system_{number}")
        table.to_parquet(tmp_path / "systems" / f"system_{number}.parquet", index=False)
    paths = {"SM_CHANNEL_SUBMISSIONS": str(tmp_path / "systems"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    seconds, megabytes = measure("ensemble", "ensemble.blend=mean", **paths)
    assert seconds < 60
    assert megabytes < 2000
    assert len(pd.read_csv(tmp_path / "output" / "submission.csv")) == rows
