import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fivefold.config.loading import hashed_settings
from fivefold.config.schema import Settings
from fivefold.contract.files import sha256, write_text
from fivefold.contract.job import StageContext, context_from_env
from fivefold.contract.record import (
    CacheKey,
    code_version,
    compute_key,
    output_roots,
    package_versions,
    record_path,
    rerun_reason,
    write_record,
)
from fivefold.contract.stage_specs import STAGES

SETTINGS = {"split.folds": 5, "split.verify_images": True, "data.table": ""}


@pytest.fixture
def split_job(tmp_path: Path) -> StageContext:
    """A split job with existing input and output."""
    write_text(tmp_path / "images" / "a" / "1.png", "pixels")
    write_text(tmp_path / "out" / "folds.parquet", "rows")
    environ = {"SM_CHANNEL_TRAIN": str(tmp_path / "images"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    return context_from_env(STAGES["split"], environ, tmp_path / "scratch")


def save_record(job: StageContext, settings: dict[str, Any] = SETTINGS, name: str = "folds.parquet") -> CacheKey:
    """Write the record of a stage whose output is `name`."""
    key = compute_key(job, settings)
    write_record(job.record_dir(), job, key, [job.output() / name], {"rows": 1}, time.monotonic())
    return key


def explain(job: StageContext, settings: dict[str, Any] = SETTINGS) -> str | None:
    return rerun_reason(job.record_dir(), compute_key(job, settings), output_roots(job))


def test_stage_is_skipped_until_settings_inputs_or_outputs_differ(split_job: StageContext, tmp_path: Path):
    assert explain(split_job) == "no record of an earlier run"
    save_record(split_job)
    assert explain(split_job) is None
    changes = {
        "settings differ: split.folds 5 -> 3": {"split.folds": 3},
        "settings differ: split.folds 5 -> 3, split.seed absent -> 1": {"split.folds": 3, "split.seed": 1},
        f'settings differ: data.table "" -> "{"x" * 36}...': {"data.table": "x" * 100},
    }
    assert [explain(split_job, SETTINGS | change) for change in changes.values()] == list(changes)
    moved_folder = split_job.output().rename(tmp_path / "elsewhere")
    split_job = dataclasses.replace(split_job, output_data_dir=moved_folder)
    assert explain(split_job) is None, "the record of a moved folder stays valid"
    write_text(moved_folder / "folds.parquet", "other rows")
    assert explain(split_job) == "output missing or changed: output/folds.parquet"
    (moved_folder / "folds.parquet").unlink()
    assert explain(split_job) == "output missing or changed: output/folds.parquet"
    write_text(tmp_path / "images" / "a" / "2.png", "pixels")
    assert explain(split_job) == "inputs differ: train"
    changed = SETTINGS | {"split.folds": 3}
    assert explain(split_job, changed) == "inputs differ: train; settings differ: split.folds 5 -> 3"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "split", "inputs": 1, "settings": [], "outputs": 2}'])
def test_unreadable_record_is_ignored_and_replaced(text: str, split_job: StageContext):
    write_text(split_job.output() / "stage.json", text)
    assert explain(split_job) == f"the record {split_job.output() / 'stage.json'} cannot be read"
    save_record(split_job)
    assert explain(split_job) is None
    assert not (split_job.output() / "split.stage.json").exists()


@pytest.mark.parametrize("field", ["code", "packages"])
def test_changed_code_or_packages_warn_rerun_or_are_ignored(field: str, split_job: StageContext, caplog):
    save_record(split_job)
    path = split_job.output() / "stage.json"
    record = json.loads(path.read_text())
    old = record["packages"] | {"torch": "1.0"} if field == "packages" else "0.1.0+0"
    write_text(path, json.dumps(record | {field: old}))
    key, roots = compute_key(split_job, SETTINGS), output_roots(split_job)
    changes = {"packages": f"torch 1.0 -> {package_versions()['torch']}", "code": f"code 0.1.0+0 -> {code_version()}"}
    assert (rerun_reason(split_job.output(), key, roots, "rerun") or "").endswith(f": {changes[field]}")
    assert rerun_reason(split_job.output(), key, roots, "ignore") is None
    assert not caplog.records
    assert rerun_reason(split_job.output(), key, roots) is None
    assert str(path) in caplog.text
    assert f"({changes[field]})" in caplog.text


def test_record_contains_inputs_settings_outputs_and_versions(split_job: StageContext):
    key = save_record(split_job)
    record = json.loads((split_job.output() / "stage.json").read_text())
    images = split_job.channel("train")
    expected = {
        "stage": "split", "key": key.digest(), "settings": SETTINGS, "metrics": {"rows": 1}, "code": code_version(),
        "packages": package_versions(), "sources": {"train": ["../images", str(images.resolve())]},
        "outputs": {"output/folds.parquet": sha256(split_job.output() / "folds.parquet")},
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert list(record["inputs"]) == ["train"]
    assert record["wall_seconds"] >= 0
    assert 10 < record["peak_memory_mib"] < 100_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["finished"])


def test_record_names_outputs_by_their_root(tmp_path: Path):
    environ = {"SM_MODEL_DIR": str(tmp_path), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    job = context_from_env(STAGES["train-fold"], environ, tmp_path / "scratch")
    for name in ("model.json", "output/curves.png"):
        write_text(tmp_path / name, name)
    outputs = [tmp_path / "model.json", tmp_path / "output/curves.png"]
    write_record(tmp_path, job, CacheKey("train-fold", {}, {}), outputs, {}, time.monotonic())
    record = json.loads((tmp_path / "stage.json").read_text())
    assert list(record["outputs"]) == ["model/model.json", "output/curves.png"]
    assert rerun_reason(tmp_path, CacheKey("train-fold", {}, {}), output_roots(job)) is None


def test_key_digest_ignores_the_order_of_its_parts():
    key = CacheKey("s", {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]})
    assert CacheKey("s", {"b": "2", "a": "1"}, {"y": [1, 2], "x": 1}).digest() == key.digest()
    assert CacheKey("s", {"a": "1", "b": "2"}, {"x": 1, "y": [2, 1]}).digest() != key.digest()
    assert CacheKey("t", {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]}).digest() != key.digest()


