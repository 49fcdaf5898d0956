"""Stages with every channel and output on `s3://`, against a real server, with a proxy that injects faults."""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from boto3.s3.transfer import TransferConfig

from fivefold.contract.s3.client import MAX_ATTEMPTS, MAX_CONCURRENCY
from iam_policy import Policy
from jobs.__main__ import main, run
from s3_server import CREDENTIALS, Bucket, Proxy, Request, now_and_then
from toy_data import SETTINGS, draw, write_test_table

IMAGES_PER_FOLDER = 8
"""Training images of each of two classes, and test images."""
STABLE_FILES = (".parquet", ".safetensors", "classes.json", "submission.csv")
"""Files that contain neither times nor paths."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Training images, and test images with ground truth."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/images"):
        for number in range(IMAGES_PER_FOLDER):
            bright = name == "train/b" or (name == "test/images" and number % 2 == 1)
            draw(root / name / f"{number}.png", random, channel=slice(None), by=100 * bright)
    write_test_table(root / "test", IMAGES_PER_FOLDER, truth=True)
    return root


@pytest.fixture
def filled_bucket(bucket, images) -> Bucket:
    """A bucket with the images and their tables."""
    for path in images.rglob("*.*"):
        bucket.write(f"data/{path.relative_to(images).as_posix()}", path.read_bytes())
    return bucket


STAGES = {
    "split": ("split", ["split.folds=2", "split.seed=1"], {}),
    "fold-0": ("train-fold", ["FOLD=0", *SETTINGS], {}),
    "fold-1": ("train-fold", ["FOLD=1", *SETTINGS], {}),
    "ensemble": ("ensemble", [], {"MODEL": "run"}),
    "evaluate": ("evaluate", [], {"MODEL": "run", "PREDICTIONS": "run/ensemble/output"}),
    "distill": ("distill", SETTINGS, {"MODEL": "run"}),
}


def run_step(bucket: Bucket, step: str, *settings: str, output: str = "run", **variables: str) -> int:
    """Run a step with all channels and outputs in the bucket, except the failure file; return the exit code.

    It reads from `run/` and writes to `output`.
    """
    name, arguments, channels = STAGES[step]
    places = {"TRAIN": "data/train", "EVAL": "data/test", **channels}
    places |= {"FOLDS": "run/split/output"} if name != "split" else {}
    environ = {f"SM_CHANNEL_{channel}": f"s3://{bucket.name}/{key}" for channel, key in places.items()}
    environ["SM_GROUND_TRUTH_DIR"] = f"s3://{bucket.name}/data/test/gt.csv"
    environ["SM_MODEL_DIR"] = f"s3://{bucket.name}/{output}/{step}/model"
    environ["SM_OUTPUT_DATA_DIR"] = f"s3://{bucket.name}/{output}/{step}/output"
    return run(name, [*arguments, *settings], environ | variables)


def read_record(bucket: Bucket, step: str, output: str = "run") -> dict:
    """Return the only record of a step; check that exactly the files it names lie beside it."""
    keys = [key for key in bucket.listed(f"{output}/{step}/") if key.endswith("/stage.json")]
    assert len(keys) == 1, keys
    record = json.loads(bucket.read(keys[0]))
    attempt = keys[0].removesuffix("stage.json")
    assert {key.removeprefix(attempt) for key in bucket.listed(attempt)} == {*record["files"], "stage.json"}
    for name, digest in record["files"].items():
        assert hashlib.sha256(bucket.read(attempt + name)).hexdigest() == digest
    return record


def read_digests(bucket: Bucket, step: str, output: str = "run") -> dict[str, str]:
    """Return the digests of a step's outputs that contain neither times nor paths."""
    files = read_record(bucket, step, output)["files"]
    return {name: digest for name, digest in files.items() if name.endswith(STABLE_FILES)}


def test_minimal_policy_is_enough_and_covers_only_the_data_and_the_runs(filled_bucket):
    policy = Policy("s3-policy.json", BUCKET=filled_bucket.name, PREFIX="run")
    proxy = Proxy(
        filled_bucket.endpoint, lambda request: None if policy.allows_request(request.method, request.path) else "403"
    )
    with proxy.listening() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert [run_step(filled_bucket, step) for step in ("split", "fold-0", "split")] == [0, 0, 0]
        assert proxy.faults == []
        assert {request.method for request in proxy.requests} == {"GET", "PUT", "DELETE"}
        outside = f"s3://{filled_bucket.name}/elsewhere/output"
        assert run_step(filled_bucket, "split", SM_OUTPUT_DATA_DIR=outside) == 64
        assert run_step(filled_bucket, "split", SM_CHANNEL_TRAIN=f"s3://{filled_bucket.name}/database") == 64
        assert proxy.faults
    for key in ("data/x", "run2/x", "runs", "x"):
        assert not policy.of_objects(filled_bucket.name, key) - ({"Get"} if key == "data/x" else set()), key
        assert not policy.lists(filled_bucket.name, "" if key == "x" else key.replace("data/x", "data2"))


