"""The stages with every channel and output on `s3://`, against a real server, with a proxy that breaks things between them."""

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
from toy_data import SETTINGS as TINY
from toy_data import draw, write_test_table

SETTINGS = [*TINY, "train.epochs=2"]
IMAGES = 12
"""Of each of two classes, and to be tested."""
SAME = (".parquet", ".safetensors", "classes.json", "submission.csv")
"""Files that hold neither a time nor a place."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Training images, test images and their truth."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/images"):
        for number in range(IMAGES):
            bright = name == "train/b" or (name == "test/images" and number % 2 == 1)
            draw(root / name / f"{number}.png", random, channel=slice(None), by=100 * bright)
    write_test_table(root / "test", IMAGES, truth=True)
    return root


@pytest.fixture
def filled(bucket, images) -> Bucket:
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


def stage(bucket: Bucket, step: str, *more: str, **others: str) -> int:
    """A step of a run whose channels and outputs all lie in the bucket, but for the failure file; its exit code."""
    name, arguments, channels = STAGES[step]
    places = {"TRAIN": "data/train", "EVAL": "data/test", **channels}
    places |= {"FOLDS": "run/split/output"} if name != "split" else {}
    environ = {f"SM_CHANNEL_{channel}": f"s3://{bucket.name}/{key}" for channel, key in places.items()}
    environ["SM_GROUND_TRUTH_DIR"] = f"s3://{bucket.name}/data/test/gt.csv"
    environ["SM_MODEL_DIR"] = f"s3://{bucket.name}/run/{step}/model"
    environ["SM_OUTPUT_DATA_DIR"] = f"s3://{bucket.name}/run/{step}/output"
    return run(name, [*arguments, *more], environ | others)


def record(bucket: Bucket, step: str) -> dict:
    """The one record of a step; all files that it names lie beside it."""
    found = [key for key in bucket.listed(f"run/{step}/") if key.endswith("/stage.json")]
    assert len(found) == 1, found
    told = json.loads(bucket.read(found[0]))
    attempt = found[0].removesuffix("stage.json")
    assert {key.removeprefix(attempt) for key in bucket.listed(attempt)} == {*told["files"], "stage.json"}
    for name, digest in told["files"].items():
        assert hashlib.sha256(bucket.read(attempt + name)).hexdigest() == digest
    return told


def contents(bucket: Bucket) -> dict[str, bytes]:
    return {key: bucket.read(key) for key in sorted(bucket.listed())}


def results(bucket: Bucket) -> dict[str, dict[str, str]]:
    """The digests of what each step made, but for what holds a time or a place."""
    return {step: {n: d for n, d in record(bucket, step)["files"].items() if n.endswith(SAME)} for step in STAGES}


def test_the_smallest_policy_is_enough_and_no_more_than_the_data_and_the_runs(filled):
    policy = Policy("s3-policy.json", BUCKET=filled.name, PREFIX="run")
    proxy = Proxy(
        filled.endpoint, lambda request: None if policy.allows_request(request.method, request.path) else "403"
    )
    with proxy.listening() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert [stage(filled, step) for step in ("split", "fold-0", "split")] == [0, 0, 0]
        assert proxy.faults == []
        assert {request.method for request in proxy.requests} == {"GET", "PUT", "DELETE"}
        outside = f"s3://{filled.name}/elsewhere/output"
        assert stage(filled, "split", SM_OUTPUT_DATA_DIR=outside) == 64
        assert stage(filled, "split", SM_CHANNEL_TRAIN=f"s3://{filled.name}/database") == 64
        assert proxy.faults
    for key in ("data/x", "run2/x", "runs", "x"):
        assert not policy.of_objects(filled.name, key) - ({"Get"} if key == "data/x" else set()), key
        assert not policy.lists(filled.name, "" if key == "x" else key.replace("data/x", "data2"))


@pytest.mark.slow
def test_the_whole_run_lies_in_a_bucket_and_again_has_nothing_to_do(filled, capsys):
    for step in STAGES:
        assert stage(filled, step) == 0, step
    assert record(filled, "evaluate")["metrics"]["test"]["n"] == IMAGES
    assert record(filled, "distill")["sources"]["train"] == [f"s3://{filled.name}/data/train"] * 2
    before = contents(filled)
    assert not [key for key in before if "checkpoints" in key], "what a finished stage no longer needs"
    capsys.readouterr()
    for step in STAGES:
        assert stage(filled, step) == 0
    told = capsys.readouterr().err
    assert told.count("nothing to do") == len(STAGES)
    assert f"match s3://{filled.name}/run/split/output/stage.json" in told
    assert "/tmp" not in told, "paths of this process mean nothing to anybody"
    assert contents(filled) == before
    check_lineage(filled, capsys)


def check_lineage(bucket: Bucket, capsys) -> None:
    """`trace` finds its way through the bucket, from a file as its stage wrote it back to the images, and tells a changed one."""
    url = f"s3://{bucket.name}"
    assert main(["trace", f"{url}/run/distill/model/model.safetensors"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"distill: {url}/run/distill/model")
    assert f"model <- train-fold: {url}/run/fold-1/model" in told
    assert f"train: {url}/data/train" in told
    assert main(["trace", f"{url}/run/ensemble", "--check"]) == 0
    assert ": 4 records" in capsys.readouterr().out
    bucket.write("data/train/a/3.png", bucket.read("data/train/a/4.png"))
    assert main(["trace", f"{url}/run/ensemble", "--check"]) == 65
    assert "a/3.png " in capsys.readouterr().err
    assert main(["trace", f"{url}/no/where"]) == 66


@pytest.mark.slow
def test_a_changed_setting_replaces_the_attempt_and_the_stages_after_it_see_the_new_one(filled, capsys):
    for step in ("split", "fold-0", "fold-1", "ensemble"):
        assert stage(filled, step) == 0
    old = record(filled, "fold-0")
    capsys.readouterr()
    for step in ("fold-0", "fold-1"):
        assert stage(filled, step, "train.lr=0.01") == 0
        assert "train-fold runs: settings differ: train.lr" in capsys.readouterr().err
    assert record(filled, "fold-0")["files"] != old["files"]
    assert stage(filled, "ensemble") == 0
    assert "ensemble runs: inputs differ: model" in capsys.readouterr().err


def test_an_attempt_without_its_record_counts_for_nothing(filled, capsys):
    assert stage(filled, "split") == 0
    attempt = next(key for key in filled.listed("run/split") if key.endswith("stage.json")).removesuffix("stage.json")
    half = attempt[:-9] + "00000000/"
    filled.write(f"{half}folds.parquet", b"half a fi")
    assert stage(filled, "fold-0") == 0, "reads the whole one"
    filled.delete(f"{attempt}stage.json")
    capsys.readouterr()
    assert stage(filled, "fold-1") == 66
    assert f"s3://{filled.name}/run/split/output: no" in capsys.readouterr().err


def test_system_folders_of_a_bucket_are_left_out_and_counted(filled, images, capsys):
    content = (images / "train/a/0.png").read_bytes()
    for key in ("a/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg", "#recycle/a/1.png", "__MACOSX/a/._0.png", "lost+found/2.png"):
        filled.write(f"data/train/{key}", content)
    filled.write("data/train/a/raw.dng", content)
    filled.write("data/train/cow/", b"")
    assert stage(filled, "split") == 0
    (key,) = [key for key in filled.listed("run/split") if key.endswith("split_summary.json")]
    summary = json.loads(filled.read(key))
    assert summary["rows"] == 2 * IMAGES
    assert summary["left_out"] == {"in system folders": 3, ".dng": 1}
    said = capsys.readouterr().err
    assert "/data/train: " in said
    assert "1 hidden" in said
    assert "/data/train: folders without any object: cow/" in said


def test_archived_objects_are_66_before_anything_is_fetched(filled, images, tmp_path, capsys):
    content, key = (images / "train/a/0.png").read_bytes(), "data/train/a/0.png"
    filled.client.put_object(Bucket=filled.name, Key=key, Body=content, StorageClass="GLACIER")
    assert stage(filled, "split") == 66
    assert f"s3://{filled.name}/{key}" in capsys.readouterr().err
    assert not filled.listed("run/split")
    filled.client.restore_object(Bucket=filled.name, Key=key, RestoreRequest={"Days": 1})
    assert stage(filled, "split") == 0


def test_names_that_no_file_system_or_store_has_room_for_end_at_once(filled, images, capsys):
    content = (images / "train/a/0.png").read_bytes()
    filled.write(f"data/train/a/{'n' * 300}.png", content)
    assert stage(filled, "split") == 65
    assert "nnn" in capsys.readouterr().err
    filled.delete(f"data/train/a/{'n' * 300}.png")
    long = "/".join(["p" * 100] * 8)
    assert stage(filled, "split", SM_OUTPUT_DATA_DIR=f"s3://{filled.name}/{long}") == 64
    assert not filled.listed("p")


@pytest.mark.slow
def test_two_writers_do_not_mix(filled, monkeypatch):
    """A pod's dying twin leaves its files and its record after ours; who reads takes the one or the other."""
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.1)
    assert stage(filled, "split") == 0
    mine = record(filled, "split")
    key = next(key for key in filled.listed("run/split") if key.endswith("stage.json"))
    twin = key.replace(key.split("/")[-2][-8:], "ffffffff").removesuffix("stage.json")
    other = filled.read(key.replace("stage.json", "folds.parquet")) + b"!"
    filled.write(f"{twin}folds.parquet", other)
    assert stage(filled, "fold-0") == 0
    filled.write(f"{twin}stage.json", json.dumps({**mine, "files": {"folds.parquet": "0" * 64}}).encode())
    assert stage(filled, "fold-1") == 75, "the twin's record is newer, and its file is not what it says"
    files = {name: hashlib.sha256(filled.read(key.replace("stage.json", name))).hexdigest() for name in mine["files"]}
    for name in files:
        filled.write(f"{twin}{name}", filled.read(key.replace("stage.json", name)))
    filled.write(f"{twin}stage.json", json.dumps({**mine, "files": files}).encode())
    assert stage(filled, "fold-1") == 0
    assert stage(filled, "split") == 0


