"""A model that answers requests: it reads, decodes and prepares images, has them judged in batches, and counts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from fivefold.errors import DataError
from fivefold.machine import count_cores
from fivefold.recipe import Serve
from fivefold.serving.batching import Batcher
from fivefold.serving.protocol import MILLION, ImageRequest, Prediction, RefusedError, read_image, read_list, too_large

LATER = 1
"""Seconds after which a request that finds the queue full may come again."""


if TYPE_CHECKING:
    from fivefold.committee import Committee

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of the histograms' buckets."""
disable_created_metrics()


class Metrics:
    """What Prometheus reads of a server; `images` gives the images of requests that are not yet answered."""

    def __init__(self, images: Callable[[], int]) -> None:
        self.registry = own = CollectorRegistry()
        self._requests = Counter(
            "fivefold_requests", "requests of /invocations by the status of their answer", ["status"], registry=own
        )
        under_way = Gauge("fivefold_images_under_way", "images of requests that are not yet answered", registry=own)
        under_way.set_function(images)
        self._seconds = Histogram(
            "fivefold_request_seconds", "seconds from a request's head to its answer", buckets=SECONDS, registry=own
        )
        self.batches = Histogram(
            "fivefold_batch_images", "images in one step of the model", buckets=SIZES, registry=own
        )

    def count_request(self, status: int, seconds: float) -> None:
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def read(self, sample: str, **labels: str) -> int:
        """The value of a sample, as `fivefold_batch_images_sum`; 0 where there is none yet."""
        return round(self.registry.get_sample_value(sample, labels) or 0)


class Service:
    """Answers requests by one model, as soon as it has one; its methods belong to one event loop."""

    def __init__(self, limits: Serve) -> None:
        self.limits = limits
        self.max_body = limits.max_body_mb * MILLION
        self.metrics = Metrics(lambda: self.images)
        self.model: Committee | None = None
        self.draining = False
        self.requests = 0
        self.images = 0
        self._pool: ThreadPoolExecutor | None = None
        self._batcher: Batcher | None = None

    def open(self, model: "Committee") -> None:
        """Takes requests from now on: the model has a thread with all of torch's, images have threads with one each."""
        import torch

        threads, limits = torch.get_num_threads(), self.limits
        self._batcher = Batcher(
            model.judge,
            limits.batch_size,
            limits.max_wait_ms / 1000,
            under_way=lambda: self.requests,
            seen=self.metrics.batches.observe,
            begin=lambda: torch.set_num_threads(threads),
        )
        # Each thread that works with torch would have as many of its own: on two cores images took half as long again.
        self._pool = ThreadPoolExecutor(count_cores(), "images", torch.set_num_threads, (1,))
        self.model = model

    def close(self) -> None:
        """Ends the threads; nothing may be asked any more."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._batcher is not None:
            self._batcher.close()

    def state(self) -> str:
        """`ready`, or why it is not."""
        if self.draining:
            return "draining"
        if self.model is None or self._batcher is None:
            return "loading"
        return "ready" if self._batcher.healthy else "failing"

    @contextmanager
    def admitted(self) -> Iterator[Callable[[int], None]]:
        """A place for a request of one image; to be called with the number of its images when that is known.

        RefusedError (503) while there is no model and where the queue is full; (413) for more images than it could ever hold.
        """
        if self.model is None:
            raise RefusedError(503, "the model is still being loaded: try again later", later=LATER)
        taken = 0

        def take(images: int) -> None:
            nonlocal taken
            if images > self.limits.queue:
                raise RefusedError(
                    413, f"{images} images in one request, at most {self.limits.queue} (serve.queue): send fewer"
                )
            if self.images - taken + images > self.limits.queue:
                raise RefusedError(503, f"{self.images} images are under way already: try again later", later=LATER)
            self.images += images - taken
            taken = images

        take(1)
        self.requests += 1
        try:
            yield take
        finally:
            self.requests -= 1
            self.images -= taken

    async def receive(self, chunks: AsyncIterator[bytes]) -> bytes:
        """The body of a request; RefusedError (413) as soon as it is larger than the limit, (408) when it takes too long."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                async for chunk in chunks:
                    body += chunk
                    if len(body) > self.max_body:
                        raise too_large(self.max_body)
        except TimeoutError:
            raise RefusedError(
                408, f"the body was not sent within {self.limits.timeout_s:g} s (serve.timeout_s)"
            ) from None
        return bytes(body)

    async def read(self, body: bytes, many: bool) -> ImageRequest:
        """The image files of a body; a large list is read in another thread, so that others need not wait for it."""
        return await self._in_thread(read_list, body) if many else read_image(body)

    async def predict(self, asked: ImageRequest) -> np.ndarray:
        """log p float32 [N, C] of the images in their order.

        RefusedError (422) for the first that cannot be decoded or has too many pixels, (503) when it takes too long.
        """
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                prepared = await self._prepared(asked)
                rows = await asyncio.gather(*(self._batcher.ask(image) for image in prepared))
        except TimeoutError:
            raise RefusedError(
                503, f"no answer within {self.limits.timeout_s:g} s (serve.timeout_s): try again later", later=LATER
            ) from None
        return np.stack(rows) if rows else np.empty((0, len(self.model.classes)), np.float32)

    async def render(self, form: Callable[[Prediction], bytes], prediction: Prediction) -> bytes:
        """The body of an answer; that of a list, which may have many classes, is written in another thread."""
        return await self._in_thread(form, prediction) if prediction.many else form(prediction)

    async def _prepared(self, asked: ImageRequest) -> list[Any]:
        work = [self._in_thread(self._prepare, file, at if asked.many else None) for at, file in enumerate(asked.files)]
        found = await asyncio.gather(*work, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found

    def _prepare(self, file: bytes, at: int | None) -> Any:
        name = "the image" if at is None else f"image {at} of the list"
        try:
            decoded = self.model.decode(file, name, self.limits.max_megapixels * MILLION)
        except DataError as error:
            raise RefusedError(422, str(error), image=at) from None
        return self.model.prepare(decoded)

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