FAULTS = ("503", "drop", "truncate", "slow", "lost")


@pytest.mark.slow
def test_whole_run_in_a_bucket_survives_faults_and_repeats_only_what_changed(filled_bucket, monkeypatch, capsys):
    """A second run has nothing to do; requests that fail change no byte; a changed setting replaces the attempt."""
    for step in STAGES:
        assert run_step(filled_bucket, step) == 0, step
    assert read_record(filled_bucket, "evaluate")["metrics"]["test"]["n"] == IMAGES_PER_FOLDER
    assert read_record(filled_bucket, "distill")["sources"]["train"] == [f"s3://{filled_bucket.name}/data/train"] * 2
    before = {key: filled_bucket.read(key) for key in filled_bucket.listed()}
    assert not [key for key in before if "checkpoints" in key], "a finished stage keeps no checkpoints"
    capsys.readouterr()
    for step in STAGES:
        assert run_step(filled_bucket, step) == 0
    log = capsys.readouterr().err
    assert log.count("nothing to do") == len(STAGES)
    assert f"match s3://{filled_bucket.name}/run/split/output/stage.json" in log
    assert "/tmp" not in log, "the log names temporary paths of this process"
    assert {key: filled_bucket.read(key) for key in filled_bucket.listed()} == before

    proxy = Proxy(filled_bucket.endpoint, now_and_then(0, 0.1, FAULTS))
    with proxy.listening() as endpoint, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for step in ("split", "fold-0", "ensemble"):
            assert run_step(filled_bucket, step, output="other") == 0, step
            assert read_digests(filled_bucket, step, "other") == read_digests(filled_bucket, step)
    assert {*proxy.faults} == {*FAULTS}

    capsys.readouterr()
    for step, settings, reason in (
        ("fold-0", ["train.lr=0.01"], "settings differ: train.lr"),
        ("fold-1", ["train.lr=0.01"], "settings differ: train.lr"),
        ("ensemble", [], "inputs differ: model"),
    ):
        assert run_step(filled_bucket, step, *settings) == 0
        assert f" runs: {reason}" in capsys.readouterr().err
    assert read_digests(filled_bucket, "fold-0") != read_digests(filled_bucket, "fold-0", "other")


def test_system_folders_of_a_bucket_are_ignored_and_counted(filled_bucket, images, capsys):
    content = (images / "train/a/0.png").read_bytes()
    for key in ("a/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg", "#recycle/a/1.png", "__MACOSX/a/._0.png", "lost+found/2.png"):
        filled_bucket.write(f"data/train/{key}", content)
    filled_bucket.write("data/train/a/raw.dng", content)
    filled_bucket.write("data/train/cow/", b"")
    assert run_step(filled_bucket, "split") == 0
    (key,) = [key for key in filled_bucket.listed("run/split") if key.endswith("split_summary.json")]
    summary = json.loads(filled_bucket.read(key))
    assert summary["rows"] == 2 * IMAGES_PER_FOLDER
    assert summary["left_out"] == {"in system folders": 3, ".dng": 1}
    log = capsys.readouterr().err
    assert "/data/train: " in log
    assert "1 hidden" in log
    assert "/data/train: folders without any object: cow/" in log


def test_archived_object_exits_66_until_it_is_restored(filled_bucket, images, capsys):
    content, key = (images / "train/a/0.png").read_bytes(), "data/train/a/0.png"
    filled_bucket.client.put_object(Bucket=filled_bucket.name, Key=key, Body=content, StorageClass="GLACIER")
    assert run_step(filled_bucket, "split") == 66
    assert f"s3://{filled_bucket.name}/{key} is archived" in capsys.readouterr().err
    assert not filled_bucket.listed("run/split")
    filled_bucket.client.restore_object(Bucket=filled_bucket.name, Key=key, RestoreRequest={"Days": 1})
    assert run_step(filled_bucket, "split") == 0


@pytest.mark.slow
def test_submit_reads_inputs_from_a_bucket(filled_bucket, tmp_path, capsys):
    """The stages run locally; the ground truth is beside the test table in the bucket."""
    train, test = f"train=s3://{filled_bucket.name}/data/train", f"eval=s3://{filled_bucket.name}/data/test"
    arguments = ["submit", train, test, f"runs={tmp_path}", "run=r", "split.folds=2", *SETTINGS]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"=s3://{filled_bucket.name}/data/test/gt.csv" in capsys.readouterr().out
    assert main([*arguments, "stages=split"]) == 0
    assert (tmp_path / "r" / "split" / "output" / "folds.parquet").is_file()