@pytest.mark.slow
def test_submit_takes_its_inputs_from_a_bucket(filled, tmp_path, capsys):
    """The stages run here; the truth beside the test table is found there."""
    train, test = f"train=s3://{filled.name}/data/train", f"eval=s3://{filled.name}/data/test"
    asked = ["submit", train, test, f"runs={tmp_path}", "run=r", "split.folds=2", *SETTINGS]
    assert main([*asked, "--dry-run"]) == 0
    assert f"=s3://{filled.name}/data/test/gt.csv" in capsys.readouterr().out
    assert main([*asked, "stages=split"]) == 0
    assert (tmp_path / "r" / "split" / "output" / "folds.parquet").is_file()
    assert main(["submit", f"train=s3://{filled.name}/nothing", f"runs={tmp_path}", "run=s", "stages=split"]) == 66
    assert main(["submit", "train=gs://b/k", f"runs={tmp_path}", "run=s"]) == 64


FAULTS = ("503", "drop", "truncate", "slow", "lost")


@pytest.mark.slow
def test_faults_between_the_stages_and_the_store_change_nothing(filled, monkeypatch):
    """A share of all requests fails in each way; every stage ends well, with the bytes of a run without faults."""
    for step in STAGES:
        assert stage(filled, step) == 0
    undisturbed = results(filled)
    for key in filled.listed("run/"):
        filled.delete(key)
    proxy = Proxy(filled.endpoint, now_and_then(0, 0.1, FAULTS))
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for step in STAGES:
            assert stage(filled, step) == 0, step
    assert {*proxy.faults} == {*FAULTS}
    assert results(filled) == undisturbed


