"""A real server in a thread with real connections; its model can block, slow down and fail on demand."""

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401  (the service imports it, which may take longer than a test waits)

from fivefold.config.schema import Serve
from fivefold.data.image_io import decode
from fivefold.errors import StoppedError
from fivefold.serving import server as server_module
from fivefold.serving import service as service_module
from fivefold.serving.batching import MAX_FAILURES
from fivefold.serving.server import address, listen, running, serve
from fivefold.serving.service import Service
from fivefold.signals import defer_signals
from reference_run import wait_until
from server_process import POST, Answer, Client, make_image

TIMEOUT_S = 20.0
LIMITS = {"batch_size": 4, "max_wait_ms": 0.0, "max_megapixels": 1.0, "timeout_s": TIMEOUT_S, "drain_s": TIMEOUT_S}
FAILING_GREY = 13


@pytest.fixture(autouse=True)
def close_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CLOSE_DELAY_S", 0.0)


class BrightnessModel:
    """A model of how bright an image is. It blocks at `decode_gate` and `gate`, fails on FAILING_GREY and records its inputs."""

    classes = ("dark", "bright")

    def __init__(self) -> None:
        self.gate, self.decode_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.decode_gate.set()
        self.shapes: list[tuple[int, ...]] = []
        self.inputs: list[int] = []

    def decode(self, content: bytes, name: str, **bounds: Any) -> np.ndarray:
        self.decode_gate.wait(TIMEOUT_S)
        pixels = decode(content, name, **bounds)
        self.shapes.append(pixels.shape[:2])
        return pixels

    def prepare(self, pixels: np.ndarray) -> int:
        return int(pixels.max())

    def predict_prepared(self, images: Sequence[int]) -> np.ndarray:
        self.inputs += images
        self.gate.wait(TIMEOUT_S)
        if FAILING_GREY in images:
            raise RuntimeError("the device is gone")
        brightness = np.array(images, np.float32)[:, None] / 256
        return np.log(np.concatenate([1 - brightness, brightness], axis=1))