def test_retries_continue_while_objects_arrive(filled_bucket, monkeypatch, capsys):
    """Each image fails five times; the total exceeds the attempts allowed without progress."""
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr("fivefold.contract.s3.client.TRANSFER_CONFIG", TransferConfig(max_concurrency=2))
    failures_left = dict.fromkeys((f"/{filled_bucket.name}/{key}" for key in filled_bucket.listed("data/train/")), 5)

    def fail_five_times(request: Request) -> str | None:
        path = request.path.partition("?")[0]
        failures_left[path] = failures_left.get(path, 0) - 1
        return "503" if failures_left[path] >= 0 else None

    proxy = Proxy(filled_bucket.endpoint, fail_five_times)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert run_step(filled_bucket, "split") == 0
    assert capsys.readouterr().err.count("trying again") > MAX_ATTEMPTS


def test_objects_that_arrived_are_not_downloaded_again_after_a_failure(filled_bucket, monkeypatch):
    """The first listed image fails once, after all others were requested."""
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.02)
    first, *others = [f"/{filled_bucket.name}/{key}" for key in filled_bucket.listed("data/train/")]
    requests: Counter[str] = Counter()

    def fail_first(request: Request) -> str | None:
        path = request.path.partition("?")[0]
        requests[path] += request.method == "GET"
        if path != first or requests[first] > 1:
            return None
        deadline = time.monotonic() + 30
        while not all(requests[other] for other in others) and time.monotonic() < deadline:
            time.sleep(0.01)
        return "503"

    proxy = Proxy(filled_bucket.endpoint, fail_first)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert run_step(filled_bucket, "split") == 0
    assert requests[first] == 2
    assert sum(requests[other] for other in others) <= len(others) + MAX_CONCURRENCY


@pytest.mark.slow
def test_unavailable_store_exits_75_and_the_same_command_succeeds_later(filled_bucket, monkeypatch, capsys):
    """Uploads fail from the first model file on; the checkpoint is stored, so no epoch is lost."""
    assert run_step(filled_bucket, "split") == 0
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.02)
    proxy = Proxy(filled_bucket.endpoint)
    proxy.fault = lambda request: "503" if "fold-0/output/attempt-" in request.path else None
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert run_step(filled_bucket, "fold-0") == 75
    log = capsys.readouterr().err
    assert "the same command may succeed later" in log
    assert not [key for key in filled_bucket.listed("run/fold-0") if key.endswith("stage.json")]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", filled_bucket.endpoint)
    assert run_step(filled_bucket, "fold-0") == 0
    assert "fold 0 epoch 1/1" not in capsys.readouterr().err, "epochs in the checkpoint are not run again"
    read_record(filled_bucket, "fold-0")


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"SM_CHANNEL_TRAIN": "s3://key:hush@b/k"}, 64, "a user or a key"),
        ({"SM_CHANNEL_TRAIN": "s3://{}/no/where"}, 66, "/no/where: no"),
        ({"SM_CHANNEL_TRAIN": "s3://no such bucket!/x"}, 64, "s3://no such bucket!/x"),
        ({"SM_CHANNEL_TRAIN": "s3://no-bucket/x"}, 66, "bucket 'no-bucket'"),
        ({"SM_OUTPUT_DATA_DIR": "s3://no-bucket/x"}, 66, "bucket 'no-bucket'"),
        ({"SM_OUTPUT_DATA_DIR": f"s3://{{}}/{'/'.join(['p' * 100] * 8)}"}, 64, "a shorter prefix"),
        ({"SM_OUTPUT_DIR": "s3://{}/x"}, 64, "SM_OUTPUT_DIR"),
    ],
)
def test_each_mistake_has_an_exit_code_and_a_message(variables, code, message, bucket, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("train/a/0.png", "test/0.png"):
        bucket.write(f"data/{key}", b"x")
    assert run_step(bucket, "split", **{name: value.format(bucket.name) for name, value in variables.items()}) == code
    log = capsys.readouterr().err
    assert message in log
    assert "hush" not in log
    assert not bucket.listed("run/"), "no partial output"
    assert not list(tmp_path.iterdir()), "no folder named like a URL"


def test_missing_credentials_and_endpoint_are_reported_and_secrets_are_not_logged(filled_bucket, monkeypatch, capfd):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nowhere")
    assert run_step(filled_bucket, "split", SM_LOG_LEVEL="10") == 64
    assert "check AWS_PROFILE, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3" in capfd.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", filled_bucket.endpoint)
    assert run_step(filled_bucket, "split", SM_LOG_LEVEL="10") == 0
    log = "".join(capfd.readouterr())
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in log
    assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in log
    assert "Signature" not in log
    for name in CREDENTIALS:
        monkeypatch.delenv(name) if name.startswith("AWS_A") or "SECRET_A" in name else None
    assert run_step(filled_bucket, "fold-0") == 64
    assert ": no credentials " in capfd.readouterr().err