def test_key_of_default_settings_survives_json_for_every_stage(split_job: StageContext):
    for stage in STAGES.values():
        settings = hashed_settings(Settings(), stage.sections)
        reread = json.loads(json.dumps(settings))
        assert CacheKey(stage.name, {}, reread).digest() == CacheKey(stage.name, {}, settings).digest()


OUTPUT_FILES = {"ensemble": "predictions.parquet", "evaluate": "metrics.json"}


@pytest.mark.parametrize("order", [("ensemble", "evaluate"), ("evaluate", "ensemble")])
def test_two_stages_in_one_folder_have_their_own_records(order: tuple[str, str], tmp_path: Path):
    for name in OUTPUT_FILES.values():
        write_text(tmp_path / name, name)
    first, second = (
        context_from_env(STAGES[name], {"SM_OUTPUT_DATA_DIR": str(tmp_path)}, tmp_path / "scratch") for name in order
    )
    for settings in (SETTINGS, SETTINGS | {"changed": True}):
        for job in (first, second):
            save_record(job, settings, OUTPUT_FILES[job.stage.name])
        assert record_path(tmp_path, order[0]) == tmp_path / "stage.json"
        assert record_path(tmp_path, order[1]) == tmp_path / f"{order[1]}.stage.json"
        assert [explain(job, settings) for job in (first, second)] == [None, None]
    assert len(list(tmp_path.glob("*stage.json"))) == 2
    (tmp_path / "stage.json").unlink()
    assert explain(first, settings) == "no record of an earlier run"
    assert explain(second, settings) is None
    save_record(first, settings, OUTPUT_FILES[order[0]])
    assert [explain(job, settings) for job in (first, second)] == [None, None]
