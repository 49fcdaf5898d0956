"""A served model as its clients see it: a real process on this machine, real connections, answers held against the API's."""

import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import tarfile
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
from fivefold.serving.workers import PIXEL_BYTES
from fivefold.system import GLIBC_TUNABLES
from server_process import SECONDS, Answer, ServerProcess, sent
from toy_data import copy_run, run_stage

CLOSE = 1e-5
"""How far an image's probability may be off in other company, by float32's rounding."""
PNG = "image/png"
LIST = "application/json"
Pictures = Mapping[str, tuple[bytes, str, float]]
"""Image files by name, each with the class and the confidence that the API gives it."""


@pytest.fixture(scope="module")
def trained(product_run, tmp_path_factory) -> Path:
    """The product run with an ensemble of no temperature, which leaves confidences apart."""
    root = copy_run(product_run, tmp_path_factory.mktemp("served") / "run", "ensemble")
    assert run_stage(root, "ensemble", "ensemble", "ensemble.calibrate_on=none", MODEL=root) == 0
    return root


def known(model: Path, images: Path) -> Pictures:
    """Images whose confidences are far enough apart to tell them from each other, with what the API says of them."""
    paths = sorted(images.rglob("*.png"))
    found: dict[str, tuple[bytes, str, float]] = {}
    for path, told in zip(paths, ImageClassificationAPI(model, device="cpu").predict(paths), strict=True):
        confidence = told["confidence"]
        if all(abs(confidence - other) > 20 * CLOSE for _, _, other in found.values()):
            found[str(path)] = (path.read_bytes(), told["predicted_class"], confidence)
    assert len(found) > 60
    return found


@pytest.fixture(scope="module")
def pictures(trained, products) -> Pictures:
    return known(trained, products.root)


@pytest.fixture(scope="module")
def student(trained, products) -> Pictures:
    return known(trained / "distill", products.root)


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory) -> Iterator[ServerProcess]:
    """The ensemble, served; `early` is what it answered while it was loading."""
    limits = ["serve.max_body_mb=0.5", "serve.max_megapixels=4", "serve.max_queue=400", "serve.batch_size=16"]
    with ServerProcess(tmp_path_factory.mktemp("served") / "log", f"model={trained}", *limits) as found:
        found.early = [found.ask("GET", "/ping"), found.ask("POST", "/invocations", b"x", content_type=PNG)]
        yield found.ready()


def encoded(files: Sequence[bytes]) -> bytes:
    return json.dumps([base64.b64encode(file).decode() for file in files]).encode()


def agrees(told: Mapping[str, Any], expected: tuple[bytes, str, float]) -> bool:
    return told["predicted_class"] == expected[1] and abs(told["confidence"] - expected[2]) < CLOSE


def a_picture(width: int = 8, height: int = 8, mode: str = "RGB", form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, form, **options)
    return content.getvalue()


def test_an_image_is_answered_as_the_api_answers_it(server, pictures) -> None:
    for expected in list(pictures.values())[:5]:
        answer = server.ask("POST", "/invocations", expected[0], content_type=PNG)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        told = answer.json
        assert list(told) == ["predicted_class", "confidence", "probabilities"]
        assert agrees(told, expected)
        assert next(iter(told["probabilities"].items())) == (told["predicted_class"], told["confidence"])
        assert sorted(told["probabilities"].values(), reverse=True) == list(told["probabilities"].values())
        assert set(told["probabilities"]) == {"full_shot", "care_label", "neck_label", "detail_shot"}
        assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "kind", ["image/jpeg", "image/webp", "application/x-image", "application/octet-stream", "Image/PNG; q=1", ""]
)
def test_every_type_of_an_image_is_taken(server, pictures, kind) -> None:
    expected = next(iter(pictures.values()))
    assert agrees(server.ask("POST", "/invocations", expected[0], content_type=kind).json, expected)


