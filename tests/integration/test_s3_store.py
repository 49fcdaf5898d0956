"""Objects in a real store: how they move, how attempts show, and what of them counts."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from fivefold.contract.s3 import commit, sync
from fivefold.contract.s3.checkpoints import CheckpointSync
from fivefold.contract.s3.client import Download, S3Client
from fivefold.contract.s3.sync import S3Sync, with_urls
from fivefold.contract.s3.urls import Url, parse
from fivefold.errors import DataError, RetryableError, SettingsError
from s3_server import Bucket, Proxy, Request

MIB = 2**20


@pytest.fixture
def url(bucket: Bucket) -> Url:
    return Url(bucket.name, "run/ensemble/output")


def put(
    bucket: Bucket,
    url: Url,
    stage: str,
    number: int,
    files: dict[str, bytes],
    marker: str = "stage.json",
    year: int = 2026,
) -> str:
    """The folder of an attempt that is whole; of one that is not where there is no marker."""
    folder = f"{url.key}/attempt-{stage}-{year}0101T000000-{number:08d}"
    for name, content in files.items():
        bucket.write(f"{folder}/{name}", content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if marker:
        bucket.write(f"{folder}/{marker}", commit.commit_record({"stage": stage}, digests))
    return folder


def seen(bucket: Bucket, url: Url) -> dict[str, bytes]:
    store = S3Client()
    return {
        each.name: bucket.read(each.object.url.key) for each in commit.list_visible(store, url, store.list_objects(url))
    }


def test_large_file_moves_in_parts_and_arrives_whole(bucket, url, tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(os.urandom(20 * MIB + 1))
    proxy = Proxy(bucket.endpoint)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = S3Client()
        store.upload([(tmp_path / "weights", url / "weights")], "up")
        (uploaded,) = store.list_objects(url)
        store.download([Download(uploaded, tmp_path / "back")], "down")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "weights").read_bytes()
    assert sum("partNumber=" in request.path for request in proxy.requests) == 3


def test_an_object_that_changes_while_it_is_read_is_not_taken_for_whole(bucket, url, tmp_path, monkeypatch):
    bucket.write((url / "x").key, b"a" * 20 * MIB)
    store = S3Client()
    (found,) = store.list_objects(url)
    bucket.write((url / "x").key, b"b" * 20 * MIB)
    monkeypatch.setattr("fivefold.contract.s3.client.MAX_BACKOFF_S", 0.01)
    with pytest.raises(RetryableError, match=r"s3://.* changed"):
        store.download([Download(found, tmp_path / "x")], "down")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_would_fill_up_is_told_before_anything_is_fetched(bucket, tiny_disk):
    bucket.write("data/x", bytes(MIB))
    remote = S3Sync(tiny_disk)
    path = remote.channel(Url(bucket.name, "data"))
    with pytest.raises(RetryableError, match=r"1\.0 MiB: free some, then run the same command again"):
        remote.fetch(path)


def test_of_each_stage_the_newest_whole_attempt_shows_and_nothing_of_any_other(bucket, url):
    put(bucket, url, "ensemble", 1, {"p.csv": b"1", "gone.csv": b""})
    time.sleep(1.1)  # listings tell whole seconds
    put(bucket, url, "ensemble", 2, {"p.csv": b"2"}, year=2025)
    put(bucket, url, "ensemble", 3, {"p.csv": b"3"}, marker="", year=2027)
    put(bucket, url, "evaluate", 4, {"report.html": b"r"})
    put(bucket, url, "train-fold", 5, {"sub/curves.png": b"c"}, marker="files.json")
    bucket.write(f"{url.key}/by hand.txt", b"h")
    bucket.write(f"{url.key}/.hidden", b"x")
    bucket.write(f"{url.key}/folder/", b"")
    found = seen(bucket, url)
    record, aside = json.loads(found.pop("stage.json")), json.loads(found.pop("evaluate.stage.json"))
    assert (record["stage"], aside["stage"]) == ("ensemble", "evaluate")
    assert found == {"p.csv": b"2", "report.html": b"r", "sub/curves.png": b"c", "by hand.txt": b"h"}
    above = seen(bucket, url.parent.parent)
    assert above["ensemble/output/p.csv"] == b"2"
    assert not [name for name in above if "attempt-" in name]


def test_a_file_that_somebody_put_beside_an_attempt_is_not_taken_for_the_stages(bucket, url, caplog):
    put(bucket, url, "train-fold", 1, {"model.json": b"m"})
    for name in ("holdout.parquet", "model.json", "stage.json", "notes.txt", "sub/holdout.parquet"):
        bucket.write(f"{url.key}/{name}", b"other")
    bucket.write(f"{url.parent.key}/holdout.parquet", b"of no attempt")
    with caplog.at_level("WARNING"):
        found = seen(bucket, url)
    del found["stage.json"]
    assert found == {"model.json": b"m", "notes.txt": b"other", "sub/holdout.parquet": b"other"}
    assert "holdout.parquet, model.json, stage.json" in caplog.text
    assert seen(bucket, url.parent)["holdout.parquet"] == b"of no attempt"


@pytest.mark.parametrize(
    ("marker", "error", "message"),
    [
        (b"{", DataError, "stage.json is .* marker of a finished stage: .*, or remove"),
        (b'{"files": 3}', DataError, "marker of a finished stage"),
        (b'{"files": {"p.csv": "00", "q.csv": "00"}}', RetryableError, "has no q.csv, "),
    ],
)
def test_a_marker_that_does_not_fit_is_told(marker, error, message, bucket, url):
    folder = put(bucket, url, "ensemble", 1, {"p.csv": b"1"}, marker="")
    bucket.write(f"{folder}/stage.json", marker)
    with pytest.raises(error, match=message):
        seen(bucket, url)


def test_a_new_attempt_removes_the_one_it_replaces_and_those_left_half_done_long_ago(
    bucket, url, tmp_path, monkeypatch
):
    put(bucket, url, "split", 1, {"folds.parquet": b"old"})
    put(bucket, url, "split", 2, {"folds.parquet": b"half"}, marker="")
    put(bucket, url, "ensemble", 3, {"p.csv": b"other"}, marker="")

    def written(content: bytes) -> None:
        remote = S3Sync(tmp_path / content.decode())
        folder = remote.output(url)
        remote.invalidate_previous("split")
        (folder / "folds.parquet").write_bytes(content)
        (folder / "stage.json").write_text('{"stage": "split"}')
        remote.publish("split", folder / "stage.json", [folder / "folds.parquet"])

    written(b"new")
    left = {name.split("/")[3][-8:] for name in bucket.listed()}
    assert "00000001" not in left
    assert {"00000002", "00000003"} <= left, "somebody may be at work there"
    assert seen(bucket, url)["folds.parquet"] == b"new"
    monkeypatch.setattr(sync, "STALE_AFTER_S", -60.0)
    written(b"newer")
    left = {name.split("/")[3][-8:] for name in bucket.listed()}
    assert "00000002" not in left
    assert "00000003" in left, "of another stage"
    assert seen(bucket, url)["folds.parquet"] == b"newer"


def test_only_what_the_stage_wrote_goes_up(bucket, url, tmp_path):
    """Two stages share a folder, of which the second sees the first one's files, and a folder lies in another."""
    put(bucket, url, "ensemble", 1, {"p.csv": b"1", "q.csv": b"2"})
    remote = S3Sync(tmp_path)
    outer, inner = remote.output(url), remote.output(url / "inner")
    assert {path.name for path in outer.iterdir()} == {"p.csv", "q.csv", "stage.json", "inner"}
    remote.invalidate_previous("evaluate")
    (outer / "q.csv").write_bytes(b"changed")
    (outer / "report.html").write_bytes(b"r")
    (inner / "plot.png").write_bytes(b"i")
    (outer / "evaluate.stage.json").write_text('{"stage": "evaluate"}')
    remote.publish("evaluate", outer / "evaluate.stage.json", [outer / "report.html"])
    mine = {key.rpartition("/")[2] for key in bucket.listed() if "attempt-evaluate" in key}
    assert mine == {"files.json", "plot.png", "q.csv", "report.html", "stage.json"}
    assert seen(bucket, url)["p.csv"] == b"1"
    assert seen(bucket, url / "inner") == {"plot.png": b"i"}


