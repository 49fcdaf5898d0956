"""`prepare`, its cache as a channel, and the cache made on first use give the same bytes as no cache."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold.config.schema import Data, Settings
from fivefold.contract.run_layout import env_for_run
from fivefold.contract.stage_specs import STAGES
from fivefold.data.image_io import DecodeOptions
from fivefold.data.pipeline.image_cache import HEADER_FILE, INDEX_FILE, PIXELS_FILE, Cache
from fivefold.launchers.local import shared_cache
from fivefold.launchers.plan import Inputs, make_plan
from fivefold.predictions import read
from fivefold.stages.image_source import cache_folder
from jobs.__main__ import run
from toy_data import REPOSITORY, copy_run, draw, environment, failure, read_rows, run_stage, variables, write_test_table
from toy_data import SETTINGS as TINY

pytestmark = pytest.mark.slow

SETTINGS = [
    *TINY, 'model.backbone_kwargs={"widths": [4], "stem": 4}', "model.image_size=8", "train.epochs=2", "model.image_stats=aspect,color_mean",
]  # fmt: skip
RESIZE = ["system=sized", "data.resize_shorter_side=10", "data.jpeg_draft=true"]
IDENTICAL_FILES = ("model.safetensors", "oof.parquet", "holdout.parquet", "train_log.csv")
CACHE_OFF, MEMORY_OFF = "data.cache=off", "train.cache_in_memory=false"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images of several sizes and modes, their split with a holdout, and test images."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for folder in ("train/a", "train/b", "eval/images"):
        (root / folder).mkdir(parents=True)
        for number in range(16):
            size = (int(random.integers(9, 40)), int(random.integers(9, 40)), 3)
            image = Image.fromarray(random.integers(0, 256, size, dtype=np.uint8))
            kind = ("RGB", "L", "CMYK", "RGBA")[number % 4]
            name = f"{number}.{'png' if kind == 'RGBA' or folder.startswith('eval') else 'jpg'}"
            image.convert("RGB" if folder.startswith("eval") else kind).save(root / folder / name)
    write_test_table(root / "eval", 16)
    assert run_step(root, "split", "split", "split.folds=2", "split.holdout=0.1") == 0
    return root


def run_step(root: Path, name: str, step: str, *arguments: str, **channels: Path | None) -> int:
    return run_stage(root, name, step, *arguments, **{"EVAL": None, **channels})


def train_fold(root: Path, folder: str, *arguments: str, **channels: Path) -> Path:
    assert run_step(root, "train-fold", folder, "FOLD=0", *SETTINGS, *arguments, **channels) == 0
    return root / folder / "model"


@pytest.fixture(scope="module")
def models(inputs: Path) -> Path:
    """Two fold models of full-size images and two of resized ones; each read its images from files in each epoch."""
    for fold in range(2):
        train_fold(inputs, f"models/whole/fold-{fold}", CACHE_OFF, MEMORY_OFF, f"FOLD={fold}")
        train_fold(inputs, f"models/sized/fold-{fold}", CACHE_OFF, MEMORY_OFF, f"FOLD={fold}", *RESIZE)
    return inputs / "models"


@pytest.fixture(scope="module")
def uncached_model(models: Path) -> Path:
    return models / "whole" / "fold-0" / "model"


@pytest.fixture(scope="module")
def prepared_cache(inputs: Path) -> Path:
    """The output of `prepare`, including the test images."""
    assert run_step(inputs, "prepare", "prepared", EVAL=inputs / "eval") == 0
    return inputs / "prepared" / "output"


def models_equal(first: Path, second: Path) -> bool:
    """Check that two fold models have the same bytes, except for `model.json`, which records how they were made."""
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in IDENTICAL_FILES)


def test_prepare_writes_one_cache_of_all_images_and_skips_the_second_run(inputs, prepared_cache, capsys):
    (folder,) = (path.parent for path in prepared_cache.glob(f"*/{HEADER_FILE}"))
    cache = Cache(folder)
    cache.verify()
    assert (len(cache), cache.decode_options) == (48, DecodeOptions())
    record = json.loads((prepared_cache / "stage.json").read_text())
    assert set(record["outputs"]) == {f"output/{folder.name}/{name}" for name in (PIXELS_FILE, INDEX_FILE, HEADER_FILE)}
    assert record["metrics"] == {"images": 48, "bytes": cache.bytes}
    capsys.readouterr()
    assert run_step(inputs, "prepare", "prepared", "data.cache_gib=1", EVAL=inputs / "eval") == 0
    assert "nothing to do" in capsys.readouterr().err


def test_memory_channel_and_first_use_caches_give_the_same_bytes(inputs, uncached_model, prepared_cache, capsys):
    assert models_equal(train_fold(inputs, "kept", CACHE_OFF), uncached_model)
    assert models_equal(train_fold(inputs, "channel", CACHE_OFF, MEMORY_OFF, CACHE=prepared_cache), uncached_model)
    assert re.search(r"image cache: .* \(48 images, .*, 0.1 MiB\)", capsys.readouterr().err)
    run_folder = ("run=first", f"runs={inputs / 'runs'}")
    assert models_equal(train_fold(inputs, "first", *run_folder, "train.num_workers=1"), uncached_model)
    assert len(list((inputs / "runs" / ".cache").glob(f"*/{HEADER_FILE}"))) == 1
    assert "32 images are decoded once" in capsys.readouterr().err
    assert models_equal(train_fold(inputs, "second", *run_folder), uncached_model)
    assert "are decoded once" not in capsys.readouterr().err


def test_images_missing_from_the_cache_are_read_from_files(inputs, uncached_model, capsys):
    channels = {"TRAIN": copy_run(inputs / "train", inputs / "few" / "train", *(f"{n}.jpg" for n in range(3, 16)))}
    assert run_step(inputs, "split", "few/split", "split.folds=2", **channels) == 0
    assert run_step(inputs, "prepare", "few/prepared", **channels, FOLDS=inputs / "few" / "split" / "output") == 0
    model = train_fold(inputs, "few/fold", CACHE_OFF, CACHE=inputs / "few" / "prepared" / "output")
    assert re.search("18 of 32 .* from their files", capsys.readouterr().err)
    assert models_equal(model, uncached_model)


def test_resizing_changes_the_weights_but_the_cache_does_not(inputs, models, uncached_model):
    small = models / "sized" / "fold-0" / "model"
    assert (small / "model.safetensors").read_bytes() != (uncached_model / "model.safetensors").read_bytes()
    assert models_equal(train_fold(inputs, "small-first", *RESIZE, f"data.cache={inputs / 'caches'}"), small)
    facts = json.loads((small / "model.json").read_text())
    assert (facts["settings"]["data"]["resize_shorter_side"], facts["training"]["data.resize_shorter_side"]) == (10, 10)
    record = json.loads((small / "stage.json").read_text())
    assert record["settings"]["data.resize_shorter_side"] == 10
    assert not {"data.cache", "data.cache_gib"} & record["settings"].keys()


def test_prediction_uses_the_pixels_that_the_model_was_trained_on(inputs, models, prepared_cache):
    """`predict` (which decodes once for all models), the fold and the ensemble use the same pixels, cached or not."""
    model = models / "sized" / "fold-0"
    assert run_step(inputs, "predict", "answers", "predict.subsets=valid", IMAGES=inputs / "train", MODEL=model) == 0
    rows = read_rows(inputs / "answers" / "output" / "predictions.csv")
    confidence = {row["image_path"]: float(row["confidence"]) for row in rows}
    table = read(model / "model" / "oof.parquet")
    expected = {name: float(np.exp(row.max())) for name, row in zip(table.ids, table.log_probs, strict=True)}
    assert {name: confidence[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert run_step(inputs, "prepare", "prepared-small", *RESIZE, EVAL=inputs / "eval") == 0
    tables = set()
    for number, cache in enumerate((None, inputs / "prepared-small" / "output", prepared_cache)):
        channels = {"MODEL": models / "sized", "EVAL": inputs / "eval", "CACHE": cache}
        assert run_step(inputs, "ensemble", f"ensemble-{number}", **channels) == 0
        tables.add((inputs / f"ensemble-{number}" / "output" / "predictions.parquet").read_bytes())
    assert len(tables) == 1


def test_run_in_a_bucket_reads_its_cache_from_there(inputs, uncached_model, bucket, tmp_path, capsys):
    for path in (inputs / "split" / "output").iterdir():
        bucket.write(f"runs/first/split/output/{path.name}", path.read_bytes())
    environ = {"RUN": "first", "RUNS": f"s3://{bucket.name}/runs", "SM_CHANNEL_TRAIN": str(inputs / "train")}
    assert run("prepare", [], environ) == 0
    assert len([key for key in bucket.listed("runs/first/prepare/output/") if key.endswith(PIXELS_FILE)]) == 1
    capsys.readouterr()
    folders = {"SM_MODEL_DIR": str(tmp_path / "model"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    assert run("train-fold", ["FOLD=0", *SETTINGS], environ | folders) == 0
    assert "(32 images, " in capsys.readouterr().err
    assert models_equal(tmp_path / "model", uncached_model)


def test_models_with_different_resizing_predict_together(inputs, models):
    """Compare `predict`, which decodes for all models, with the ensemble stage, in which each model reads for itself."""
    arguments = ("ensemble.blend=mean", "ensemble.calibrate_on=none")
    assert run_step(inputs, "ensemble", "mixed-ensemble", *arguments, MODEL=models, EVAL=inputs / "eval") == 0
    table = read(inputs / "mixed-ensemble" / "output" / "predictions.parquet")
    confidences = np.exp(table.log_probs.max(axis=1)).tolist()
    assert run_step(inputs, "predict", "mixed-predict", IMAGES=inputs / "eval", MODEL=models, FOLDS=None) == 0
    rows = read_rows(inputs / "mixed-predict" / "output" / "predictions.csv")
    actual = {row["image_path"]: float(row["confidence"]) for row in rows}
    expected = {f"images/{name}.png": value for name, value in zip(table.ids, confidences, strict=True)}
    assert actual == pytest.approx(expected, abs=1e-5)


def test_unlabeled_images_of_a_student_come_from_the_cache(inputs, models, prepared_cache):
    channels = {"MODEL": models / "whole", "UNLABELED": inputs / "eval"}
    for name, cache in {"student": None, "student-cached": prepared_cache}.items():
        assert run_step(inputs, "distill", name, *SETTINGS, CACHE_OFF, **channels, CACHE=cache) == 0
    weights = [(inputs / name / "model" / "model.safetensors").read_bytes() for name in ("student", "student-cached")]
    assert weights[0] == weights[1]


def test_cache_with_other_decode_settings_gives_one_clear_error(inputs, prepared_cache):
    arguments = ["FOLD=0", *SETTINGS, "data.resize_shorter_side=12"]
    assert run_step(inputs, "train-fold", "bad", *arguments, CACHE=prepared_cache) == 64
    message = failure(inputs / "bad")
    assert "12 pixels" in message
    assert "run prepare with the same data.resize_shorter_side" in message
    assert run_step(inputs, "prepare", "bad", "data.jpeg_draft=true") == 64, "jpeg_draft needs a size"


def test_prepare_accepts_an_unverified_split_and_train_fold_makes_no_cache(inputs):
    assert run_step(inputs, "split", "trusting", "split.folds=2", "split.holdout=0.1", "split.verify_images=false") == 0
    channels = {"FOLDS": inputs / "trusting" / "output"}
    assert run_step(inputs, "prepare", "trusting/prepared", **channels) == 0
    uncached = train_fold(inputs, "trusting/first", f"data.cache={inputs / 'untouched'}", **channels)
    assert not (inputs / "untouched").exists()
    channels["CACHE"] = inputs / "trusting" / "prepared" / "output"
    assert models_equal(train_fold(inputs, "trusting/cached", CACHE_OFF, **channels), uncached)


def test_cache_folder_lies_beside_the_runs_and_is_absent_outside_a_run(tmp_path):
    def folder(**data: object) -> Path | None:
        return cache_folder(Settings(run="first", runs=str(tmp_path / "r"), data=Data(**data)))

    assert folder() is None, "a run that is only a name has no folder"
    (tmp_path / "r").mkdir()
    assert folder() == tmp_path / "r" / ".cache"
    assert folder(cache="off") is folder(cache="") is None
    assert folder(cache="/x") == Path("/x")
    assert cache_folder(Settings()) is None
    assert cache_folder(Settings(run="first", runs="s3://b/runs")) is None


def test_steps_of_a_local_run_share_one_cache_unless_set_otherwise(tmp_path):
    def shared(*overrides: str) -> dict[str, str]:
        return shared_cache(make_plan(Inputs(train="/data"), overrides, "first", str(tmp_path), "demo"))

    assert shared() == {"DATA__CACHE": str(tmp_path / ".cache")}
    assert shared("data.cache=off") == shared("data.cache=/x") == {}


def test_stage_with_a_run_uses_the_finished_cache_of_prepare(tmp_path):
    def run_variables(stage: str) -> Mapping[str, str]:
        return env_for_run(STAGES[stage], {}, str(tmp_path / "first"), 0)

    output = tmp_path / "first" / "prepare" / "output"
    output.mkdir(parents=True)
    assert "SM_CHANNEL_CACHE" not in run_variables("train-fold"), "prepare has not finished"
    (output / "stage.json").write_text("{}")
    for name in ("train-fold", "ensemble", "distill"):
        assert run_variables(name)["SM_CHANNEL_CACHE"] == str(output)
    assert "SM_CHANNEL_CACHE" not in run_variables("evaluate")
    assert run_variables("prepare")["SM_OUTPUT_DATA_DIR"] == str(output)


def test_sigterm_exits_143_leaves_nothing_and_a_rerun_builds_the_cache(tmp_path):
    random = np.random.default_rng(0)
    for number in range(80):
        draw(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", random, size=(400, 400))
    assert run_step(tmp_path, "split", "split", "split.folds=2") == 0
    output = tmp_path / "prepared"
    environ = environment(**variables(tmp_path, "prepared", EVAL=None, SM_OUTPUT_DATA_DIR=output))
    process = subprocess.Popen([sys.executable, "-m", "jobs", "prepare"], env=environ, cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 10**6 for path in output.glob(".*.tmp/pixels.u8")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the stage ended before the signal"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not [path for path in output.iterdir() if not path.name.endswith(".lock")]
    assert run_step(tmp_path, "prepare", "prepared", SM_OUTPUT_DATA_DIR=output) == 0
    Cache(next(output.glob(f"*/{HEADER_FILE}")).parent).verify()
