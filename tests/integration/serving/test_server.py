"""The server around a model that can be held, slowed and broken at will: real connections to a real server in a thread."""

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401  (the service imports it, which may take longer than a test waits)
from PIL import Image

from fivefold.config.schema import Serve
from fivefold.data.image_io import decode
from fivefold.serving import server as server_module
from fivefold.serving import service as service_module
from fivefold.serving.batching import MAX_FAILURES
from fivefold.serving.server import address, listen, running
from fivefold.serving.service import Service
from reference_run import wait_until
from server_process import Answer, sent

SECONDS = 20.0
LIMITS = {"batch_size": 4, "max_wait_ms": 0.0, "max_queue": 100, "max_megapixels": 1.0, "timeout_s": SECONDS}
POISON = 13
HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


class Brightness:
    """A model of how bright an image is, which stops at `door` and at `gate`, fails on POISON, and keeps what it was asked."""

    classes = ("dark", "bright")

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.door = threading.Event()
        self.door.set()
        self.shapes: list[tuple[int, ...]] = []
        self.asked: list[int] = []

    def decode(self, content: bytes, name: str, **bounds: Any) -> np.ndarray:
        self.door.wait(SECONDS)
        pixels = decode(content, name, **bounds)
        self.shapes.append(pixels.shape[:2])
        return pixels

    def prepare(self, pixels: np.ndarray) -> int:
        return int(pixels.max())

    def predict_prepared(self, images: Sequence[int]) -> np.ndarray:
        self.asked += images
        self.gate.wait(SECONDS)
        if POISON in images:
            raise RuntimeError("the device is gone")
        share = np.array(images, np.float32)[:, None] / 256
        return np.log(np.concatenate([1 - share, share], axis=1))


