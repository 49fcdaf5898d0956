"""A served model from the client side: a real process, real connections, responses compared with the API."""

import base64
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold import ImageClassificationAPI
from fivefold.config.schema import Settings
from fivefold.errors import FivefoldError
from fivefold.serving.workers import PIXEL_BYTES
from fivefold.system import GLIBC_TUNABLES
from jobs import serve
from reference_run import wait_until
from server_process import POST, TIMEOUT_S, ServerProcess, make_image, send_request
from toy_data import copy_run, run_stage

TOLERANCE = 1e-5
"""Maximum difference of a probability between batches, from float32 rounding."""
PNG = "image/png"
JSON = "application/json"
ExpectedImages = Sequence[tuple[bytes, str, float]]
"""Image files, each with its class and confidence from the API."""


@pytest.fixture(scope="module")
def trained_run(product_run, tmp_path_factory) -> Path:
    """The product run with an uncalibrated ensemble, so that confidences differ clearly."""
    root = copy_run(product_run, tmp_path_factory.mktemp("served") / "run", "ensemble")
    assert run_stage(root, "ensemble", "ensemble", "ensemble.calibrate_on=none", MODEL=root) == 0
    return root


def predict_images(model: Path, folder: Path) -> ExpectedImages:
    """Return images with clearly different confidences, each with its API result."""
    paths = sorted(folder.rglob("*.png"))
    images: list[tuple[bytes, str, float]] = []
    for path, result in zip(paths, ImageClassificationAPI(model, device="cpu").predict(paths), strict=True):
        confidence = result["confidence"]
        if all(abs(confidence - other) > 20 * TOLERANCE for _, _, other in images):
            images.append((path.read_bytes(), result["predicted_class"], confidence))
    assert len(images) > 60
    return images


@pytest.fixture(scope="module")
def images(trained_run, products) -> ExpectedImages:
    return predict_images(trained_run, products.root)