def test_the_last_two_checkpoints_are_kept_and_come_back(bucket, tmp_path):
    url = Url(bucket.name, "checkpoints")
    here = tmp_path / "here" / "0123"
    here.mkdir(parents=True)
    sync = CheckpointSync(S3Client(), url, here.parent)
    assert sync.restore(here) == set()
    for number in range(5):
        path = here / f"{number:08d}.pt"
        path.write_bytes(os.urandom(100))
        sync.upload_async(path)
        sync.close()
    assert [key.split("/")[-1].split(".")[0] for key in bucket.listed()] == ["00000003", "00000004"]
    assert not list(here.glob(".*")), "copies"
    there = tmp_path / "there" / "0123"
    there.mkdir(parents=True)
    bucket.write("checkpoints/4567/00000001." + "0" * 64 + ".pt", b"of another key")
    other = CheckpointSync(S3Client(), url, there.parent)
    assert other.restore(there) == {"0123", "4567"}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        f"{number:08d}.pt": (here / f"{number:08d}.pt").read_bytes() for number in (3, 4)
    }
    other.delete(there)
    assert [key.split("/")[1] for key in bucket.listed()] == ["4567"]


def test_a_store_that_is_slower_than_the_training_gets_the_newest_checkpoint_alone(bucket, tmp_path, monkeypatch):
    """While the first goes up four more are written, and the training removes its own but the last two."""
    arrived, go_on = threading.Event(), threading.Event()

    def held(request: Request) -> None:
        if request.method == "PUT":
            arrived.set()
            go_on.wait(30)

    proxy = Proxy(bucket.endpoint, held)
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
            arrived.wait(30)
        go_on.set()
        sync.close()
    assert [bucket.read(key) for key in bucket.listed()] == [bytes([0]), bytes([4])]