def test_a_store_that_fails_again_and_again_is_not_given_up_while_objects_arrive(filled, monkeypatch, capsys):
    """Each image fails five times: all together more often than a store without progress is tried."""
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.1)
    monkeypatch.setattr("fivefold.contract.s3.client.TRANSFER_CONFIG", TransferConfig(max_concurrency=2))
    left = dict.fromkeys((f"/{filled.name}/{key}" for key in filled.listed("data/train/")), 5)

    def five_times(request: Request) -> str | None:
        path = request.path.partition("?")[0]
        left[path] = left.get(path, 0) - 1
        return "503" if left[path] >= 0 else None

    proxy = Proxy(filled.endpoint, five_times)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert stage(filled, "split") == 0
    assert capsys.readouterr().err.count("trying again") > MAX_ATTEMPTS


def test_objects_that_arrived_are_not_fetched_again_after_a_failure(filled, monkeypatch):
    """The first image of the listing fails once, when all others are on their way."""
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.1)
    first, *others = [f"/{filled.name}/{key}" for key in filled.listed("data/train/")]
    requests: Counter[str] = Counter()

    def fail_first(request: Request) -> str | None:
        path = request.path.partition("?")[0]
        requests[path] += request.method == "GET"
        if path != first or requests[first] > 1:
            return None
        until = time.monotonic() + 30
        while not all(requests[other] for other in others) and time.monotonic() < until:
            time.sleep(0.01)
        return "503"

    proxy = Proxy(filled.endpoint, fail_first)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert stage(filled, "split") == 0
    assert requests[first] == 2
    assert sum(requests[other] for other in others) <= len(others) + MAX_CONCURRENCY