def test_a_list_is_answered_in_its_order(server, pictures) -> None:
    names = list(pictures)[:40]
    names = [*names, *reversed(names)]
    answer = server.ask("POST", "/invocations", encoded([pictures[name][0] for name in names]), content_type=LIST)
    assert answer.status == 200
    assert len(answer.json) == 80
    assert [name for told, name in zip(answer.json, names, strict=True) if not agrees(told, pictures[name])] == []
    one = server.ask("POST", "/invocations", encoded([pictures[names[0]][0]]), content_type=LIST).json
    alone = server.ask("POST", "/invocations", pictures[names[0]][0], content_type=PNG).json["probabilities"]
    assert {name: pytest.approx(p, abs=CLOSE) for name, p in alone.items()} == one[0]["probabilities"]
    assert server.ask("POST", "/invocations", b" [] ", content_type=LIST).json == []


def test_an_answer_is_as_long_and_in_the_form_that_is_asked_for(server, pictures) -> None:
    files = [file for file, _, _ in list(pictures.values())[:2]]
    short = server.ask("POST", "/invocations?top=2", files[0], content_type=PNG).json
    assert len(short["probabilities"]) == 2
    assert len(server.ask("POST", "/invocations?top=99", files[0], content_type=PNG).json["probabilities"]) == 4
    table = server.ask("POST", "/invocations", encoded(files), content_type=LIST, accept="text/csv")
    assert table.headers["content-type"].startswith("text/csv")
    told = server.ask("POST", "/invocations", encoded(files), content_type=LIST, accept="text/*;q=0.5, */*").body
    assert told == table.body
    lines = table.body.decode().splitlines()
    assert lines[0] == "predicted_class,confidence"
    name, confidence = lines[1].split(",")
    assert (name, float(confidence)) == (short["predicted_class"], pytest.approx(short["confidence"], rel=1e-5))
    assert len(lines) == 3


def asked_all_at_once(server: ServerProcess, pictures: Pictures, clients: int, rounds: int) -> tuple[Counter[str], int]:
    """What became of many clients' requests, single images and lists by turns, each on one connection; and the images."""
    names = list(pictures)

    def client(number: int) -> tuple[Counter[str], int]:
        found: Counter[str] = Counter()
        connection, images, random = server.connection(), 0, np.random.default_rng(number)
        for turn in range(rounds):
            chosen = [names[at] for at in random.integers(0, len(names), 1 if turn % 3 else 7)]
            files, many = [pictures[name][0] for name in chosen], turn % 3 == 0
            body, kind = (encoded(files), LIST) if many else (files[0], PNG)
            answer = sent(connection, "POST", "/invocations", body, content_type=kind)
            told = (answer.json if many else [answer.json]) if answer.status == 200 else []
            right = [agrees(each, pictures[name]) for each, name in zip(told, chosen, strict=False)]
            found["right" if all(right) and len(told) == len(chosen) else f"wrong: {answer}"] += 1
            images += len(chosen)
        connection.close()
        return found, images

    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(client, range(clients)))
    return sum((found for found, _ in results), Counter()), sum(images for _, images in results)


def metrics(server: ServerProcess) -> dict[str, float]:
    text = server.ask("GET", "/metrics").body.decode()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
    }


