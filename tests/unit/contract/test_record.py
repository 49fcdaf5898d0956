"""stage.json: what makes a stage run, what lets it rest, and how two stages share a folder."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fivefold.config.loading import hashed_settings
from fivefold.config.schema import Settings
from fivefold.contract.files import sha256, write_text
from fivefold.contract.job import StageContext, context_from_env
from fivefold.contract.record import (
    CacheKey,
    Stopwatch,
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
def split(tmp_path: Path) -> StageContext:
    """A split job whose input and output are there."""
    write_text(tmp_path / "images" / "a" / "1.png", "pixels")
    write_text(tmp_path / "out" / "folds.parquet", "rows")
    environ = {"SM_CHANNEL_TRAIN": str(tmp_path / "images"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    return context_from_env(STAGES["split"], environ, tmp_path / "scratch")


def finish(job: StageContext, settings: dict[str, Any] = SETTINGS, name: str = "folds.parquet") -> CacheKey:
    """Writes the record as a stage that has just made `name`."""
    key = compute_key(job, settings)
    write_record(job.record_dir(), job, key, [job.output() / name], {"rows": 1}, Stopwatch())
    return key


def reason(job: StageContext, settings: dict[str, Any] = SETTINGS) -> str | None:
    return rerun_reason(job.record_dir(), compute_key(job, settings), output_roots(job))


def test_a_stage_rests_until_settings_inputs_or_outputs_differ(split: StageContext, tmp_path: Path):
    assert reason(split) == "no record of an earlier run"
    finish(split)
    assert reason(split) is None
    changes = {
        "settings differ: split.folds 5 -> 3": {"split.folds": 3},
        "settings differ: split.folds 5 -> 3, split.seed absent -> 1": {"split.folds": 3, "split.seed": 1},
        f'settings differ: data.table "" -> "{"x" * 36}...': {"data.table": "x" * 100},
    }
    assert [reason(split, SETTINGS | change) for change in changes.values()] == list(changes)
    moved = split.output().rename(tmp_path / "elsewhere")
    split = dataclasses.replace(split, output_data_dir=moved)
    assert reason(split) is None, "a folder that is moved keeps its record"
    write_text(moved / "folds.parquet", "other rows")
    assert reason(split) == "output missing or changed: output/folds.parquet"
    (moved / "folds.parquet").unlink()
    assert reason(split) == "output missing or changed: output/folds.parquet"
    write_text(tmp_path / "images" / "a" / "2.png", "pixels")
    assert reason(split) == "inputs differ: train"
    assert reason(split, SETTINGS | {"split.folds": 3}) == "inputs differ: train; settings differ: split.folds 5 -> 3"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "split", "inputs": 1, "settings": [], "outputs": 2}'])
def test_a_record_that_cannot_be_read_counts_for_nothing(text: str, split: StageContext):
    write_text(split.output() / "stage.json", text)
    assert reason(split) == f"the record {split.output() / 'stage.json'} cannot be read"
    finish(split)
    assert reason(split) is None
    assert not (split.output() / "split.stage.json").exists()


@pytest.mark.parametrize("field", ["code", "packages"])
def test_other_code_or_packages_are_told_refused_or_passed_over(field: str, split: StageContext, caplog):
    finish(split)
    path = split.output() / "stage.json"
    record = json.loads(path.read_text())
    old = record["packages"] | {"torch": "1.0"} if field == "packages" else "0.1.0+0"
    write_text(path, json.dumps(record | {field: old}))
    key, roots = compute_key(split, SETTINGS), output_roots(split)
    news = {"packages": f"torch 1.0 -> {package_versions()['torch']}", "code": f"code 0.1.0+0 -> {code_version()}"}
    assert (rerun_reason(split.output(), key, roots, "rerun") or "").endswith(f": {news[field]}")
    assert rerun_reason(split.output(), key, roots, "ignore") is None
    assert not caplog.records
    assert rerun_reason(split.output(), key, roots) is None
    assert str(path) in caplog.text
    assert f"({news[field]})" in caplog.text


def test_the_record_says_what_was_done_with_what(split: StageContext):
    key = finish(split)
    record = json.loads((split.output() / "stage.json").read_text())
    assert record["stage"] == "split"
    assert record["key"] == key.digest()
    assert list(record["inputs"]) == ["train"]
    assert record["settings"] == SETTINGS
    assert record["outputs"] == {"output/folds.parquet": sha256(split.output() / "folds.parquet")}
    assert record["metrics"] == {"rows": 1}
    assert record["packages"]["numpy"] == package_versions()["numpy"]
    assert record["code"] == code_version()
    images = split.channel("train")
    assert record["sources"] == {"train": ["../images", str(images.resolve())]}
    assert record["wall_seconds"] >= 0
    assert 10 < record["peak_memory_mib"] < 100_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["finished"])


def test_models_and_data_are_named_by_their_roots(tmp_path: Path):
    environ = {"SM_MODEL_DIR": str(tmp_path), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    job = context_from_env(STAGES["train-fold"], environ, tmp_path / "scratch")
    for name in ("model.json", "output/curves.png"):
        write_text(tmp_path / name, name)
    outputs = [tmp_path / "model.json", tmp_path / "output/curves.png"]
    write_record(tmp_path, job, CacheKey("train-fold", {}, {}), outputs, {}, Stopwatch())
    record = json.loads((tmp_path / "stage.json").read_text())
    assert list(record["outputs"]) == ["model/model.json", "output/curves.png"]
    assert rerun_reason(tmp_path, CacheKey("train-fold", {}, {}), output_roots(job)) is None


def test_the_key_is_the_same_however_its_parts_are_ordered():
    one = CacheKey("s", {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]})
    assert CacheKey("s", {"b": "2", "a": "1"}, {"y": [1, 2], "x": 1}).digest() == one.digest()
    assert CacheKey("s", {"a": "1", "b": "2"}, {"x": 1, "y": [2, 1]}).digest() != one.digest()
    assert CacheKey("t", {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]}).digest() != one.digest()


def test_a_key_survives_the_record_for_every_default(split: StageContext):
    for stage in STAGES.values():
        settings = hashed_settings(Settings(), stage.sections)
        assert (
            CacheKey(stage.name, {}, json.loads(json.dumps(settings))).digest()
            == CacheKey(stage.name, {}, settings).digest()
        )


@pytest.fixture
def shared(tmp_path: Path) -> tuple[StageContext, StageContext]:
    """An ensemble and an evaluation that write to one folder."""
    out = tmp_path / "out"
    for name in ("predictions.parquet", "metrics.json"):
        write_text(out / name, name)
    environ = {"SM_OUTPUT_DATA_DIR": str(out)}
    ensemble, evaluate = (
        context_from_env(STAGES[name], environ, tmp_path / "scratch") for name in ("ensemble", "evaluate")
    )
    return ensemble, evaluate


FILES = {"ensemble": "predictions.parquet", "evaluate": "metrics.json"}


@pytest.mark.parametrize("order", [("ensemble", "evaluate"), ("evaluate", "ensemble")])
def test_two_stages_share_a_folder_and_each_rests_on_its_own_record(
    order: tuple[str, str], shared: tuple[StageContext, StageContext]
):
    jobs = {job.stage.name: job for job in shared}
    first, second = (jobs[name] for name in order)
    for job in (first, second):
        finish(job, name=FILES[job.stage.name])
    folder = first.output()
    assert record_path(folder, first.stage.name) == folder / "stage.json"
    assert record_path(folder, second.stage.name) == folder / f"{second.stage.name}.stage.json"
    assert reason(first) is None
    assert reason(second) is None
    for job in (second, first):
        finish(job, SETTINGS | {"changed": True}, FILES[job.stage.name])
    assert len(list(folder.glob("*stage.json"))) == 2
    assert reason(first, SETTINGS | {"changed": True}) is None
    assert reason(second, SETTINGS | {"changed": True}) is None


def test_a_record_that_stepped_aside_is_found_while_the_other_is_gone(shared: tuple[StageContext, StageContext]):
    ensemble, evaluate = shared
    for job in shared:
        finish(job, name=FILES[job.stage.name])
    (ensemble.output() / "stage.json").unlink()
    assert reason(ensemble) == "no record of an earlier run"
    assert reason(evaluate) is None
    finish(ensemble, name=FILES["ensemble"])
    assert reason(ensemble) is None
    assert reason(evaluate) is None