@pytest.mark.parametrize("fault", ["spoilt", "garbled"])
def test_bytes_that_change_on_their_way_are_found_by_their_digest(fault, filled, monkeypatch, capsys):
    """The first three times that folds.parquet comes by, and what TCP and ETags let through."""
    seen: list[Request] = []

    def third(request: Request) -> str | None:
        if "folds.parquet" not in request.path or (request.method == "PUT") != (fault == "garbled") or len(seen) == 3:
            return None
        seen.append(request)
        return fault

    proxy = Proxy(filled.endpoint, third)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert stage(filled, "split") == 0
        assert stage(filled, "fold-0") == 0
    assert proxy.faults == [fault] * 3
    assert " again" in capsys.readouterr().err
    record(filled, "split")


@pytest.mark.slow
def test_a_store_that_starts_again_is_waited_for(filled, monkeypatch):
    proxy = Proxy(filled.endpoint)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        proxy.down_until = time.monotonic() + 3
        assert stage(filled, "split") == 0
        started = time.monotonic()

        def away(request: Request) -> str | None:
            if "attempt-" in request.path and request.method == "PUT" and proxy.down_until < started:
                proxy.down_until = time.monotonic() + 3
            return "drop" if time.monotonic() < proxy.down_until else None

        proxy.fault = away
        assert stage(filled, "fold-0") == 0
        assert proxy.down_until > started, "it was away while the model went up"
    record(filled, "fold-0")


@pytest.mark.slow
def test_a_store_that_stays_away_is_75_and_the_same_command_then_ends_well(filled, monkeypatch, capsys):
    """From the first file of the model on nothing goes up any more; the checkpoint is there, so no epoch is lost."""
    for step in ("split", "fold-1"):
        assert stage(filled, step) == 0
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.1)
    proxy = Proxy(filled.endpoint)
    proxy.fault = lambda request: "503" if "fold-0/output/attempt-" in request.path else None
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        assert stage(filled, "fold-0") == 75
    told = capsys.readouterr().err
    assert "the same command may succeed later" in told
    assert not [key for key in filled.listed("run/fold-0") if key.endswith("stage.json")]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", filled.endpoint)
    assert stage(filled, "fold-0") == 0
    assert "fold 0 epoch 1/2" not in capsys.readouterr().err, "epochs that a checkpoint holds are not run again"
    record(filled, "fold-0")


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ({"SM_CHANNEL_TRAIN": "gs://b/k"}, 64, "SM_CHANNEL_TRAIN is a"),
        ({"SM_CHANNEL_TRAIN": "s3://key:hush@b/k"}, 64, "a user or a key"),
        ({"SM_CHANNEL_TRAIN": "s3://{}/no/where"}, 66, "/no/where: no"),
        ({"SM_CHANNEL_TRAIN": "s3://no such bucket!/x"}, 64, "s3://no such bucket!/x "),
        ({"SM_CHANNEL_TRAIN": "s3://no-bucket/x"}, 66, "bucket 'no-bucket'"),
        ({"SM_OUTPUT_DATA_DIR": "s3://no-bucket/x"}, 66, "bucket 'no-bucket'"),
        ({"SM_OUTPUT_DIR": "s3://{}/x"}, 64, "SM_OUTPUT_DIR"),
    ],
)
def test_every_mistake_has_its_exit_code_and_its_words(given, code, message, filled, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage(filled, "split", **{name: value.format(filled.name) for name, value in given.items()}) == code
    told = capsys.readouterr().err
    assert message in told
    assert "hush" not in told
    assert not filled.listed("run/"), "nothing is half-written"
    assert not list(tmp_path.iterdir()), "no folder that is named like a URL"


def test_no_credentials_and_no_endpoint_are_told_and_secrets_are_not(filled, monkeypatch, capfd):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nowhere")
    assert stage(filled, "split", SM_LOG_LEVEL="10") == 64
    assert "check AWS_PROFILE, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3" in capfd.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", filled.endpoint)
    assert stage(filled, "split", SM_LOG_LEVEL="10") == 0
    told = "".join(capfd.readouterr())
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in told
    assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in told
    assert "Signature" not in told
    for name in CREDENTIALS:
        monkeypatch.delenv(name) if name.startswith("AWS_A") or "SECRET_A" in name else None
    assert stage(filled, "fold-0") == 64
    assert ": no credentials " in capfd.readouterr().err


@pytest.mark.parametrize("key", ["../x.png", "a//x.png", "a/0.png/x.png", "a/./x.png"])
def test_keys_that_are_no_paths_are_refused(key, filled, capsys):
    filled.write(f"data/train/{key}", b"x")
    assert stage(filled, "split") == 65
    told = capsys.readouterr().err
    assert "path '" in told or "cannot be a file" in told