def test_concurrent_clients_get_their_own_answers_and_share_batches(server, pictures) -> None:
    before = metrics(server)
    found, images = asked_all_at_once(server, pictures, clients=16, rounds=12)
    assert found == {"right": 16 * 12}
    after = metrics(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['fivefold_requests_total{status="200"}'] == 16 * 12
    assert grown["fivefold_request_seconds_count"] == 16 * 12
    assert grown["fivefold_batch_images_sum"] == images
    assert grown["fivefold_batch_images_count"] < images / 3
    assert grown['fivefold_batch_images_bucket{le="16.0"}'] == grown["fivefold_batch_images_count"]
    assert after["fivefold_images_under_way"] == 0


WHOLE = a_picture(64, 64)
GARBAGE = {
    "no image": (PNG, b"nothing", 422, "the image cannot be decoded: it is no image of a known format"),
    "cut off": (PNG, WHOLE[:60], 422, "the image cannot be decoded: "),
    "empty": (PNG, b"", 400, "the body is empty"),
    "too many pixels": (PNG, a_picture(5000, 1000, "1"), 422, "it has 5000 × 1000 pixels, more than the 4 million allowed"),
    "a program": (PNG, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "no image of a known format"),
    "too large": (PNG, bytes(600_000), 413, "larger than 0.5 MB (serve.max_body_mb)"),
    "a text": ("text/plain", b"x", 415, "'text/plain'"),
    "half JSON": (LIST, b'["', 400, "the body is not JSON: "),
    "deep": (LIST, b"[" * 100_000, 400, "the body is not JSON: it is nested too deeply"),
    "an object": (LIST, b'{"instances": []}', 400, "the body is JSON of type dict: send a list"),
    "no base64": (LIST, b'["eA==", "###"]', 400, "image 1 of the list is not base64"),
    "one bad of three": (LIST, encoded([WHOLE, WHOLE, b"x"]), 422, "image 2 of the list cannot be decoded: it is no image"),
    "too many": (LIST, encoded([b"x"] * 401), 413, "at most 400 (serve.max_queue)"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "status", "message"), GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_clear_4xx(server, kind, body, status, message) -> None:
    answer = server.ask("POST", "/invocations", body, content_type=kind)
    assert answer.status == status
    assert message in answer.json["error"]
    if "image 1" in message or "image 2" in message:
        assert f"image {answer.json['image']}" in message
    assert server.ask("GET", "/ping").status == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "message"),
    [
        ("GET", "/invocations", {}, 405, "GET /invocations: Method Not Allowed; "),
        ("GET", "/nothing", {}, 404, "GET /nothing: Not Found; "),
        ("POST", "/invocations?top=0", {"content_type": PNG}, 400, "top='0': "),
        ("POST", "/invocations?tpo=2", {"content_type": PNG}, 400, "unknown parameter 'tpo'; "),
        ("POST", "/invocations", {"content_type": PNG, "content_encoding": "gzip"}, 415, "(Content-Encoding: gzip)"),
        ("POST", "/invocations", {"content_type": PNG, "accept": "image/png"}, 406, "application/json or"),
    ],
)
def test_a_wrong_question_is_a_clear_4xx(server, method, path, headers, status, message) -> None:
    answer = server.ask(method, path, WHOLE, **headers)
    assert (answer.status, message in answer.json["error"]) == (status, True), answer


