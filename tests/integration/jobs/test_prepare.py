"""`prepare`, its cache as a channel, and the cache that the first process makes: the same bytes as without any."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
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
from toy_data import REPOSITORY, draw, environment, failure, read_rows, run_stage, variables, write_test_table
from toy_data import SETTINGS as TINY

SETTINGS = [
    *TINY, 'model.backbone_kwargs={"widths": [4], "stem": 4}', "model.image_size=8", "train.epochs=2", "model.image_stats=aspect,color_mean",
]  # fmt: skip
SIZED = ["data.resize_shorter_side=10", "data.jpeg_draft=true"]
SAME = ("model.safetensors", "oof.parquet", "holdout.parquet", "train_log.csv", "model.json")
OFF, PLAIN = "data.cache=off", "train.cache_in_memory=false"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to train on, of several sizes and kinds, their split with a holdout, and images to test on."""
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
    assert stage(root, "split", "split", "split.folds=2", "split.holdout=0.1") == 0
    return root


def stage(root: Path, name: str, step: str, *arguments: str, **channels: Path | None) -> int:
    return run_stage(root, name, step, *arguments, **{"EVAL": None, **channels})


def train(root: Path, folder: str, *arguments: str, **channels: Path) -> Path:
    assert stage(root, "train-fold", folder, "FOLD=0", *SETTINGS, *arguments, **channels) == 0
    return root / folder / "model"


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    """The model of images that are read from their files at each epoch."""
    return train(world, "plain", OFF, PLAIN)


@pytest.fixture(scope="module")
def prepared(world: Path) -> Path:
    """The output of `prepare`, with the images to test on."""
    assert stage(world, "prepare", "prepared", EVAL=world / "eval") == 0
    return world / "prepared" / "output"


def same(one: Path, other: Path) -> bool:
    """Whether two folds' models are the same bytes, but for what `model.json` says of how they were made."""
    for name in SAME[:-1]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return True


def test_prepare_writes_one_cache_of_all_images_and_has_nothing_to_do_the_second_time(world, prepared, capsys):
    (folder,) = (path.parent for path in prepared.glob(f"*/{HEADER_FILE}"))
    cache = Cache(folder)
    cache.verify()
    assert len(cache) == 48
    assert cache.decode_options == DecodeOptions()
    record = json.loads((prepared / "stage.json").read_text())
    assert set(record["outputs"]) == {f"output/{folder.name}/{name}" for name in (PIXELS_FILE, INDEX_FILE, HEADER_FILE)}
    assert record["metrics"] == {"images": 48, "bytes": cache.bytes}
    capsys.readouterr()
    assert stage(world, "prepare", "prepared", "data.cache_gib=1", EVAL=world / "eval") == 0
    assert "nothing to do" in capsys.readouterr().err


def test_the_same_bytes_kept_in_memory_from_the_channel_and_made_on_first_use(world, plain, prepared, capsys):
    assert same(train(world, "kept", OFF), plain)
    assert same(train(world, "channel", OFF, PLAIN, CACHE=prepared), plain)
    assert re.search(r"image cache: .* \(48 images, .*, 0.1 MiB\)", capsys.readouterr().err)
    assert same(train(world, "first", f"data.cache={world / 'caches'}", "train.num_workers=1"), plain)
    assert len(list((world / "caches").glob(f"*/{HEADER_FILE}"))) == 1
    assert "32 images are decoded once" in capsys.readouterr().err
    capsys.readouterr()
    assert same(train(world, "second", f"data.cache={world / 'caches'}"), plain)
    assert "are decoded once" not in capsys.readouterr().err


def test_rows_that_a_cache_lacks_are_read_from_their_files(world, plain, capsys):
    folds = world / "few" / "split"
    (world / "few" / "train").mkdir(parents=True)
    shutil.copytree(world / "train" / "a", world / "few" / "train" / "a")
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (world / "few" / "train" / "b").mkdir(exist_ok=True)
        shutil.copy(world / "train" / "b" / name, world / "few" / "train" / "b")
    few = {"TRAIN": world / "few" / "train"}
    assert stage(world, "split", "few/split", "split.folds=2", **few) == 0
    assert stage(world, "prepare", "few/prepared", **few, FOLDS=folds / "output") == 0
    found = train(world, "few/fold", OFF, CACHE=world / "few" / "prepared" / "output")
    assert re.search("13 of 32 .* from their files", capsys.readouterr().err)
    assert same(found, plain)


