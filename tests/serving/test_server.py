"""The server around a model that can be held, slowed and broken at will: real connections to a real server in a thread."""

import asyncio
import http.client
import io
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest
import torch  # noqa: F401  (the service imports it, which may take longer than a test waits)
from PIL import Image

from fivefold.data.images import decode
from fivefold.recipe import Serve
from fivefold.serving.batching import SICK_AFTER
from fivefold.serving.server import address, listen, running
from fivefold.serving.service import Service
from platform_runs import wait_until
from server_process import Answer, sent

SECONDS = 20.0
LIMITS = {"batch_size": 4, "max_wait_ms": 0.0, "queue": 100, "max_megapixels": 1.0, "timeout_s": SECONDS}
POISON = 13
HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


class Brightness:
    """A model of how bright an image is, which stops at `gate`, fails on POISON, and keeps what it was asked."""

    classes = ("dark", "bright")

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[int] = []

    def decode(self, content: bytes, name: str, max_pixels: float) -> np.ndarray:
        return decode(content, name, max_pixels)

    def prepare(self, pixels: np.ndarray) -> int:
        return int(pixels.max())

    def judge(self, images: Sequence[int]) -> np.ndarray:
        self.asked += images
        self.gate.wait(SECONDS)
        if POISON in images:
            raise RuntimeError("the device is gone")
        share = np.array(images, np.float32)[:, None] / 256
        return np.log(np.concatenate([1 - share, share], axis=1))


class Served:
    """A service with its model, and the port of its server."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        self.service, self.model = Service(Serve(**LIMITS | limits)), Brightness()
        self.listener = listen("127.0.0.1", 0)
        self.port = int(address(self.listener).rpartition(":")[2])

    def ask(self, *grey: int) -> Answer:
        """The answer to an image of one grey, on a connection of its own."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            return sent(connection, "POST", "/invocations", picture(*grey), content_type="image/png")

    def ping(self) -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            return sent(connection, "GET", "/ping")

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


def picture(grey: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (4, 4), grey).save(content, "PNG")
    return content.getvalue()


@contextmanager
def served(drain: float = SECONDS, **limits: float) -> Iterator[Served]:
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
    with served(queue=3) as server, ThreadPoolExecutor(3) as pool:
        server.model.gate.clear()
        waiting = [pool.submit(server.ask, grey) for grey in (1, 2, 3)]
        wait_until(lambda: server.service.images == 3)
        late = server.ask(4)
        server.model.gate.set()
        assert [each.result().status for each in waiting] == [200] * 3
        assert server.ask(5).status == 200
    assert (late.status, late.headers["retry-after"]) == (503, "1")
    assert late.json == {"error": "3 images are under way already: try again later"}
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
    assert late.json["error"] == "no answer within 0.3 s (serve.timeout_s): try again later"


def test_a_body_that_does_not_come_is_408() -> None:
    with served(timeout_s=0.3) as server, server.raw() as connection:
        connection.sendall(HEAD % 100 + b"half")
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            assert response.status == 408
            assert b"the body was not sent within 0.3 s (serve.timeout_s)" in response.read()
        assert server.service.images == 0


def test_an_error_of_the_model_is_500_and_said_by_ping_when_it_stays() -> None:
    with served() as server:
        answers = [server.ask(POISON) for _ in range(SICK_AFTER)]
        sick = server.ping()
        recovered = server.ask(1), server.ping()
    assert [answer.status for answer in answers] == [500] * SICK_AFTER
    assert answers[0].json == {"error": "an unexpected error of the server: RuntimeError"}
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
