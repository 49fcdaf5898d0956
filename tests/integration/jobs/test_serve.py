"""A served model from the client side: a real process, real connections, responses compared with the API."""

import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fivefold import ImageClassificationAPI
from fivefold.config.schema import Settings
from fivefold.errors import FivefoldError
from fivefold.serving.workers import PIXEL_BYTES
from fivefold.system import GLIBC_TUNABLES
from jobs import serve
from server_process import TIMEOUT_S, Answer, ServerProcess, send_request
from toy_data import copy_run, run_stage

TOLERANCE = 1e-5
"""Maximum difference of a probability between batches, from float32 rounding."""
PNG = "image/png"
JSON = "application/json"
ExpectedImages = Mapping[str, tuple[bytes, str, float]]
"""Image files by name, each with its class and confidence from the API."""


@pytest.fixture(scope="module")
def trained_run(product_run, tmp_path_factory) -> Path:
    """The product run with an uncalibrated ensemble, so that confidences differ clearly."""
    root = copy_run(product_run, tmp_path_factory.mktemp("served") / "run", "ensemble")
    assert run_stage(root, "ensemble", "ensemble", "ensemble.calibrate_on=none", MODEL=root) == 0
    return root


def predict_images(model: Path, folder: Path) -> ExpectedImages:
    """Return images with clearly different confidences, each with its API result."""
    paths = sorted(folder.rglob("*.png"))
    images: dict[str, tuple[bytes, str, float]] = {}
    for path, result in zip(paths, ImageClassificationAPI(model, device="cpu").predict(paths), strict=True):
        confidence = result["confidence"]
        if all(abs(confidence - other) > 20 * TOLERANCE for _, _, other in images.values()):
            images[str(path)] = (path.read_bytes(), result["predicted_class"], confidence)
    assert len(images) > 60
    return images


@pytest.fixture(scope="module")
def images(trained_run, products) -> ExpectedImages:
    return predict_images(trained_run, products.root)


@pytest.fixture(scope="module")
def student_images(trained_run, products) -> ExpectedImages:
    return predict_images(trained_run / "distill", products.root)


@pytest.fixture(scope="module")
def server(trained_run, tmp_path_factory) -> Iterator[ServerProcess]:
    """The served ensemble; `early` holds its responses while it was loading."""
    limits = ["serve.max_body_mb=0.5", "serve.max_megapixels=4", "serve.max_queue=400", "serve.batch_size=16"]
    with ServerProcess(tmp_path_factory.mktemp("served") / "log", f"model={trained_run}", *limits) as process:
        process.early = [
            process.request("GET", "/ping"),
            process.request("POST", "/invocations", b"x", content_type=PNG),
        ]
        yield process.ready()


def encode_list(files: Sequence[bytes]) -> bytes:
    return json.dumps([base64.b64encode(file).decode() for file in files]).encode()


def matches(result: Mapping[str, Any], expected: tuple[bytes, str, float]) -> bool:
    return result["predicted_class"] == expected[1] and abs(result["confidence"] - expected[2]) < TOLERANCE


def make_image(width: int = 8, height: int = 8, mode: str = "RGB", file_format: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, file_format, **options)
    return content.getvalue()


def test_image_response_equals_the_api_result(server, images) -> None:
    for expected in list(images.values())[:5]:
        answer = server.request("POST", "/invocations", expected[0], content_type=PNG)
        assert (answer.status, answer.headers["content-type"]) == (200, JSON)
        result = answer.json
        assert list(result) == ["predicted_class", "confidence", "probabilities"]
        assert matches(result, expected)
        assert next(iter(result["probabilities"].items())) == (result["predicted_class"], result["confidence"])
        assert sorted(result["probabilities"].values(), reverse=True) == list(result["probabilities"].values())
        assert set(result["probabilities"]) == {"full_shot", "care_label", "neck_label", "detail_shot"}
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    for kind in ("image/webp", "application/x-image", "application/octet-stream", "Image/PNG; q=1", ""):
        assert matches(server.request("POST", "/invocations", expected[0], content_type=kind).json, expected)