def test_a_checkpoint_that_does_not_go_up_costs_a_warning_and_no_training(bucket, tmp_path, monkeypatch, caplog):
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


def test_refused_requests_say_which_rights_are_needed(bucket, url, monkeypatch):
    proxy = Proxy(bucket.endpoint, lambda request: "403" if request.method == "PUT" else None)
    with proxy.listening() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(SettingsError, match=f"{url}/.* access refused .* need s3:ListBucket, s3:GetObject"):
            S3Sync(Path("/tmp")).output(url)


@pytest.mark.parametrize(
    ("text", "key"), [("s3://b/k", "k"), ("s3://b/a/b/", "a/b"), ("s3://b//a", "a"), ("S3://b/k", "k"), ("s3://b", "")]
)
def test_urls_have_one_form(text, key):
    url = parse(text, "here")
    assert url == Url("b", key)
    assert parse(str(url), "here") == url
    for wrong in ("s3://", "s3:///k", "s3://b/../k", "s3://b/./k", "http://b/k", "file:///x", "s3://u:p@b/k"):
        with pytest.raises(SettingsError, match="here"):
            parse(wrong, "here")


def test_messages_speak_of_urls():
    told = "no oof.parquet below 'model' (/tmp/fivefold-ab_12x9q/in/bucket/run/fold-0), and /tmp/fivefold-ab_12x9q/x"
    assert with_urls(told) == "no oof.parquet below 'model' (s3://bucket/run/fold-0), and /tmp/fivefold-ab_12x9q/x"
