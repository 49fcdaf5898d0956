"""Time and memory limits that users may rely on; generous, so that the tests pass on a busy machine."""

import numpy as np
import pandas as pd
import pytest

from fivefold import predictions
from fivefold.contract.files import read_json
from fivefold.predictions import Predictions
from toy_data import call_jobs

SYSTEMS, CLASSES, ROWS = 5, 100, 100_000


@pytest.mark.slow
def test_blend_of_five_large_tables_takes_60_seconds_and_2_gb(tmp_path):
    ids, classes = np.array([f"{row:07}" for row in range(ROWS)]), tuple(f"class-{code:02}" for code in range(CLASSES))
    for number in range(SYSTEMS):
        logits = np.random.default_rng(number).standard_normal((ROWS, CLASSES), np.float32) * 2
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        table = Predictions(ids, np.full(ROWS, -1), f"system_{number}", classes, log_probs)
        predictions.write(tmp_path / "systems" / f"{number}.parquet", table)
    folders = {"SM_CHANNEL_SUBMISSIONS": tmp_path / "systems", "SM_OUTPUT_DATA_DIR": tmp_path / "output"}
    assert call_jobs("ensemble", "ensemble.blend=mean", **folders).returncode == 0
    record = read_json(tmp_path / "output" / "stage.json")
    assert record["wall_seconds"] < 60
    assert record["peak_memory_mib"] < 2000
    assert len(pd.read_csv(tmp_path / "output" / "submission.csv")) == ROWS