class Served:
    """A service with its model, and the port of its server."""

    def __init__(self, limits: Mapping[str, Any]) -> None:
        self.service, self.model = Service(Serve(**LIMITS | limits)), Brightness()
        self.listener = listen("127.0.0.1", 0)
        self.port = int(address(self.listener).rpartition(":")[2])

    def ask(self, *grey: int) -> Answer:
        """The answer to an image of one grey, on a connection of its own."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            return sent(connection, "POST", "/invocations", picture(*grey), content_type="image/png")

    def post(self, body: bytes, kind: str = "application/octet-stream") -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            return sent(connection, "POST", "/invocations", body, content_type=kind)

    def ping(self) -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            return sent(connection, "GET", "/ping")

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


def picture(grey: int, side: int = 4, form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("L", (side, side), grey).save(content, form)
    return content.getvalue()


@contextmanager
def served(drain: float = SECONDS, **limits: Any) -> Iterator[Served]:
    """A running server, which is told to stop after the block and has ended when the context is left."""
    found, ready, stop = Served(limits), threading.Event(), threading.Event()

    async def whole() -> None:
        with found.listener:
            async with running(found.listener, found.service, drain):
                found.service.open(found.model)
                ready.set()
                await asyncio.to_thread(stop.wait)

    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(asyncio.run, whole())
        assert ready.wait(SECONDS), server.result()
        try:
            yield found
        finally:
            stop.set()
            server.result(SECONDS)


def test_a_full_queue_is_told_to_come_later_and_all_others_are_answered() -> None:
    with served(max_queue=3) as server, ThreadPoolExecutor(3) as pool:
        server.model.gate.clear()
        waiting = [pool.submit(server.ask, grey) for grey in (1, 2, 3)]
        wait_until(lambda: server.service.images == 3)
        late = server.ask(4)
        server.model.gate.set()
        assert [each.result().status for each in waiting] == [200] * 3
        assert server.ask(5).status == 200
    assert (late.status, late.headers["retry-after"]) == (503, "1")
    assert list(late.json) == ["error"]
    assert late.json["error"].startswith("3 images are ")
    assert 4 not in server.model.asked


def test_a_client_that_hangs_up_is_not_computed_and_its_place_is_free() -> None:
    with served() as server, ThreadPoolExecutor(1) as pool:
        server.model.gate.clear()
        first = pool.submit(server.ask, 1)
        wait_until(lambda: server.model.asked == [1])
        with server.raw() as connection:
            connection.sendall(HEAD % len(picture(2)) + picture(2))
            wait_until(lambda: server.service.images == 2)
            time.sleep(0.1)  # it is decoded and waits for the model
        wait_until(lambda: server.service.images == 1)
        server.model.gate.set()
        assert first.result().status == 200
        assert server.ask(3).status == 200
    assert server.model.asked == [1, 3]
    assert server.service.metrics.read("fivefold_requests_total", status="499") == 1


def test_a_model_that_takes_too_long_is_503_and_one_that_comes_back_answers() -> None:
    with served(timeout_s=0.3) as server:
        server.model.gate.clear()
        late = server.ask(1)
        server.model.gate.set()
        assert server.ask(2).json["confidence"] > 0.9
    assert late.status == 503
    assert "within 0.3 s (serve.timeout_s)" in late.json["error"]


def test_a_body_that_does_not_come_is_408() -> None:
    with served(timeout_s=0.3) as server, server.raw() as connection:
        connection.sendall(HEAD % 100 + b"half")
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            assert response.status == 408
            error = response.read()
            assert b"4 bytes" in error
            assert b"within 0.3 s (serve.timeout_s)" in error
        assert (server.service.images, server.service.bodies) == (0, 0)


def test_a_body_below_the_least_rate_is_408_and_a_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "GRACE_PERIOD_S", 0.4)
    monkeypatch.setattr(service_module, "MIN_BYTES_PER_S", 100.0)
    body = picture(7)
    with served() as server:
        for pause, status in ((0.2, 408), (0.005, 200)):
            with server.raw() as connection, http.client.HTTPResponse(connection) as response:
                connection.sendall(HEAD % len(body))
                for byte in body[: 9 if status == 408 else None]:
                    connection.sendall(bytes([byte]))
                    time.sleep(pause)
                response.begin()
                assert response.status == status


def test_bodies_that_do_not_come_hold_no_places() -> None:
    with served(max_queue=2) as server, ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(server.raw()).sendall(HEAD % 100 + b"h")
        wait_until(lambda: server.service.bodies == 50)
        assert [server.ask(grey).status for grey in (1, 2, 3)] == [200] * 3
    assert server.service.bodies == 0


def test_bodies_have_a_bound_together_and_a_request_too_many_comes_later() -> None:
    with served(max_total_body_mb=0.1) as server:
        with server.raw() as connection:
            connection.sendall(HEAD % 100_000 + bytes(99_990))
            wait_until(lambda: server.service.bodies == 99_990)
            late = server.ask(1)
        assert (late.status, late.headers["retry-after"]) == (503, "1")
        wait_until(lambda: server.service.bodies == 0)
        assert server.ask(2).status == 200


def test_idle_connections_make_way_for_those_that_ask() -> None:
    with served(max_connections=8) as server, ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        server.model.gate.clear()
        waiting = pool.submit(server.ask, 1)
        wait_until(lambda: server.model.asked == [1])
        idle = [stack.enter_context(server.raw()) for _ in range(40)]
        for connection in idle[-4:]:
            connection.sendall(HEAD % 100 + b"half")
        server.model.gate.set()
        assert waiting.result().status == 200
        assert [server.ask(grey).status for grey in (2, 3)] == [200, 200]
        assert idle[0].recv(10) == b""


@pytest.mark.parametrize("then", ["close", "keep-alive"])
@pytest.mark.parametrize(("pause", "whole"), [(0.0, True), (2.0, False)])
def test_who_does_not_read_its_answer_is_dropped(monkeypatch, then: str, pause: float, whole: bool) -> None:
    monkeypatch.setattr(server_module, "READ_TIMEOUT_S", 0.5)
    body = json.dumps([base64.b64encode(picture(grey)).decode() for grey in range(20, 120)]).encode()
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: %s\r\nContent-Length: %d\r\n\r\n"
    with served() as server, socket.socket() as connection:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(SECONDS)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head % (then.encode(), len(body)) + body)
        time.sleep(pause)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            if whole:
                assert len(json.loads(response.read())) == 100
            else:
                with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                    response.read()
        assert server.ask(1).status == 200


def test_a_decoder_that_hangs_is_said_by_ping_and_the_server_ends() -> None:
    with served(drain=0.2, timeout_s=0.3) as server:
        server.model.door.clear()
        late = server.ask(1)
        wait_until(lambda: server.ping().status == 503)
        sick = server.ping()
        begun = time.monotonic()
    assert time.monotonic() - begun < SECONDS / 2
    server.model.door.set()
    assert (late.status, sick.json) == (503, {"status": "failing"})


def test_only_the_formats_that_are_allowed_are_decoded() -> None:
    with served() as server:
        assert [server.post(picture(1, form=form)).status for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")] == [
            200,
            200,
            200,
            422,
            422,
        ]
    with served(formats=["GIF"]) as server:
        assert [server.post(picture(1, form=form)).status for form in ("PNG", "GIF")] == [422, 200]


def test_a_jpeg_of_up_to_four_times_the_pixels_is_halved_and_no_other_image() -> None:
    with served(max_megapixels=0.01) as server:
        found = [
            server.post(picture(9, side, form)).status
            for side, form in ((100, "PNG"), (101, "PNG"), (101, "JPEG"), (200, "JPEG"), (201, "JPEG"))
        ]
        assert server.model.shapes == [(100, 100), (51, 51), (100, 100)]
    assert found == [200, 422, 200, 200, 422]


def test_an_error_of_the_model_is_500_and_said_by_ping_when_it_stays() -> None:
    with served() as server:
        answers = [server.ask(POISON) for _ in range(MAX_FAILURES)]
        sick = server.ping()
        recovered = server.ask(1), server.ping()
    assert [answer.status for answer in answers] == [500] * MAX_FAILURES
    assert list(answers[0].json) == ["error"]
    assert answers[0].json["error"].endswith(": RuntimeError")
    assert (sick.status, sick.json) == (503, {"status": "failing"})
    assert [answer.status for answer in recovered] == [200, 200]


def test_an_address_of_ipv6() -> None:
    with listen("::1", 0) as listener:
        assert address(listener).startswith("http://[::1]:")


@pytest.mark.parametrize(("drain", "opens", "status"), [(SECONDS, 0.6, 200), (0.5, 1.2, 503)])
def test_what_is_under_way_at_the_end_is_answered_within_its_time(drain: float, opens: float, status: int) -> None:
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        with served(drain) as server:
            idle = stack.enter_context(server.raw())
            server.model.gate.clear()
            waiting = pool.submit(server.ask, 1)
            wait_until(lambda: server.model.asked == [1])
            threading.Timer(opens, server.model.gate.set).start()
        answer = waiting.result()
        assert idle.recv(10) == b""
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    with pytest.raises(ConnectionRefusedError):
        server.ask(1)
    assert time.monotonic() - begun < SECONDS / 2