def test_list_response_keeps_the_order(server, images) -> None:
    names = list(images)[:40]
    names = [*names, *reversed(names)]
    answer = server.request("POST", "/invocations", encode_list([images[name][0] for name in names]), content_type=JSON)
    assert answer.status == 200
    assert len(answer.json) == 80
    assert [name for result, name in zip(answer.json, names, strict=True) if not matches(result, images[name])] == []
    list_of_one = server.request("POST", "/invocations", encode_list([images[names[0]][0]]), content_type=JSON).json
    single = server.request("POST", "/invocations", images[names[0]][0], content_type=PNG).json["probabilities"]
    assert {name: pytest.approx(p, abs=TOLERANCE) for name, p in single.items()} == list_of_one[0]["probabilities"]
    assert server.request("POST", "/invocations", b" [] ", content_type=JSON).json == []


def test_response_has_the_requested_length_and_format(server, images) -> None:
    files = [file for file, _, _ in list(images.values())[:2]]
    short = server.request("POST", "/invocations?top=2", files[0], content_type=PNG).json
    assert len(short["probabilities"]) == 2
    table = server.request("POST", "/invocations", encode_list(files), content_type=JSON, accept="text/*;q=0.5, */*")
    assert table.headers["content-type"].startswith("text/csv")
    header, first, _ = table.body.decode().splitlines()
    assert header == "predicted_class,confidence"
    name, confidence = first.split(",")
    assert (name, float(confidence)) == (short["predicted_class"], pytest.approx(short["confidence"], rel=1e-5))


def send_concurrently(
    server: ServerProcess, images: ExpectedImages, clients: int, rounds: int
) -> tuple[Counter[str], int]:
    """Send images and lists from many clients, one connection each; return the outcomes and the number of images."""
    names = list(images)

    def client(number: int) -> tuple[Counter[str], int]:
        outcomes: Counter[str] = Counter()
        connection, count, random = server.connection(), 0, np.random.default_rng(number)
        for turn in range(rounds):
            chosen = [names[index] for index in random.integers(0, len(names), 1 if turn % 3 else 7)]
            files, is_list = [images[name][0] for name in chosen], turn % 3 == 0
            body, kind = (encode_list(files), JSON) if is_list else (files[0], PNG)
            answer = send_request(connection, "POST", "/invocations", body, content_type=kind)
            answers = (answer.json if is_list else [answer.json]) if answer.status == 200 else []
            correct = [matches(item, images[name]) for item, name in zip(answers, chosen, strict=False)]
            outcomes["right" if all(correct) and len(answers) == len(chosen) else f"wrong: {answer}"] += 1
            count += len(chosen)
        connection.close()
        return outcomes, count

    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(client, range(clients)))
    return sum((outcomes for outcomes, _ in results), Counter()), sum(count for _, count in results)


def read_metrics(server: ServerProcess) -> dict[str, float]:
    text = server.request("GET", "/metrics").body.decode()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
    }


def test_concurrent_clients_get_their_own_responses_and_share_batches(server, images) -> None:
    before = read_metrics(server)
    outcomes, count = send_concurrently(server, images, clients=16, rounds=12)
    assert outcomes == {"right": 16 * 12}
    after = read_metrics(server)
    increase = {name: after[name] - before.get(name, 0) for name in after}
    assert increase['fivefold_requests_total{status="200"}'] == 16 * 12
    assert increase["fivefold_request_seconds_count"] == 16 * 12
    assert increase["fivefold_batch_images_sum"] == count
    assert increase["fivefold_batch_images_count"] < count / 3
    assert increase['fivefold_batch_images_bucket{le="16.0"}'] == increase["fivefold_batch_images_count"]
    assert after["fivefold_images_under_way"] == 0


