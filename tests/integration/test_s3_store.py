"""Objects in a real S3 store: transfers, visibility of attempts, and the rules that select them."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from fivefold.contract.run_layout import env_for_run
from fivefold.contract.s3 import commit, sync
from fivefold.contract.s3.checkpoint_sync import CheckpointSync
from fivefold.contract.s3.client import Download, S3Client, Upload
from fivefold.contract.s3.sync import S3Sync, with_urls
from fivefold.contract.s3.urls import Url, parse
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import DataError, RetryableError, SettingsError
from s3_server import Bucket, Proxy, Request

MIB = 2**20


@pytest.fixture
def url(bucket: Bucket) -> Url:
    return Url(bucket.name, "run/ensemble/output")


def put_attempt(bucket, url, stage: str, number: int, files: dict[str, bytes], marker="stage.json", year=2026) -> str:
    """Write an attempt and return its folder; without a marker the attempt is incomplete."""
    folder = f"{url.key}/attempt-{stage}-{year}0101T000000-{number:08d}"
    for name, content in files.items():
        bucket.write(f"{folder}/{name}", content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if marker:
        bucket.write(f"{folder}/{marker}", commit.commit_record({"stage": stage}, digests))
    return folder


def read_visible(bucket: Bucket, url: Url) -> dict[str, bytes]:
    store = S3Client()
    entries = commit.list_visible(store, url, store.list_objects(url))
    return {entry.name: bucket.read(entry.object.url.key) for entry in entries}


def test_large_file_is_transferred_in_parts_and_arrives_complete(bucket, url, tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(os.urandom(16 * MIB + 1))
    proxy = Proxy(bucket.endpoint)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = S3Client()
        store.transfer([Upload(tmp_path / "weights", url / "weights")], "up")
        (uploaded,) = store.list_objects(url)
        store.transfer([Download(uploaded, tmp_path / "back")], "down")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "weights").read_bytes()
    assert sum("partNumber=" in request.path for request in proxy.requests) == 3


def test_download_fails_if_the_object_changes(bucket, url, tmp_path, monkeypatch):
    bucket.write((url / "x").key, b"a" * 9 * MIB)
    store = S3Client()
    (listed,) = store.list_objects(url)
    bucket.write((url / "x").key, b"b" * 9 * MIB)
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.01)
    with pytest.raises(RetryableError, match=r"s3://.* changed"):
        store.transfer([Download(listed, tmp_path / "x")], "down")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fault", "method"), [("spoilt", "GET"), ("garbled", "PUT")])
def test_bytes_corrupted_in_transfer_are_detected_by_their_digest(
    fault, method, bucket, url, tmp_path, monkeypatch, caplog
):
    """Corrupt the first three transfers in ways that TCP and entity tags do not detect."""
    content, left = os.urandom(1000), [fault] * 3
    (tmp_path / "x").write_bytes(content)
    bucket.write((url / "x").key, content)
    (listed,) = S3Client().list_objects(url)
    download = Download(listed, tmp_path / "y", hashlib.sha256(content).hexdigest())
    proxy = Proxy(bucket.endpoint, lambda request: left.pop() if left and request.method == method else None)
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.01)
    with proxy.listening() as endpoint, caplog.at_level("DEBUG", "fivefold"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        S3Client().transfer([download if method == "GET" else Upload(tmp_path / "x", url / "x")], "x")
    assert proxy.faults == [fault] * 3
    assert caplog.text.count(" again") == 3
    assert (tmp_path / ("y" if method == "GET" else "x")).read_bytes() == bucket.read((url / "x").key) == content


def test_fetch_checks_free_disk_space_first(bucket, tiny_disk):
    bucket.write("data/x", bytes(MIB))
    remote = S3Sync(tiny_disk)
    path = remote.channel(Url(bucket.name, "data"))
    with pytest.raises(RetryableError, match=r"1\.0 MiB: free some, then run the same command again"):
        remote.fetch(path)


def test_only_the_newest_complete_attempt_of_each_stage_is_visible(bucket, url):
    put_attempt(bucket, url, "ensemble", 1, {"p.csv": b"1", "gone.csv": b""})
    time.sleep(1 - time.time() % 1)  # listings have a resolution of one second
    put_attempt(bucket, url, "ensemble", 2, {"p.csv": b"2"}, year=2025)
    put_attempt(bucket, url, "ensemble", 3, {"p.csv": b"3"}, marker="", year=2027)
    put_attempt(bucket, url, "evaluate", 4, {"report.html": b"r"})
    put_attempt(bucket, url, "train-fold", 5, {"sub/curves.png": b"c"}, marker="files.json")
    bucket.write(f"{url.key}/by hand.txt", b"h")
    bucket.write(f"{url.key}/.hidden", b"x")
    bucket.write(f"{url.key}/folder/", b"")
    files = read_visible(bucket, url)
    record, evaluate_record = json.loads(files.pop("stage.json")), json.loads(files.pop("evaluate.stage.json"))
    assert (record["stage"], evaluate_record["stage"]) == ("ensemble", "evaluate")
    assert files == {"p.csv": b"2", "report.html": b"r", "sub/curves.png": b"c", "by hand.txt": b"h"}
    parent_files = read_visible(bucket, url.parent.parent)
    assert parent_files["ensemble/output/p.csv"] == b"2"
    assert not [name for name in parent_files if "attempt-" in name]


def test_files_beside_an_attempt_do_not_replace_its_outputs(bucket, url, caplog):
    put_attempt(bucket, url, "train-fold", 1, {"model.json": b"m"})
    for name in ("holdout.parquet", "model.json", "stage.json", "notes.txt", "sub/holdout.parquet"):
        bucket.write(f"{url.key}/{name}", b"other")
    bucket.write(f"{url.parent.key}/holdout.parquet", b"of no attempt")
    with caplog.at_level("WARNING"):
        files = read_visible(bucket, url)
    del files["stage.json"]
    assert files == {"model.json": b"m", "notes.txt": b"other", "sub/holdout.parquet": b"other"}
    assert "holdout.parquet, model.json, stage.json" in caplog.text
    assert read_visible(bucket, url.parent)["holdout.parquet"] == b"of no attempt"


@pytest.mark.parametrize(
    ("marker", "error", "message"),
    [
        (b"{", DataError, "stage.json is .* marker of a finished stage: .*, or remove"),
        (b'{"files": 3}', DataError, "marker of a finished stage"),
        (b'{"files": {"p.csv": "00", "q.csv": "00"}}', RetryableError, "has no q.csv, "),
    ],
)
def test_invalid_markers_raise_errors(marker, error, message, bucket, url):
    folder = put_attempt(bucket, url, "ensemble", 1, {"p.csv": b"1"}, marker="")
    bucket.write(f"{folder}/stage.json", marker)
    with pytest.raises(error, match=message):
        read_visible(bucket, url)


def test_new_attempt_removes_the_one_it_replaces_and_stale_incomplete_ones(bucket, url, tmp_path, monkeypatch):
    put_attempt(bucket, url, "split", 1, {"folds.parquet": b"old"})
    put_attempt(bucket, url, "split", 2, {"folds.parquet": b"half"}, marker="")
    put_attempt(bucket, url, "ensemble", 3, {"p.csv": b"other"}, marker="")

    def run_stage(content: bytes) -> None:
        remote = S3Sync(tmp_path / content.decode())
        folder = remote.output(url)
        remote.delete_previous("split")
        (folder / "folds.parquet").write_bytes(content)
        (folder / "stage.json").write_text('{"stage": "split"}')
        remote.publish("split", folder / "stage.json", [folder / "folds.parquet"])

    run_stage(b"new")
    remaining = {name.split("/")[3][-8:] for name in bucket.listed()}
    assert "00000001" not in remaining
    assert {"00000002", "00000003"} <= remaining, "another stage may be writing there"
    assert read_visible(bucket, url)["folds.parquet"] == b"new"
    monkeypatch.setattr(sync, "STALE_AFTER_S", -60.0)
    run_stage(b"newer")
    remaining = {name.split("/")[3][-8:] for name in bucket.listed()}
    assert "00000002" not in remaining
    assert "00000003" in remaining, "it belongs to another stage"
    assert read_visible(bucket, url)["folds.parquet"] == b"newer"


def test_stage_uploads_only_the_files_it_wrote(bucket, url, tmp_path):
    """Two stages share a folder, the second finds the files of the first, and one folder is nested in another."""
    put_attempt(bucket, url, "ensemble", 1, {"p.csv": b"1", "q.csv": b"2"})
    remote = S3Sync(tmp_path)
    outer, inner = remote.output(url), remote.output(url / "inner")
    assert {path.name for path in outer.iterdir()} == {"p.csv", "q.csv", "stage.json", "inner"}
    remote.delete_previous("evaluate")
    (outer / "q.csv").write_bytes(b"changed")
    (outer / "report.html").write_bytes(b"r")
    (inner / "plot.png").write_bytes(b"i")
    (outer / "evaluate.stage.json").write_text('{"stage": "evaluate"}')
    remote.publish("evaluate", outer / "evaluate.stage.json", [outer / "report.html"])
    uploaded = {key.rpartition("/")[2] for key in bucket.listed() if "attempt-evaluate" in key}
    assert uploaded == {"files.json", "plot.png", "q.csv", "report.html", "stage.json"}
    assert read_visible(bucket, url)["p.csv"] == b"1"
    assert read_visible(bucket, url / "inner") == {"plot.png": b"i"}


def test_last_two_checkpoints_are_kept_and_restored(bucket, tmp_path):
    url = Url(bucket.name, "checkpoints")
    source = tmp_path / "here" / "0123"
    source.mkdir(parents=True)
    sync = CheckpointSync(S3Client(), url, source.parent)
    assert sync.restore(source) == set()
    for number in range(5):
        path = source / f"{number:08d}.pt"
        path.write_bytes(os.urandom(100))
        sync.upload_async(path)
        sync.close()
    assert [key.split("/")[-1].split(".")[0] for key in bucket.listed()] == ["00000003", "00000004"]
    assert not list(source.glob(".*")), "copies"
    restored = tmp_path / "there" / "0123"
    restored.mkdir(parents=True)
    bucket.write("checkpoints/4567/00000001." + "0" * 64 + ".pt", b"of another key")
    restoring_sync = CheckpointSync(S3Client(), url, restored.parent)
    assert restoring_sync.restore(restored) == {"0123", "4567"}
    assert {path.name: path.read_bytes() for path in restored.iterdir()} == {
        f"{number:08d}.pt": (source / f"{number:08d}.pt").read_bytes() for number in (3, 4)
    }
    restoring_sync.delete(restored)
    assert [key.split("/")[1] for key in bucket.listed()] == ["4567"]


def test_slow_store_skips_to_the_newest_checkpoint(bucket, tmp_path, monkeypatch):
    """During the first upload, training writes four more and deletes all its local checkpoints except the last two."""
    upload_started, release = threading.Event(), threading.Event()

    def hold_upload(request: Request) -> None:
        if request.method == "PUT":
            upload_started.set()
            release.wait(30)

    proxy = Proxy(bucket.endpoint, hold_upload)
    folder = tmp_path / "0123"
    folder.mkdir()
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        sync = CheckpointSync(S3Client(), Url(bucket.name, "c"), tmp_path)
        for number in range(5):
            path = folder / f"{number:08d}.pt"
            path.write_bytes(bytes([number]))
            sync.upload_async(path)
            if number > 1:
                (folder / f"{number - 2:08d}.pt").unlink()
            upload_started.wait(30)
        release.set()
        sync.close()
    assert [bucket.read(key) for key in bucket.listed()] == [bytes([0]), bytes([4])]


def test_failed_checkpoint_upload_only_logs_a_warning(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.01)
    folder = tmp_path / "0123"
    folder.mkdir()
    (folder / "00000001.pt").write_bytes(b"x")
    with Proxy(bucket.endpoint, lambda request: "503").listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        sync = CheckpointSync(S3Client(), Url(bucket.name, "c"), tmp_path)
        sync.upload_async(folder / "00000001.pt")
        sync.close()
    assert "a checkpoint could not be" in caplog.text
    assert "s3://" in caplog.text


def test_denied_requests_name_the_required_permissions(bucket, url, monkeypatch):
    proxy = Proxy(bucket.endpoint, lambda request: "403" if request.method == "PUT" else None)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(SettingsError, match=f"{url}/.* access refused .* need s3:ListBucket, s3:GetObject"):
            S3Sync(Path("/tmp")).output(url)


@pytest.mark.parametrize("key", ["../x.png", "a//x.png", "a/0.png/x.png", "a/./x.png", f"a/{'n' * 300}.png"])
def test_keys_that_are_not_valid_paths_are_rejected(key, bucket):
    for name in ("a/0.png", key):
        bucket.write(f"data/{name}", b"x")
    with pytest.raises(DataError):
        S3Sync(Path("/tmp")).channel(Url(bucket.name, "data"))


def test_env_for_run_omits_channels_that_a_bucket_lacks(bucket):
    environ = env_for_run(STAGES["evaluate"], {}, f"s3://{bucket.name}/runs/none", None)
    assert not [name for name in environ if name.startswith("SM_CHANNEL_")]


@pytest.mark.parametrize(
    ("text", "key"), [("s3://b/k", "k"), ("s3://b/a/b/", "a/b"), ("s3://b//a", "a"), ("S3://b/k", "k"), ("s3://b", "")]
)
def test_urls_are_normalised_and_invalid_ones_rejected(text, key):
    url = parse(text, "here")
    assert url == Url("b", key)
    assert parse(str(url), "here") == url
    for invalid in f"s3:// s3:///k s3://b/../k s3://b/./k http://b/k file:///x s3://u:p@b/k s3://b/{'n' * 300}".split():
        with pytest.raises(SettingsError, match="here"):
            parse(invalid, "here")


def test_messages_show_urls_instead_of_local_paths():
    message = "no oof.parquet below 'model' (/tmp/fivefold-ab_12x9q/in/bucket/run/fold-0), and /tmp/fivefold-ab_12x9q/x"
    assert with_urls(message) == "no oof.parquet below 'model' (s3://bucket/run/fold-0), and /tmp/fivefold-ab_12x9q/x"
