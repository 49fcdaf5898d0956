"""The service: read, decode and prepare the images of requests, predict them in batches, and count metrics."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from fivefold.config.schema import Serve
from fivefold.data.image_io import decoded_size
from fivefold.errors import DataError
from fivefold.serving.batching import Batcher
from fivefold.serving.protocol import MILLION, RefusedError, read_list, render, too_large
from fivefold.serving.workers import Workers
from fivefold.system import count_cores

GRACE_PERIOD_S = 10.0
"""After this time a body must have arrived at MIN_BYTES_PER_S on average."""
MIN_BYTES_PER_S = 10_000.0
"""Minimum rate at which a client must send a body."""

if TYPE_CHECKING:
    from fivefold.ensemble import EnsemblePredictor

disable_created_metrics()


class Metrics:
    """The server's Prometheus metrics; `images` returns the number of images in flight."""

    def __init__(self, images: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("fivefold_requests", "requests by response status", ["status"], registry=registry)
        in_flight = Gauge("fivefold_images_under_way", "images of requests in flight", registry=registry)
        in_flight.set_function(images)
        self._seconds = Histogram("fivefold_request_seconds", "seconds from header to response", registry=registry)
        buckets = [2**power for power in range(9)]
        self.batches = Histogram("fivefold_batch_images", "images per batch", buckets=buckets, registry=registry)

    def count_request(self, status: int, seconds: float) -> None:
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def read(self, sample: str, **labels: str) -> int:
        """Return the value of a sample, e.g. `fivefold_batch_images_sum`; 0 if it has none yet."""
        return round(self.registry.get_sample_value(sample, labels) or 0)


class Service:
    """Predict the images of requests with one model; all methods must run in one event loop."""

    def __init__(self, limits: Serve) -> None:
        self.limits = limits
        self.max_body = limits.max_body_mb * MILLION
        self.metrics = Metrics(lambda: self.images)
        self.model: EnsemblePredictor | None = None
        self.draining = False
        self.requests = self.images = self.bodies = 0

    def open(self, model: "EnsemblePredictor") -> None:
        """Start to accept requests. One thread runs the model with all torch threads; image threads use one torch thread each."""
        import torch

        threads, limits = torch.get_num_threads(), self.limits
        self._batcher = Batcher(
            model.predict_prepared,
            limits.batch_size,
            limits.max_wait_ms / 1000,
            in_flight=lambda: self.requests,
            seen=self.metrics.batches.observe,
            begin=lambda: torch.set_num_threads(threads),
        )
        self._workers = Workers(min(count_cores(), threads) + 1, limits.max_total_megapixels * MILLION)
        self.model = model

    def close(self) -> None:
        """End the threads; no method may be called afterwards."""
        if self.model is not None:
            self._workers.close()
            self._batcher.close()

    def state(self) -> str:
        """Return `ready`, or why the service is not ready."""
        if self.draining:
            return "draining"
        if self.model is None:
            return "loading"
        healthy = self._batcher.healthy and not self._workers.stalled(self.limits.timeout_s)
        return "ready" if healthy else "failing"

    def check_capacity(self, images: int = 1) -> None:
        """Raise a RefusedError: 503 without a model or if the queue is full, 413 if the images exceed the whole queue."""
        if self.model is None:
            raise RefusedError(503, "the model is still loading: try again later")
        if images > self.limits.max_queue:
            raise RefusedError(413, f"{images} images in one request, but serve.max_queue={self.limits.max_queue}")
        if self.images + images > self.limits.max_queue:
            raise RefusedError(503, f"{self.images} images are already in flight: try again later")

    @contextmanager
    def admission(self, images: int) -> Iterator[None]:
        """Reserve room for the images of a request during the block; raise a RefusedError as `check_capacity` does."""
        self.check_capacity(images)
        self.requests, self.images = self.requests + 1, self.images + images
        try:
            yield
        finally:
            self.requests, self.images = self.requests - 1, self.images - images

    @asynccontextmanager
    async def receive_body(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Receive the body of a request; its bytes count against `serve.max_total_body_mb` during the block.

        Raise a RefusedError: 413 as soon as the body is too large, 408 if it is too slow, 503 if other bodies use all memory.
        """
        body, taken, limit = bytearray(), 0, self.limits.timeout_s
        start = asyncio.get_running_loop().time()
        try:
            try:
                async with asyncio.timeout(min(GRACE_PERIOD_S, limit)) as clock:
                    async for chunk in chunks:
                        body += chunk
                        taken, self.bodies = len(body), self.bodies + len(chunk)
                        if taken > self.max_body:
                            raise too_large(self.max_body)
                        if self.bodies > self.limits.max_total_body_mb * MILLION:
                            raise RefusedError(503, "other bodies use all of serve.max_total_body_mb: try again later")
                        clock.reschedule(start + min(GRACE_PERIOD_S + taken / MIN_BYTES_PER_S, limit))
            except TimeoutError:
                rate = f"{MIN_BYTES_PER_S / 1000:g} kB/s after {GRACE_PERIOD_S:g} s"
                message = f"{taken} bytes have arrived; send all within {limit:g} s (serve.timeout_s) and at {rate}"
                raise RefusedError(408, message) from None
            body = bytes(body)  # frees the bytearray
            yield body
        finally:
            self.bodies -= taken

    async def read(self, body: bytes, many: bool) -> list[bytes]:
        """Return the image files of a body; a list is parsed in another thread, so that other requests need not wait."""
        if not body:
            raise RefusedError(400, "the body is empty")
        return await self._workers.start(len(body), read_list, body) if many else [body]

    async def predict(self, files: Sequence[bytes], many: bool) -> np.ndarray:
        """Return log p float32 [N, C] of the images in order; raise a RefusedError (422) for the first invalid or too large one."""
        work = [self._prepare(file, index if many else None) for index, file in enumerate(files)]
        prepared = await asyncio.gather(*work, return_exceptions=True)
        for result in prepared:
            if isinstance(result, BaseException):
                raise result
        rows = await asyncio.gather(*(self._batcher.submit(image) for image in prepared))
        return np.stack(rows) if rows else np.empty((0, len(self.model.classes)), np.float32)

    async def render(self, content_type: str, log_probs: np.ndarray, top: int, many: bool) -> bytes:
        """Return the body of a response; a list, which may have many classes, is rendered in another thread."""
        arguments = content_type, self.model.classes, log_probs, top, many
        return await self._workers.start(0, render, *arguments) if many else render(*arguments)

    async def _prepare(self, file: bytes, index: int | None) -> Any:
        name = "the image" if index is None else f"image {index} of the list"
        limit = self.limits.max_megapixels * MILLION
        bounds = {"max_pixels": 4 * limit if file[:3] == b"\xff\xd8\xff" else limit, "formats": self.limits.formats}
        height, width = await self._workers.start(len(file), _try, index, lambda: decoded_size(file, name, **bounds))
        bounds["min_size"] = min(height, width) // 2 if height * width > limit else 0  # only for a JPEG
        decode, prepare = self.model.decode, self.model.prepare
        return await self._workers.start(height * width, _try, index, lambda: prepare(decode(file, name, **bounds)))


def _try(index: int | None, work: Callable[[], Any]) -> Any:
    """Return the result of `work`, or a RefusedError; raising it would keep the pixels of all stack frames alive."""
    try:
        return work()
    except DataError as error:
        return RefusedError(422, str(error), index)
