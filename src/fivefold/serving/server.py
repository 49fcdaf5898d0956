"""The server: listen, load the model, answer requests until a signal, then finish the requests in flight."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fivefold.errors import SettingsError
from fivefold.log import log
from fivefold.serving.app import build_app
from fivefold.serving.service import Service
from fivefold.signals import raise_if_stopped

KEEP_ALIVE_S = 65
"""Maximum idle time of a connection: longer than the 60 s after which proxies close theirs."""
CLOSE_DELAY_S = 0.25
"""Delay between the last accept and closing idle connections, so that requests in transit still arrive."""
READ_TIMEOUT_S = 30.0
"""Time for a client to read a response; the kernel buffers some megabytes of it."""


class Connection(H11Protocol):
    """A connection that a client cannot hold open indefinitely, unlike uvicorn's.

    It is aborted if its client does not read a response within READ_TIMEOUT_S. If there are too many connections, the
    one that has been sending its request for longest is aborted.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)
        self.since = self.loop.time()
        if len(self.connections) >= self.limit_concurrency:
            min((other for other in self.connections if other.sending), key=lambda other: other.since).transport.abort()

    @property
    def sending(self) -> bool:
        """Whether the connection waits for its client to send."""
        cycle = self.cycle
        return not self.transport.is_closing() and (cycle is None or cycle.response_complete or cycle.more_body)

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.cancel()


class Server(uvicorn.Server):
    """uvicorn's server without signal handlers: the process handles the signals itself."""

    def capture_signals(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting; every accepted connection may still send its request and get its response."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(CLOSE_DELAY_S)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the server listens at; raise a SettingsError if that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=host == "::")
    except (OSError, OverflowError) as error:
        raise SettingsError(f"serve.host={host} serve.port={port}: cannot listen there: {error}") from error


def address(listener: socket.socket) -> str:
    """Return the URL of the socket, e.g. `http://0.0.0.0:8080`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(listener: socket.socket, service: Service, load: Callable[[], Any]) -> None:
    """Serve the model that `load` returns at `listener`, until a signal raises StoppedError; raise the errors of `load`.

    `/ping` is 503 while the model loads and after the signal. Requests in flight then have `serve.drain_s` seconds.
    """
    async with running(listener, service) as server:
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        await wait_for_stop(loading, server)
        service.open(loading.result())
        log.info("ready: %s answers POST /invocations, GET /ping and GET /metrics", address(listener))
        await wait_for_stop(server)


@asynccontextmanager
async def running(listener: socket.socket, service: Service) -> AsyncIterator[asyncio.Future[None]]:
    """Run the server during the block; then accept no more requests, and finish those in flight in `serve.drain_s` seconds."""
    config = uvicorn.Config(
        build_app(service), http=Connection, ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="warning",
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=service.limits.drain_s,
        limit_concurrency=service.limits.max_connections,
    )  # fmt: skip
    server = Server(config)
    task = asyncio.ensure_future(server.serve([listener]))
    try:
        yield task
    finally:
        service.draining, server.should_exit = True, True
        log.info("stopping: %d requests in flight", service.requests)
        try:
            await task
        finally:
            service.close()
        requests, images = map(service.metrics.read, ("fivefold_request_seconds_count", "fivefold_batch_images_sum"))
        log.info("answered %d requests, %d images", requests, images)


async def wait_for_stop(*unless: asyncio.Future) -> None:
    """Wait for a signal and raise StoppedError, or return when one of `unless` is done."""
    while not any(future.done() for future in unless):
        raise_if_stopped()
        await asyncio.sleep(0.05)