def test_a_body_over_the_limit_is_refused_while_it_comes(server) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(20):
            taken += 100_000
            yield bytes(100_000)

    answer = server.ask("POST", "/invocations", endless(), content_type=PNG)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    with server.raw() as connection:  # a client that never ends its body is told before it does
        connection.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999\r\n\r\n"
        )
        connection.sendall(bytes(1000))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_clients_that_hang_up_or_stall_hinder_nobody(server, pictures) -> None:
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    file = next(iter(pictures.values()))[0]
    stalled = [server.raw() for _ in range(20)]
    for number, connection in enumerate(stalled):
        connection.sendall((head % len(file) + file[: len(file) // 2]) if number % 2 else head[:30])
    for _ in range(20):
        with server.raw() as connection:
            connection.sendall(head % len(file) + file)
    found, _ = asked_all_at_once(server, pictures, clients=4, rounds=6)
    assert found == {"right": 24}
    for connection in stalled[1::2]:  # the slow ones are answered too
        connection.sendall(file[len(file) // 2 :])
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
    for connection in stalled:
        connection.close()
    assert metrics(server)["fivefold_images_under_way"] == 0


def test_it_is_not_ready_before_its_model_is_loaded(server) -> None:
    ping, early = server.early
    assert (ping.status, ping.json) == (503, {"status": "loading"})
    assert (early.status, early.headers["retry-after"]) == (503, "1")
    assert "the model is still" in early.json["error"]
    assert server.ask("GET", "/ping").json == {"status": "ready"}
    assert server.ask("HEAD", "/ping").status == 200


@contextmanager
def half_sent(server: ServerProcess, file: bytes) -> Iterator[Callable[[], Answer]]:
    """A request of which half the body is sent; the rest goes, and its answer comes, when the function is called."""
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


def hammered(server: ServerProcess, file: bytes, stop: threading.Event) -> Counter[str]:
    """Requests on ever new connections until one is refused: how many were answered, and how the last one ended."""
    found: Counter[str] = Counter()
    while not stop.is_set():
        try:
            found[str(server.ask("POST", "/invocations", file, content_type=PNG).status)] += 1
        except ConnectionRefusedError:
            found["refused"] += 1
            return found
        except (ConnectionResetError, http.client.RemoteDisconnected, BrokenPipeError):
            found["reset"] += 1
            return found
    return found


def test_sigterm_under_load_answers_every_request_that_was_accepted(trained, student, tmp_path) -> None:
    expected = next(iter(student.values()))
    with ServerProcess(tmp_path / "log", f"model={trained / 'distill'}") as server:
        server.ready()
        stop = threading.Event()
        with (
            ThreadPoolExecutor(6) as pool,
            half_sent(server, expected[0]) as one,
            half_sent(server, expected[0]) as two,
        ):
            loads = [pool.submit(hammered, server, expected[0], stop) for _ in range(6)]
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            late = [server.wait_for("stop[a-z]+: [0-9]+ requests ") and finish() for finish in (one, two)]
            found = sum((load.result(SECONDS) for load in loads), Counter())
        assert server.process.wait(SECONDS) == 143
    assert [answer.status for answer in late] == [200, 200]
    assert all(agrees(answer.json, expected) for answer in late)
    assert set(found) <= {"200", "refused", "reset"}
    assert found["200"] > 20
    assert f"answered {found['200'] + len(late)} requests" in server.told()


def test_a_server_that_cannot_start_says_why(trained, tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = refused(tmp_path, f"model={trained}", f"serve.port={port}")
        assert code == 64
        assert f"serve.host=127.0.0.1 serve.port={port}: " in message
        assert "Address already in use" in message
    assert refused(tmp_path, f"model={tmp_path / 'absent'}")[0] == 66
    assert refused(tmp_path, "model=", SAGEMAKER_BASE_DIR=str(tmp_path))[0] == 66
    assert refused(tmp_path, "serve.prot=1") == (64, "unknown key 'serve.prot' in argument; did you mean 'serve.port'?; --help lists the keys")  # fmt: skip
    code, message = refused(tmp_path, f"model={trained}", SAGEMAKER_BIND_TO_PORT="80800")
    assert (code, message) == (64, "serve.port=80800 (SAGEMAKER_BIND_TO_PORT): at most 65535 is needed")


def refused(folder: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    """The exit code of a server that does not start, and its last words."""
    with ServerProcess(folder / "log", *arguments, **environ) as server:
        code = server.process.wait(SECONDS)
    return code, server.told().splitlines()[-1].partition("ERROR   ")[2]


@pytest.mark.slow
def test_as_sagemaker_hosts_it(trained, products, tmp_path) -> None:
    pictures = known(trained / "fold-1", products.root)
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(trained / "fold-1/model", ".")
    (tmp_path / "opt/model").mkdir(parents=True)
    shutil.unpack_archive(tmp_path / "model.tar.gz", tmp_path / "opt/model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"SAGEMAKER_BASE_DIR": str(tmp_path / "opt"), "SAGEMAKER_BIND_TO_PORT": port}
    with ServerProcess(tmp_path / "log", **told) as server:
        assert server.ready().port == int(port)
        found, _ = asked_all_at_once(server, pictures, clients=4, rounds=6)
        assert found == {"right": 24}
        assert server.end(signal.SIGINT) == 130
    assert not (tmp_path / "opt/output").exists()


@pytest.mark.slow
def test_a_tarball_and_a_bucket_are_models_too(trained, student, bucket, tmp_path) -> None:
    shutil.make_archive(str(tmp_path / "packed/model"), "gztar", trained / "distill/model")
    for path in (trained / "distill/model").iterdir():
        bucket.write(f"student/{path.name}", path.read_bytes())
    for model in (str(tmp_path / "packed"), f"s3://{bucket.name}/student"):
        with ServerProcess(tmp_path / "log", f"model={model}", **bucket.environ()) as server:
            found, _ = asked_all_at_once(server.ready(), student, clients=4, rounds=6)
            assert found == {"right": 24}, model
            assert server.end() == 143


@pytest.mark.slow
def test_a_run_means_its_student(trained, student, tmp_path) -> None:
    with ServerProcess(tmp_path / "log", f"run={trained.name}", RUNS=str(trained.parent)) as server:
        found, _ = asked_all_at_once(server.ready(), student, clients=2, rounds=3)
    assert found == {"right": 6}


@pytest.mark.slow
def test_a_signal_while_it_loads_ends_it(trained, tmp_path) -> None:
    with ServerProcess(tmp_path / "log", f"model={trained}") as server:
        assert server.port
        assert server.end() == 143
        assert "ready: " not in server.told()


@pytest.mark.slow
def test_what_is_no_model_is_told_as_any_stage_tells_it(trained, tmp_path) -> None:
    shutil.copytree(trained / "distill/model", tmp_path / "half")
    (tmp_path / "half/stage.json").unlink()
    code, message = refused(tmp_path, f"model={tmp_path / 'half'}")
    assert (code, "its training did not finish" in message) == (65, True)
    assert refused(tmp_path, f"model={trained}", "predict.device=gpu")[0] == 64


POD = 4 * 1024**3
"""Bytes of memory that the shipped pod may take."""


@contextmanager
def again_and_again(works: Sequence[Callable[[], str]]) -> Iterator[Counter[str]]:
    """What many clients are told that each do the same until the block ends, beside it."""
    stop, found = threading.Event(), Counter()

    def client(work: Callable[[], str]) -> None:
        while not stop.is_set():
            found[work()] += 1

    with ThreadPoolExecutor(len(works)) as pool:
        clients = [pool.submit(client, work) for work in works]
        try:
            yield found
        finally:
            stop.set()
            for each in clients:
                each.result(SECONDS)


@pytest.mark.slow
def test_hostile_clients_take_neither_the_answers_of_an_honest_one_nor_the_memory(trained, student, tmp_path) -> None:
    flat = a_picture(7000, 7000, "RGB", "JPEG", progressive=True)
    scans = flat[:-2] + flat[flat.rindex(b"\xff\xc4") : -2] * 200_000
    hostile = {
        "bomb": a_picture(4000, 4000, "P", transparency=b"\x80"),
        "larger bomb": a_picture(7000, 7000, "1"),
        "bomb of many colours": a_picture(4000, 4000, "RGBA", "WEBP", lossless=True),
        "halved": flat,
        "scans": scans[:7_900_000],
    }
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nx"
    unread = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1500
    room = f"serve.max_total_megapixels={POD / 4 / PIXEL_BYTES / 1e6:.0f}"
    pod = {"OMP_NUM_THREADS": "2", "GLIBC_TUNABLES": GLIBC_TUNABLES}
    with (
        ServerProcess(tmp_path / "log", f"model={trained / 'distill'}", "serve.timeout_s=20", room, **pod) as server,
        ExitStack() as stack,
    ):
        server.ready()
        quiet = peak_memory(server)

        def post(name: str) -> str:
            try:
                return f"{name} {server.ask('POST', '/invocations', hostile[name], content_type=PNG).status}"
            except ConnectionError:
                return f"{name} dropped"

        for _ in range(256):
            stack.enter_context(server.raw()).sendall(head)
        for _ in range(4):
            connection = stack.enter_context(server.raw())
            connection.setblocking(False)
            connection.send(unread)
        bombs = ["bomb", "larger bomb", "bomb of many colours", "halved"] * 2
        works = [partial(post, name) for name in [*bombs, "scans"]]
        waits = []
        with again_and_again(works) as told:
            for expected in list(student.values())[:60]:
                begun = time.monotonic()
                answer = server.ask("POST", "/invocations", expected[0], content_type=PNG)
                waits.append(time.monotonic() - begun)
                assert agrees(answer.json, expected), answer
                assert server.ask("GET", "/ping").status == 200
                time.sleep(0.05)
        taken = peak_memory(server)
        print(
            f"{len(waits)} requests, mean {np.mean(waits):.3f} s, longest {max(waits):.3f} s; {quiet / 1e6:.0f} -> {taken / 1e6:.0f} MB; {dict(told)}"
        )
        assert server.end() == 143
    assert np.mean(waits) < 1, "and each of them on a machine that does nothing else"
    assert max(waits) < 5
    assert taken < POD
    assert told["scans 422"] > 0
    assert told["larger bomb 422"] > 0
    assert told["bomb 200"] > 0
    assert set(told) <= {"scans 422", "larger bomb 422"} | {
        f"{name} {status}" for name in bombs for status in (200, 503)
    }


def peak_memory(server: ServerProcess) -> int:
    """The most bytes that the server has held so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
