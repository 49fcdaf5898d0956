"""The paths of the server: `POST /invocations`, `GET /ping`, `GET /metrics`."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fivefold.log import log
from fivefold.serving.protocol import RefusedError, is_list, negotiate_type, parse_top, reject_compressed, too_large
from fivefold.serving.service import Service


class EarlyResponse(JSONResponse):
    """The response to a request whose body was not read to its end.

    It is sent at once, then the remaining body is discarded for two seconds: closing a connection with unread bytes
    resets it, and the client would lose the response.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def build_app(service: Service) -> Starlette:
    """Build the application; `service` answers its requests."""

    async def ping(_: Request) -> Response:
        state = service.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def invocations(request: Request) -> Response:
        start = time.perf_counter()
        response = await handle(service, request)
        service.metrics.count_request(response.status_code, time.perf_counter() - start)
        if service.draining:
            response.headers["Connection"] = "close"
        return response

    routes = [Route("/ping", ping), Route("/metrics", metrics), Route("/invocations", invocations, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: handle_http_error})


async def handle(service: Service, request: Request) -> Response:
    """Return the response to one request, including errors."""
    read = False
    try:
        reject_compressed(request.headers.get("content-encoding", ""))
        many = is_list(request.headers.get("content-type", ""))
        content_type = negotiate_type(request.headers.get("accept", ""))
        if int(request.headers.get("content-length", "0")) > service.max_body:  # h11 has checked that it is a number
            raise too_large(service.max_body)
        service.check_capacity()
        top = parse_top(request.query_params, len(service.model.classes))
        async with service.receive_body(request.stream()) as body, asyncio.timeout(service.limits.timeout_s):
            read = True
            files = await service.read(body, many)
            with service.admission(len(files)):
                log_probs = await cancel_on_disconnect(request, service.predict(files, many))
                return Response(await service.render(content_type, log_probs, top, many), media_type=content_type)
    except RefusedError as error:
        refused = error
    except TimeoutError:
        limit = service.limits.timeout_s
        refused = RefusedError(503, f"no response within {limit:g} s (serve.timeout_s): try again later")
    except ClientDisconnect:
        return Response(status_code=499)  # only for the counters: it is never sent
    except asyncio.CancelledError:
        if not service.draining:
            raise
        read, refused = True, RefusedError(503, "the server is stopping: try another one")
    except Exception as error:
        log.exception("a request failed")
        refused = RefusedError(500, f"internal server error: {type(error).__name__}")
    headers = {"Retry-After": "1"} if refused.status == 503 else {}
    return (JSONResponse if read else EarlyResponse)(refused.content, refused.status, headers)


async def cancel_on_disconnect(request: Request, work: Coroutine[None, None, Any]) -> Any:
    """Return the result of the work; if the client disconnects first, cancel the work and raise a ClientDisconnect."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def handle_http_error(request: Request, error: HTTPException) -> Response:
    """Return the response to a request with an unknown path or method."""
    message = f"{request.method} {request.url.path}: {error.detail}; see POST /invocations, GET /ping and GET /metrics"
    return JSONResponse({"error": message}, error.status_code, error.headers)