def test_store_size_gives_other_weights_and_they_are_the_same_with_and_without_a_cache(world, plain, capsys):
    small = train(world, "small", *SIZED, OFF, PLAIN)
    assert (small / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()
    assert same(train(world, "small-first", *SIZED, f"data.cache={world / 'caches'}"), small)
    facts = json.loads((small / "model.json").read_text())
    assert (facts["settings"]["data"]["resize_shorter_side"], facts["training"]["data.resize_shorter_side"]) == (10, 10)
    record = json.loads((small / "stage.json").read_text())
    assert record["settings"]["data.resize_shorter_side"] == 10
    assert not {"data.cache", "data.cache_gib"} & record["settings"].keys()


@pytest.mark.slow
def test_what_predicts_takes_the_pixels_that_the_model_was_trained_on(world, prepared):
    """`predict` (which decodes for a committee), the fold itself and the ensemble see the same pixels, cached or not."""
    models = [train(world, f"both/fold-{fold}", *SIZED, OFF, f"FOLD={fold}") for fold in range(2)]
    arguments = ["predict.subsets=valid"]
    assert stage(world, "predict", "answers", *arguments, IMAGES=world / "train", MODEL=models[0]) == 0
    rows = read_rows(world / "answers" / "output" / "predictions.csv")
    confidence = {row["image_path"]: float(row["confidence"]) for row in rows}
    table = read(models[0] / "oof.parquet")
    expected = {name: float(np.exp(row.max())) for name, row in zip(table.ids, table.log_probs, strict=True)}
    assert {name: confidence[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert stage(world, "prepare", "prepared-small", *SIZED, EVAL=world / "eval") == 0
    folders = {"without": {}, "with": {"CACHE": world / "prepared-small" / "output"}, "other": {"CACHE": prepared}}
    for name, cache in folders.items():
        assert stage(world, "ensemble", f"ensemble-{name}", MODEL=world / "both", EVAL=world / "eval", **cache) == 0
    tables = [(world / f"ensemble-{name}" / "output" / "predictions.parquet").read_bytes() for name in folders]
    assert len(set(tables)) == 1


@pytest.mark.slow
def test_told_to_stop_it_is_143_with_nothing_left_and_the_same_command_makes_the_cache(tmp_path):
    random = np.random.default_rng(0)
    for number in range(80):
        draw(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", random, size=(400, 400))
    assert stage(tmp_path, "split", "split", "split.folds=2") == 0
    output = tmp_path / "prepared"
    environ = environment(**variables(tmp_path, "prepared", EVAL=None, SM_OUTPUT_DATA_DIR=output))
    command = [sys.executable, "-m", "jobs", "prepare"]
    process = subprocess.Popen(command, env=environ, cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 10**6 for path in output.glob(".*.tmp/pixels.u8")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be told to"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not [path for path in output.iterdir() if not path.name.endswith(".lock")]
    assert subprocess.run(command, env=environ, cwd=REPOSITORY).returncode == 0
    Cache(next(output.glob(f"*/{HEADER_FILE}")).parent).verify()


@pytest.mark.slow
def test_a_cache_in_a_bucket_is_a_channel_and_a_run_there_finds_it(world, plain, bucket, tmp_path, capsys):
    for path in (world / "split" / "output").iterdir():
        bucket.write(f"runs/first/split/output/{path.name}", path.read_bytes())
    told = {"RUN": "first", "RUNS": f"s3://{bucket.name}/runs", "SM_CHANNEL_TRAIN": str(world / "train")}
    assert run("prepare", [], told) == 0
    assert len([key for key in bucket.listed("runs/first/prepare/output/") if key.endswith(PIXELS_FILE)]) == 1
    capsys.readouterr()
    folders = {"SM_MODEL_DIR": str(tmp_path / "model"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    assert run("train-fold", ["FOLD=0", *SETTINGS], told | folders) == 0
    assert "(32 images, " in capsys.readouterr().err
    assert same(tmp_path / "model", plain)


@pytest.mark.slow
def test_models_to_which_other_pixels_count_predict_together(world):
    """A committee, which decodes for all its members, against the ensemble, in which each member reads for itself."""
    for name, *more in (("sized", "data.resize_shorter_side=10", "data.jpeg_draft=true"), ("whole",)):
        for fold in range(2):
            train(world, f"mixed/{name}-{fold}", f"system={name}", *more, OFF, f"FOLD={fold}")
    channels = {"MODEL": world / "mixed", "EVAL": world / "eval"}
    assert (
        stage(world, "ensemble", "mixed-ensemble", "ensemble.blend=mean", "ensemble.calibrate_on=none", **channels) == 0
    )
    table = read(world / "mixed-ensemble" / "output" / "predictions.parquet")
    expected = {
        f"images/{name}.png": float(np.exp(row.max())) for name, row in zip(table.ids, table.log_probs, strict=True)
    }
    assert stage(world, "predict", "mixed-predict", IMAGES=world / "eval", MODEL=world / "mixed", FOLDS=None) == 0
    rows = read_rows(world / "mixed-predict" / "output" / "predictions.csv")
    found = {row["image_path"]: float(row["confidence"]) for row in rows}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_students_unlabelled_images_come_from_the_cache_too(world, plain, prepared):
    train(world, "teachers/fold-0", OFF)
    train(world, "teachers/fold-1", OFF, "FOLD=1")
    channels = {"MODEL": world / "teachers", "UNLABELED": world / "eval"}
    for name, more in {"student": {}, "student-cached": {"CACHE": prepared}}.items():
        assert stage(world, "distill", name, *SETTINGS, OFF, **channels, **more) == 0
    weights = [(world / name / "model" / "model.safetensors").read_bytes() for name in ("student", "student-cached")]
    assert weights[0] == weights[1]


def test_a_cache_of_other_pixels_is_one_clear_error(world, prepared):
    arguments = ["FOLD=0", *SETTINGS, "data.resize_shorter_side=12"]
    assert stage(world, "train-fold", "bad", *arguments, CACHE=prepared) == 64
    message = failure(world / "bad")
    assert "12 pixels" in message
    assert "run prepare with the same data.resize_shorter_side" in message
    assert stage(world, "prepare", "bad", "data.jpeg_draft=true") == 64, "it needs a size"


@pytest.mark.slow
def test_prepare_takes_a_split_that_opened_no_image_and_train_fold_goes_without(world, plain, capsys):
    assert stage(world, "split", "trusting", "split.folds=2", "split.holdout=0.1", "split.verify_images=false") == 0
    folds = world / "trusting" / "output"
    assert stage(world, "prepare", "trusting/prepared", FOLDS=folds) == 0
    cached = train(world, "trusting/cached", OFF, FOLDS=folds, CACHE=world / "trusting" / "prepared" / "output")
    plain = train(world, "trusting/plain", OFF, PLAIN, FOLDS=folds)
    assert same(cached, plain)
    train(world, "trusting/first", f"data.cache={world / 'untouched'}", FOLDS=folds)
    assert not (world / "untouched").exists()


def test_in_a_run_the_cache_lies_beside_the_runs_and_elsewhere_there_is_none(world, plain, tmp_path):
    def folder(**data: object) -> Path | None:
        return cache_folder(Settings(run="first", runs=str(tmp_path / "r"), data=Data(**data)))

    assert folder() is None, "a run that is but a title has no folder"
    (tmp_path / "r").mkdir()
    assert folder() == tmp_path / "r" / ".cache"
    assert folder(cache="off") is folder(cache="") is None
    assert folder(cache="/x") == Path("/x")
    assert cache_folder(Settings()) is None
    assert cache_folder(Settings(run="first", runs="s3://b/runs")) is None
    found = train(world, "told", "run=first", f"runs={world / 'runs'}")
    assert same(found, plain)
    assert len(list((world / "runs" / ".cache").glob(f"*/{HEADER_FILE}"))) == 1


def test_the_steps_of_a_local_run_share_one_cache_unless_the_settings_say_where(tmp_path):
    def shared(*overrides: str) -> dict[str, str]:
        return shared_cache(make_plan(Inputs(train="/data"), overrides, "first", str(tmp_path), "demo"))

    assert shared() == {"DATA__CACHE": str(tmp_path / ".cache")}
    assert shared("data.cache=off") == shared("data.cache=/x") == {}


def test_a_stage_that_is_told_its_run_finds_what_prepare_made_there(tmp_path):
    place = tmp_path / "first" / "prepare" / "output"
    place.mkdir(parents=True)
    assert "SM_CHANNEL_CACHE" not in env_for_run(STAGES["train-fold"], {}, str(tmp_path / "first"), 0), (
        "it is not finished"
    )
    (place / "stage.json").write_text("{}")
    for name in ("train-fold", "ensemble", "distill"):
        assert env_for_run(STAGES[name], {}, str(tmp_path / "first"), 0)["SM_CHANNEL_CACHE"] == str(place)
    assert "SM_CHANNEL_CACHE" not in env_for_run(STAGES["evaluate"], {}, str(tmp_path / "first"), 0)
    own = env_for_run(STAGES["prepare"], {}, str(tmp_path / "first"), None)
    assert own["SM_OUTPUT_DATA_DIR"] == str(place)
    assert own["SM_CHANNEL_FOLDS"] == f"{tmp_path}/first/split/output"