class RunningServer(Client):
    """A service, its model and the port of its server."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.service, self.model = Service(Serve(**LIMITS | limits)), BrightnessModel()
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]

    def post_image(self, grey: int, side: int = 4, image_format: str = "PNG") -> Answer:
        return self.post(make_image(side, side, "L", image_format, color=grey))


@contextmanager
def run_server(**limits: Any) -> Iterator[RunningServer]:
    """Run a server for the block, then stop it and wait until it has ended."""
    running_server, ready, stop = RunningServer(limits), threading.Event(), threading.Event()

    async def serve() -> None:
        with running_server.listener:
            async with running(running_server.listener, running_server.service):
                running_server.service.open(running_server.model)
                ready.set()
                await asyncio.to_thread(stop.wait)

    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(asyncio.run, serve())
        assert ready.wait(TIMEOUT_S), server.result()
        try:
            yield running_server
        finally:
            stop.set()
            server.result(TIMEOUT_S)


def test_full_queue_returns_503_and_accepted_requests_are_answered():
    with run_server(max_queue=3) as server, ThreadPoolExecutor(3) as pool:
        server.model.gate.clear()
        waiting = [pool.submit(server.post_image, grey) for grey in (1, 2, 3)]
        wait_until(lambda: server.service.images == 3)
        refused = server.post_image(4)
        server.model.gate.set()
        assert [future.result().status for future in waiting] == [200] * 3
        assert server.post_image(5).status == 200
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert 4 not in server.model.inputs


def test_disconnected_client_is_not_predicted_and_frees_its_place():
    with run_server() as server, ThreadPoolExecutor(1) as pool:
        server.model.gate.clear()
        first = pool.submit(server.post_image, 1)
        wait_until(lambda: server.model.inputs == [1])
        image = make_image(color=2)
        with server.raw() as connection:
            connection.sendall(POST % len(image) + image)
            wait_until(lambda: server.service.images == 2)
            time.sleep(0.1)  # so that the image is decoded and waits for the model
        wait_until(lambda: server.service.images == 1)
        server.model.gate.set()
        assert first.result().status == 200
        assert server.post_image(3).status == 200
    assert server.model.inputs == [1, 3]
    assert server.service.metrics.read("fivefold_requests_total", status="499") == 1


def test_slow_model_returns_503_and_an_incomplete_body_408():
    with run_server(timeout_s=0.3) as server:
        server.model.gate.clear()
        late = server.post_image(1)
        server.model.gate.set()
        assert server.post_image(2).json["confidence"] > 0.9
        with server.raw() as connection, http.client.HTTPResponse(connection) as response:
            connection.sendall(POST % 100 + b"half")
            response.begin()
            assert response.status == 408
        assert (server.service.images, server.service.bodies) == (0, 0)
        assert server.ping().status == 200
    assert late.status == 503


def test_body_below_the_minimum_rate_returns_408_and_a_faster_one_is_accepted(monkeypatch):
    monkeypatch.setattr(service_module, "GRACE_PERIOD_S", 0.2)
    monkeypatch.setattr(service_module, "MIN_BYTES_PER_S", 50.0)
    body = make_image(color=7)
    with run_server() as server:
        for pause, status in ((0.1, 408), (0.005, 200)):
            with server.raw() as connection, http.client.HTTPResponse(connection) as response:
                connection.sendall(POST % len(body))
                for byte in body[: 4 if status == 408 else None]:
                    connection.sendall(bytes([byte]))
                    time.sleep(pause)
                response.begin()
                assert response.status == status


def test_incomplete_bodies_take_no_places_in_the_queue():
    with run_server(max_queue=2) as server, ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(server.raw()).sendall(POST % 100 + b"h")
        wait_until(lambda: server.service.bodies == 50)
        assert [server.post_image(grey).status for grey in (1, 2, 3)] == [200] * 3
    assert server.service.bodies == 0


def test_request_that_exceeds_the_total_body_limit_returns_503():
    with run_server(max_total_body_mb=0.1) as server:
        with server.raw() as connection:
            connection.sendall(POST % 100_000 + bytes(99_990))
            wait_until(lambda: server.service.bodies == 99_990)
            refused = server.post_image(1)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        wait_until(lambda: server.service.bodies == 0)
        assert server.post_image(2).status == 200


def test_idle_connections_are_closed_for_new_requests():
    with run_server(max_connections=8) as server, ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        server.model.gate.clear()
        waiting = pool.submit(server.post_image, 1)
        wait_until(lambda: server.model.inputs == [1])
        idle = [stack.enter_context(server.raw()) for _ in range(40)]
        for connection in idle[-4:]:
            connection.sendall(POST % 100 + b"half")
        server.model.gate.set()
        assert waiting.result().status == 200
        assert [server.post_image(grey).status for grey in (2, 3)] == [200, 200]
        assert idle[0].recv(10) == b""


@pytest.mark.parametrize(
    ("connection_header", "reads_all"), [("keep-alive", True), ("keep-alive", False), ("close", False)]
)
def test_server_drops_clients_that_do_not_read_responses(monkeypatch, connection_header, reads_all):
    monkeypatch.setattr(server_module, "READ_TIMEOUT_S", 0.4)
    body = json.dumps([base64.b64encode(make_image(color=grey)).decode() for grey in range(20, 120)]).encode()
    headers = POST.replace(b"image/png", b"application/json\r\nConnection: " + connection_header.encode())
    with run_server() as server, socket.socket() as connection:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(TIMEOUT_S)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(headers % len(body) + body)
        time.sleep(0.0 if reads_all else 0.8)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            if reads_all:
                assert len(json.loads(response.read())) == 100
            else:
                with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                    response.read()
        assert server.post_image(1).status == 200


def test_ping_reports_a_stuck_decoder_and_the_server_still_stops():
    with run_server(drain_s=0.2, timeout_s=0.3) as server:
        server.model.decode_gate.clear()
        late = server.post_image(1)
        wait_until(lambda: server.ping().status == 503)
        failing_ping = server.ping()
        start = time.monotonic()
    assert time.monotonic() - start < TIMEOUT_S / 2
    server.model.decode_gate.set()
    assert (late.status, failing_ping.json) == (503, {"status": "failing"})


def test_only_configured_image_formats_are_decoded():
    with run_server() as server:
        formats = ("JPEG", "PNG", "WEBP", "GIF", "TIFF")
        assert [server.post_image(1, 4, name).status for name in formats] == [200, 200, 200, 422, 422]
    with run_server(formats=["GIF"]) as server:
        assert [server.post_image(1, 4, name).status for name in ("PNG", "GIF")] == [422, 200]


def test_only_jpegs_of_up_to_four_times_the_pixel_limit_are_halved():
    images = ((100, "PNG"), (101, "PNG"), (101, "JPEG"), (200, "JPEG"), (201, "JPEG"))
    with run_server(max_megapixels=0.01) as server:
        assert [server.post_image(9, *image).status for image in images] == [200, 422, 200, 200, 422]
    assert server.model.shapes == [(100, 100), (51, 51), (100, 100)]


def test_model_errors_return_500_and_ping_reports_repeated_ones():
    with run_server() as server:
        answers = [server.post_image(FAILING_GREY) for _ in range(MAX_FAILURES)]
        failing_ping = server.ping()
        recovered = server.post_image(1), server.ping()
    assert [answer.status for answer in answers] == [500] * MAX_FAILURES
    assert (failing_ping.status, failing_ping.json) == (503, {"status": "failing"})
    assert [answer.status for answer in recovered] == [200, 200]


def test_server_is_not_ready_while_it_loads_and_a_signal_then_ends_it():
    server = RunningServer({})
    early = []

    def load() -> None:
        early.extend((server.ping(), server.post_image(1)))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    with server.listener, defer_signals(), pytest.raises(StoppedError) as stopped:
        asyncio.run(serve(server.listener, server.service, load))
    assert (stopped.value.exit_code, server.service.model) == (143, None)
    assert [answer.status for answer in early] == [503, 503]
    assert (early[0].json, early[1].headers["retry-after"]) == ({"status": "loading"}, "1")


def test_server_listens_on_ipv6():
    with listen("::1", 0) as listener:
        assert address(listener).startswith("http://[::1]:")


@pytest.mark.parametrize(("drain", "gate_delay", "status"), [(TIMEOUT_S, 0.5, 200), (0.2, 0.8, 503)])
def test_requests_in_flight_at_shutdown_are_answered_within_the_drain_time(drain, gate_delay, status):
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        with run_server(drain_s=drain) as server:
            idle = stack.enter_context(server.raw())
            server.model.gate.clear()
            waiting = pool.submit(server.post_image, 1)
            wait_until(lambda: server.model.inputs == [1])
            threading.Timer(gate_delay, server.model.gate.set).start()
        answer = waiting.result()
        assert idle.recv(10) == b""
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    with pytest.raises(ConnectionRefusedError):
        server.post_image(1)
    assert time.monotonic() - start < TIMEOUT_S / 2
