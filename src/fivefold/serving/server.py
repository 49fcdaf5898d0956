"""The server's process: it listens, loads the model, answers until it is told to stop, and then answers what is under way."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fivefold.errors import SettingsError
from fivefold.serving.app import build_app
from fivefold.serving.service import Service
from fivefold.stopping import poll

log = logging.getLogger("fivefold")

KEEP_ALIVE = 65
"""Seconds that a connection may be idle: longer than the 60 after which proxies give theirs up."""
BACKLOG = 2048
LAP = 0.25
"""Seconds between the end of accepting and the closing of idle connections: what is on its way then is still taken in."""
UNREAD = 30.0
"""Seconds that a client has to read an answer, of which the kernel holds some megabytes for it."""
WATCH = 0.05
"""Seconds between two looks for a signal."""


class Connection(H11Protocol):
    """A connection that a client cannot keep for nothing, which uvicorn lets it.

    It is aborted when its client has not read an answer within UNREAD, and where there are too many and no other one has
    been sending its request for longer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)
        self.since = self.loop.time()
        if len(self.connections) >= self.limit_concurrency:
            min((each for each in self.connections if each.sending), key=lambda each: each.since).transport.abort()

    @property
    def sending(self) -> bool:
        """Whether its client is the one to go on."""
        cycle = self.cycle
        return not self.transport.is_closing() and (cycle is None or cycle.response_complete or cycle.more_body)

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, of which the process's own handlers have the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more, then lets every connection that was accepted send its request and have its answer."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAP)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """The socket that the server listens at; a SettingsError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]
        raise SettingsError(
            f"serve.host={host} serve.port={port}: cannot listen there: {reason}; give another serve.port, or port 0 for a free one"
        ) from error


def address(listener: socket.socket) -> str:
    """`http://0.0.0.0:8080`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(listener: socket.socket, service: Service, load: Callable[[], Any], drain: float) -> None:
    """Answers at `listener` by the model that `load` gives; ends by a StoppedError, or by what `load` raises.

    While it loads, and from the signal on, `/ping` is 503. Requests under way then have `drain` seconds.
    """
    asyncio.run(_serve(listener, service, load, drain))


async def _serve(listener: socket.socket, service: Service, load: Callable[[], Any], drain: float) -> None:
    async with running(listener, service, drain) as server:
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        await told_to_stop(loading, server)
        service.open(loading.result())
        log.info("ready: %s answers POST /invocations, GET /ping and GET /metrics", address(listener))
        await told_to_stop(server)


@asynccontextmanager
async def running(listener: socket.socket, service: Service, drain: float) -> AsyncIterator[asyncio.Future[None]]:
    """Runs the server beside the block; after it no request is accepted, and those under way are answered.

    These have `drain` seconds after the block.
    """
    config = uvicorn.Config(
        build_app(service), http=Connection, ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="warning", access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=drain,
        limit_concurrency=service.limits.connections,
    )  # fmt: skip
    server = Server(config)
    task = asyncio.ensure_future(server.serve([listener]))
    try:
        yield task
    finally:
        service.draining, server.should_exit = True, True
        if service.model is not None:
            log.info("stops: %d requests are under way", service.requests)
        try:
            await task
        finally:
            service.close()
        if service.model is not None:
            requests, images = map(
                service.metrics.read, ("fivefold_request_seconds_count", "fivefold_batch_images_sum")
            )
            log.info("answered %d requests, %d images", requests, images)


async def told_to_stop(*unless: asyncio.Future) -> None:
    """Waits for a signal, and then raises StoppedError; or returns when one of `unless` is done."""
    while not any(future.done() for future in unless):
        poll()
        await asyncio.sleep(WATCH)