VALID_IMAGE = make_image(64, 64)
INVALID_REQUESTS = {
    "no image": (PNG, b"nothing", 422),
    "empty": (PNG, b"", 400),
    "too many pixels": (PNG, make_image(5000, 1000, "1"), 422),
    "too large": (PNG, bytes(600_000), 413),
    "a text": ("text/plain", b"x", 415),
    "deep": (JSON, b"[" * 100_000, 400),
    "no base64": (JSON, b'["eA==", "###"]', 400),
    "one bad of three": (JSON, encode_list([VALID_IMAGE, VALID_IMAGE, b"x"]), 422),
    "too many": (JSON, encode_list([b"x"] * 401), 413),
}


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_invalid_body_gives_a_clear_4xx(server, name) -> None:
    kind, body, status = INVALID_REQUESTS[name]
    answer = server.request("POST", "/invocations", body, content_type=kind)
    assert answer.status == status
    assert answer.json.get("image") == {"no base64": 1, "one bad of three": 2}.get(name)
    assert len(answer.json["error"]) > 10


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/invocations", {}, 405),
        ("GET", "/nothing", {}, 404),
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
    sent_bytes = 0

    def long_body() -> Iterator[bytes]:
        nonlocal sent_bytes
        for _ in range(20):
            sent_bytes += 100_000
            yield bytes(100_000)

    answer = server.request("POST", "/invocations", long_body(), content_type=PNG)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    with server.raw() as connection:  # the server responds before the client has sent the whole body
        connection.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999\r\n\r\n"
        )
        connection.sendall(bytes(1000))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_server_is_not_ready_before_the_model_is_loaded(server) -> None:
    ping, early = server.early
    assert (ping.status, ping.json) == (503, {"status": "loading"})
    assert (early.status, early.headers["retry-after"]) == (503, "1")
    assert "the model is still" in early.json["error"]
    assert server.request("GET", "/ping").json == {"status": "ready"}
    assert server.request("HEAD", "/ping").status == 200