@pytest.fixture(scope="module")
def server(trained_run, tmp_path_factory) -> Iterator[ServerProcess]:
    """A server that is started as SageMaker starts it; `test_sigterm_…`, the last test that uses it, stops it."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "model").symlink_to(trained_run)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    limits = ["serve.max_body_mb=0.5", "serve.max_megapixels=4", "serve.max_queue=400", "serve.batch_size=16"]
    environ = {"SAGEMAKER_BASE_DIR": str(folder), "SAGEMAKER_BIND_TO_PORT": str(port)}
    with ServerProcess(folder / "log", *limits, **environ) as process:
        assert process.port == port
        yield process


def encode_list(files: Sequence[bytes]) -> bytes:
    return json.dumps([base64.b64encode(file).decode() for file in files]).encode()


def matches(result: Mapping[str, Any], expected: tuple[bytes, str, float]) -> bool:
    return result["predicted_class"] == expected[1] and abs(result["confidence"] - expected[2]) < TOLERANCE


def test_image_response_equals_the_api_result(server, images) -> None:
    for expected in images[:5]:
        answer = server.post(expected[0])
        assert (answer.status, answer.headers["content-type"]) == (200, JSON)
        result = answer.json
        assert list(result) == ["predicted_class", "confidence", "probabilities"]
        assert matches(result, expected)
        assert next(iter(result["probabilities"].items())) == (result["predicted_class"], result["confidence"])
        assert set(result["probabilities"]) == {"full_shot", "care_label", "neck_label", "detail_shot"}
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    for kind in ("image/webp", "application/x-image", "application/octet-stream", "Image/PNG; q=1", ""):
        assert matches(server.post(expected[0], kind).json, expected)


def test_list_response_keeps_the_order(server, images) -> None:
    images = [*images[:40], *reversed(images[:40])]
    answer = server.post(encode_list([file for file, _, _ in images]), JSON)
    assert answer.status == 200
    assert all(matches(result, expected) for result, expected in zip(answer.json, images, strict=True))
    assert server.post(b" [] ", JSON).json == []


def test_response_has_the_requested_length_and_format(server, images) -> None:
    file, name, confidence = images[0]
    short = server.request("POST", "/invocations?top=2", encode_list([file]), content_type=JSON).json
    assert [len(result["probabilities"]) for result in short] == [2]
    table = server.post(file, accept="text/*;q=0.5, */*")
    assert table.headers["content-type"].startswith("text/csv")
    header, row = table.body.decode().splitlines()
    assert header == "predicted_class,confidence"
    assert row.split(",")[0] == name
    assert float(row.split(",")[1]) == pytest.approx(confidence, abs=TOLERANCE)


def read_metrics(server: ServerProcess) -> dict[str, float]:
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_concurrent_clients_get_their_own_responses_and_share_batches(server, images) -> None:
    def send_requests(number: int) -> int:
        """Send images and lists of seven on one connection; return the number of images."""
        random, count = np.random.default_rng(number), 0
        with closing(server.connection()) as connection:
            for turn in range(12):
                chosen = [images[index] for index in random.integers(0, len(images), 1 if turn % 3 else 7)]
                files = [file for file, _, _ in chosen]
                body, kind = (files[0], PNG) if turn % 3 else (encode_list(files), JSON)
                answer = send_request(connection, "POST", "/invocations", body, content_type=kind).json
                results = [answer] if turn % 3 else answer
                assert all(matches(*pair) for pair in zip(results, chosen, strict=True))
                count += len(chosen)
        return count

    before = read_metrics(server)
    with ThreadPoolExecutor(16) as pool:
        count = sum(pool.map(send_requests, range(16)))
    after = read_metrics(server)
    increase = {name: after[name] - before.get(name, 0) for name in after}
    assert increase['fivefold_requests_total{status="200"}'] == 16 * 12
    assert increase["fivefold_request_seconds_count"] == 16 * 12
    assert increase["fivefold_batch_images_sum"] == count
    assert increase["fivefold_batch_images_count"] < count / 3
    assert increase['fivefold_batch_images_bucket{le="16.0"}'] == increase["fivefold_batch_images_count"]
    assert after["fivefold_images_under_way"] == 0


VALID_IMAGE = make_image(64, 64)


@pytest.mark.parametrize(
    ("kind", "body", "status", "image"),
    [
        (PNG, b"nothing", 422, None),
        (PNG, b"", 400, None),
        (PNG, make_image(5000, 1000, "1"), 422, None),
        (PNG, bytes(600_000), 413, None),
        ("text/plain", b"x", 415, None),
        (JSON, b"[" * 100_000, 400, None),
        (JSON, b'["eA==", "###"]', 400, 1),
        (JSON, encode_list([VALID_IMAGE, VALID_IMAGE, b"x"]), 422, 2),
        (JSON, encode_list([b"x"] * 401), 413, None),
    ],
    ids=["no image", "empty", "pixels", "bytes", "text", "deep", "no base64", "one bad of three", "too many"],
)
def test_invalid_body_gives_a_clear_4xx(server, kind, body, status, image) -> None:
    answer = server.post(body, kind)
    assert (answer.status, answer.json.get("image")) == (status, image)
    assert len(answer.json["error"]) > 10


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/invocations", {}, 405),
        ("GET", "/nothing", {}, 404),
        ("HEAD", "/ping", {}, 200),
        ("POST", "/invocations?top=0", {}, 400),
        ("POST", "/invocations?tpo=2", {}, 400),
        ("POST", "/invocations", {"content_encoding": "gzip"}, 415),
        ("POST", "/invocations", {"accept": "image/png"}, 406),
        ("POST", "/invocations", {"content_length": "-1"}, 400),
    ],
)
def test_invalid_request_gives_a_clear_4xx(server, method, path, headers, status) -> None:
    assert server.request(method, path, VALID_IMAGE, **{"content_type": PNG, **headers}).status == status


def test_oversized_body_is_rejected_before_it_is_complete(server) -> None:
    answer = server.post(bytes(100_000) for _ in range(20))
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    with server.raw() as connection:  # the server responds before the client has sent the whole body
        connection.sendall(POST % 99_999_999 + bytes(1000))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_sigterm_under_load_answers_every_accepted_request(server, images) -> None:
    expected, statuses = images[0], []
    file, before = expected[0], read_metrics(server)["fivefold_request_seconds_count"]

    def send_until_refused(end: float) -> None:
        with suppress(ConnectionError):
            while time.monotonic() < end:
                statuses.append(server.post(file).status)

    with ThreadPoolExecutor(6) as pool:
        with server.raw() as late, http.client.HTTPResponse(late) as response:
            late.sendall(POST % len(file) + file[:50])
            loads = [pool.submit(send_until_refused, time.monotonic() + TIMEOUT_S) for _ in range(6)]
            wait_until(lambda: len(statuses) > 20)
            server.process.terminate()
            server.wait_for("stopping: [0-9]+ requests ")
            late.sendall(file[50:])
            response.begin()
            assert response.status == 200
            assert matches(json.loads(response.read()), expected)
        for load in loads:
            load.result(TIMEOUT_S)
    assert server.process.wait(TIMEOUT_S) == 143
    assert set(statuses) == {200}
    server.wait_for(f"answered {before + len(statuses) + 1:.0f} requests")
    assert not (server.log.parent / "output").exists()


@pytest.mark.parametrize(
    ("arguments", "environ", "code"),
    [
        (["model={run}", "serve.port={used_port}"], {}, 64),
        (["model={run}", "predict.device=gpu"], {}, 64),
        (["model={run}"], {"SAGEMAKER_BIND_TO_PORT": "80800"}, 64),
        (["model={tmp}/unfinished"], {}, 65),
        (["model={tmp}/absent"], {}, 66),
        (["model="], {"SAGEMAKER_BASE_DIR": "/absent"}, 66),
    ],
)
def test_server_that_cannot_start_reports_why(arguments, environ, code, trained_run, tmp_path) -> None:
    shutil.copytree(trained_run / "distill/model", tmp_path / "unfinished")
    (tmp_path / "unfinished/stage.json").unlink()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names = {"run": trained_run, "tmp": tmp_path, "used_port": listener.getsockname()[1]}
        arguments = [argument.format(**names) for argument in arguments]
        with pytest.raises(FivefoldError) as caught:
            serve.main(arguments, environ or {"SERVE__PORT": "0"})
    assert caught.value.exit_code == code


def test_model_comes_from_the_first_source_that_is_set(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path), "SM_MODEL_DIR": "/b", "SM_CHANNEL_MODEL": "/a"}
    settings = Settings(run="first", runs="/runs")
    assert serve.model_path(environ, settings) == "/a"
    assert serve.model_path(environ | {"SM_CHANNEL_MODEL": ""}, settings) == "/b"
    del environ["SM_CHANNEL_MODEL"], environ["SM_MODEL_DIR"]
    assert serve.model_path(environ, settings) == "/runs/first/distill"
    assert serve.model_path(environ, Settings()) == str(tmp_path / "model")


def test_model_may_lie_in_a_bucket(trained_run, bucket, tmp_path) -> None:
    for path in (trained_run / "distill/model").iterdir():
        bucket.write(f"student/{path.name}", path.read_bytes())
    ensemble = serve.load_served_model(f"s3://{bucket.name}/student", Settings(), tmp_path)
    assert (len(ensemble.models), len(ensemble.classes)) == (1, 4)


POD_BYTES = 4 * 1024**3
"""Memory limit of the shipped pod."""


@pytest.mark.slow
def test_hostile_clients_do_not_block_a_normal_client_or_exhaust_memory(trained_run, products, tmp_path) -> None:
    images = predict_images(trained_run / "distill", products.root)
    progressive = make_image(7000, 7000, "RGB", "JPEG", progressive=True)
    scans = progressive[:-2] + progressive[progressive.rindex(b"\xff\xc4") : -2] * 200_000
    hostile = {
        "bomb": make_image(4000, 4000, "P", transparency=b"\x80"),
        "larger bomb": make_image(7000, 7000, "1"),
        "bomb of many colours": make_image(4000, 4000, "RGBA", "WEBP", lossless=True),
        "halved": progressive,
        "scans": scans[:7_900_000],
    }
    pixel_limit = f"serve.max_total_megapixels={POD_BYTES / 4 / PIXEL_BYTES / 1e6:.0f}"
    options = [f"model={trained_run / 'distill'}", "serve.timeout_s=20", pixel_limit]
    pod = {"OMP_NUM_THREADS": "2", "GLIBC_TUNABLES": GLIBC_TUNABLES}
    bombs = ["bomb", "larger bomb", "bomb of many colours", "halved"]
    stop, outcomes, latencies = threading.Event(), Counter(), []

    def attack(name: str) -> None:
        while not stop.is_set():
            try:
                outcomes[f"{name} {server.post(hostile[name]).status}"] += 1
            except ConnectionError:
                outcomes[f"{name} dropped"] += 1

    with (
        ServerProcess(tmp_path / "log", *options, **pod) as server,
        ThreadPoolExecutor(9) as pool,
        ExitStack() as stack,
    ):
        for _ in range(256):
            stack.enter_context(server.raw()).sendall(POST % 1000 + b"x")
        for _ in range(4):
            connection = stack.enter_context(server.raw())
            connection.setblocking(False)
            connection.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1500)
        stack.callback(stop.set)
        attackers = [pool.submit(attack, name) for name in [*bombs, *bombs, "scans"]]
        for expected in images[:20]:
            started = time.monotonic()
            answer = server.post(expected[0])
            latencies.append(time.monotonic() - started)
            assert matches(answer.json, expected), answer
            assert server.ping().status == 200
            time.sleep(0.05)
        stop.set()
        for attacker in attackers:
            attacker.result(TIMEOUT_S)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        assert server.stop() == 143
    print(f"mean {np.mean(latencies):.3f} s, longest {max(latencies):.3f} s; {peak / 1e6:.0f} MB; {dict(outcomes)}")
    assert np.mean(latencies) < 1, "on an otherwise idle machine each request takes less"
    assert max(latencies) < 5
    assert peak < POD_BYTES
    assert outcomes["scans 422"] > 0
    assert outcomes["larger bomb 422"] > 0
    assert outcomes["bomb 200"] > 0
    accepted = {f"{name} {status}" for name in bombs for status in (200, 503)}
    assert set(outcomes) <= {"scans 422", "larger bomb 422", *accepted}