@contextmanager
def half_sent_request(server: ServerProcess, file: bytes) -> Iterator[Callable[[], Answer]]:
    """Send half of a request body; yield a function that sends the rest and returns the response."""
    connection = server.connection()
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Type", PNG)
    connection.putheader("Content-Length", str(len(file)))
    connection.endheaders(file[: len(file) // 2])

    def finish() -> Answer:
        connection.send(file[len(file) // 2 :])
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())

    yield finish
    connection.close()


def send_until_refused(server: ServerProcess, file: bytes, stop: threading.Event) -> Counter[str]:
    """Send requests, each on a new connection, until one is refused; return the outcomes, also of the last one."""
    outcomes: Counter[str] = Counter()
    while not stop.is_set():
        try:
            outcomes[str(server.request("POST", "/invocations", file, content_type=PNG).status)] += 1
        except ConnectionRefusedError:
            outcomes["refused"] += 1
            return outcomes
        except (ConnectionResetError, http.client.RemoteDisconnected, BrokenPipeError):
            outcomes["reset"] += 1
            return outcomes
    return outcomes


def test_sigterm_under_load_answers_every_accepted_request(trained_run, student_images, tmp_path) -> None:
    """The server is started as SageMaker starts it."""
    expected = next(iter(student_images.values()))
    shutil.copytree(trained_run / "distill/model", tmp_path / "opt/model")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path / "opt"), "SAGEMAKER_BIND_TO_PORT": str(port)}
    with ServerProcess(tmp_path / "log", **environ) as server:
        assert server.ready().port == port
        stop = threading.Event()
        with (
            ThreadPoolExecutor(6) as pool,
            half_sent_request(server, expected[0]) as finish_first,
            half_sent_request(server, expected[0]) as finish_second,
        ):
            loads = [pool.submit(send_until_refused, server, expected[0], stop) for _ in range(6)]
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("stop[a-z]+: [0-9]+ requests ")
            late_answers = [finish_first(), finish_second()]
            outcomes = sum((load.result(TIMEOUT_S) for load in loads), Counter())
        assert server.process.wait(TIMEOUT_S) == 143
    assert [answer.status for answer in late_answers] == [200, 200]
    assert all(matches(answer.json, expected) for answer in late_answers)
    assert set(outcomes) <= {"200", "refused", "reset"}
    assert outcomes["200"] > 20
    assert f"answered {outcomes['200'] + len(late_answers)} requests" in server.read_log()
    assert not (tmp_path / "opt/output").exists()


@pytest.mark.parametrize(
    ("arguments", "environ", "code"),
    [
        (["model={run}", "serve.port={used_port}"], {}, 64),
        (["model={run}", "predict.device=gpu"], {}, 64),
        (["model={run}"], {"SAGEMAKER_BIND_TO_PORT": "80800"}, 64),
        (["serve.prot=1"], {}, 64),
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


def test_model_may_be_a_tarball_or_lie_in_a_bucket(trained_run, bucket, tmp_path) -> None:
    shutil.make_archive(str(tmp_path / "packed/model"), "gztar", trained_run / "distill/model")
    for path in (trained_run / "distill/model").iterdir():
        bucket.write(f"student/{path.name}", path.read_bytes())
    for number, model in enumerate((str(tmp_path / "packed"), f"s3://{bucket.name}/student")):
        (tmp_path / str(number)).mkdir()
        ensemble = serve.load_served_model(model, Settings(), tmp_path / str(number))
        assert (len(ensemble.models), len(ensemble.classes)) == (1, 4)


POD_BYTES = 4 * 1024**3
"""Memory limit of the shipped pod."""


@contextmanager
def repeat_concurrently(requests: Sequence[Callable[[], str]]) -> Iterator[Counter[str]]:
    """Repeat each request in its own thread until the block ends; yield the counted outcomes."""
    stop, outcomes = threading.Event(), Counter()

    def client(request: Callable[[], str]) -> None:
        while not stop.is_set():
            outcomes[request()] += 1

    with ThreadPoolExecutor(len(requests)) as pool:
        clients = [pool.submit(client, request) for request in requests]
        try:
            yield outcomes
        finally:
            stop.set()
            for future in clients:
                future.result(TIMEOUT_S)


@pytest.mark.slow
def test_hostile_clients_do_not_block_a_normal_client_or_exhaust_memory(trained_run, student_images, tmp_path) -> None:
    progressive = make_image(7000, 7000, "RGB", "JPEG", progressive=True)
    scans = progressive[:-2] + progressive[progressive.rindex(b"\xff\xc4") : -2] * 200_000
    hostile = {
        "bomb": make_image(4000, 4000, "P", transparency=b"\x80"),
        "larger bomb": make_image(7000, 7000, "1"),
        "bomb of many colours": make_image(4000, 4000, "RGBA", "WEBP", lossless=True),
        "halved": progressive,
        "scans": scans[:7_900_000],
    }
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nx"
    unread = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1500
    pixel_limit = f"serve.max_total_megapixels={POD_BYTES / 4 / PIXEL_BYTES / 1e6:.0f}"
    pod = {"OMP_NUM_THREADS": "2", "GLIBC_TUNABLES": GLIBC_TUNABLES}
    with (
        ServerProcess(
            tmp_path / "log", f"model={trained_run / 'distill'}", "serve.timeout_s=20", pixel_limit, **pod
        ) as server,
        ExitStack() as stack,
    ):
        server.ready()
        idle_memory = peak_memory(server)

        def post(name: str) -> str:
            try:
                return f"{name} {server.request('POST', '/invocations', hostile[name], content_type=PNG).status}"
            except ConnectionError:
                return f"{name} dropped"

        for _ in range(256):
            stack.enter_context(server.raw()).sendall(head)
        for _ in range(4):
            connection = stack.enter_context(server.raw())
            connection.setblocking(False)
            connection.send(unread)
        bombs = ["bomb", "larger bomb", "bomb of many colours", "halved"] * 2
        requests = [partial(post, name) for name in [*bombs, "scans"]]
        latencies = []
        with repeat_concurrently(requests) as outcomes:
            for expected in list(student_images.values())[:20]:
                started = time.monotonic()
                answer = server.request("POST", "/invocations", expected[0], content_type=PNG)
                latencies.append(time.monotonic() - started)
                assert matches(answer.json, expected), answer
                assert server.request("GET", "/ping").status == 200
                time.sleep(0.05)
        peak = peak_memory(server)
        print(
            f"{len(latencies)} requests, mean {np.mean(latencies):.3f} s, longest {max(latencies):.3f} s; {idle_memory / 1e6:.0f} -> {peak / 1e6:.0f} MB; {dict(outcomes)}"
        )
        assert server.stop() == 143
    assert np.mean(latencies) < 1, "on an otherwise idle machine each request takes less"
    assert max(latencies) < 5
    assert peak < POD_BYTES
    assert outcomes["scans 422"] > 0
    assert outcomes["larger bomb 422"] > 0
    assert outcomes["bomb 200"] > 0
    assert set(outcomes) <= {"scans 422", "larger bomb 422"} | {
        f"{name} {status}" for name in bombs for status in (200, 503)
    }


def peak_memory(server: ServerProcess) -> int:
    """Return the peak memory of the server in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
