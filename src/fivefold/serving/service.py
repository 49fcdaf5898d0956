"""A model that answers requests: it reads, decodes and prepares images, has them judged in batches, and counts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from fivefold.data.images import decoded_size
from fivefold.errors import DataError
from fivefold.machine import count_cores
from fivefold.recipe import Serve
from fivefold.serving.batching import Batcher
from fivefold.serving.protocol import MILLION, ImageRequest, Prediction, RefusedError, read_image, read_list, too_large
from fivefold.serving.workers import Workers

LATER = 1
"""Seconds after which a request that finds the queue full may come again."""
GRACE = 10.0
"""Seconds after which a body must have come at LEAST_RATE, on the whole."""
LEAST_RATE = 10_000.0
"""Bytes a second at which a client must send, and read."""

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
        self.bodies = 0
        self._workers: Workers | None = None
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
        self._workers = Workers(min(count_cores(), threads) + 1, limits.megapixels_at_once * MILLION)
        self.model = model

    def close(self) -> None:
        """Ends the threads; nothing may be asked any more."""
        if self._workers is not None:
            self._workers.close()
        if self._batcher is not None:
            self._batcher.close()

    def state(self) -> str:
        """`ready`, or why it is not."""
        if self.draining:
            return "draining"
        if self.model is None or self._batcher is None or self._workers is None:
            return "loading"
        well = self._batcher.healthy and not self._workers.stalled(self.limits.timeout_s)
        return "ready" if well else "failing"

    def check_room(self, images: int = 1) -> None:
        """RefusedError (503) while there is no model and where so many more images do not fit, (413) where they never could."""
        if self.model is None:
            raise RefusedError(503, "the model is still being loaded: try again later", later=LATER)
        if images > self.limits.queue:
            raise RefusedError(
                413, f"{images} images in one request, at most {self.limits.queue} (serve.queue): send fewer"
            )
        if self.images + images > self.limits.queue:
            raise RefusedError(503, f"{self.images} images are under way already: try again later", later=LATER)

    @contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Places for the images of a request; RefusedError as `check_room`."""
        self.check_room(images)
        self.requests, self.images = self.requests + 1, self.images + images
        try:
            yield
        finally:
            self.requests, self.images = self.requests - 1, self.images - images

    @asynccontextmanager
    async def received(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The body of a request, which counts as long as the block runs.

        RefusedError (413) as soon as it is too large, (408) when it takes too long, (503) where other bodies take all the room.
        """
        body, taken, limit = bytearray(), 0, self.limits.timeout_s
        begun = asyncio.get_running_loop().time()
        try:
            try:
                async with asyncio.timeout(min(GRACE, limit)) as clock:
                    async for chunk in chunks:
                        body += chunk
                        taken, self.bodies = len(body), self.bodies + len(chunk)
                        if taken > self.max_body:
                            raise too_large(self.max_body)
                        if self.bodies > self.limits.bodies_mb * MILLION:
                            raise RefusedError(503, "other bodies take all the room: try again later", later=LATER)
                        clock.reschedule(begun + min(GRACE + taken / LEAST_RATE, limit))
            except TimeoutError:
                told = f"within {limit:g} s (serve.timeout_s), and at {LEAST_RATE / 1000:g} kB/s after {GRACE:g} s"
                raise RefusedError(408, f"the body came too slowly, {taken} bytes of it; it must come {told}") from None
            body = bytes(body)
            yield body
        finally:
            self.bodies -= taken

    async def read(self, body: bytes, many: bool) -> ImageRequest:
        """The image files of a body; a list is read in another thread, so that others need not wait for it."""
        return await self._workers.start(len(body), read_list, body) if many else read_image(body)

    async def predict(self, asked: ImageRequest) -> np.ndarray:
        """log p float32 [N, C] of the images in their order; RefusedError (422) for the first that cannot be decoded or is too large."""
        work = [self._prepared(file, at if asked.many else None) for at, file in enumerate(asked.files)]
        prepared = await asyncio.gather(*work, return_exceptions=True)
        for each in prepared:
            if isinstance(each, BaseException):
                raise each
        rows = await asyncio.gather(*(self._batcher.ask(image) for image in prepared))
        return np.stack(rows) if rows else np.empty((0, len(self.model.classes)), np.float32)

    async def render(self, form: Callable[[Prediction], bytes], prediction: Prediction) -> bytes:
        """The body of an answer; that of a list, which may have many classes, is written in another thread."""
        return await self._workers.start(0, form, prediction) if prediction.many else form(prediction)

    async def _prepared(self, file: bytes, at: int | None) -> Any:
        name, most = "the image" if at is None else f"image {at} of the list", self.limits.max_megapixels * MILLION
        bounds = {"max_pixels": 4 * most if file[:3] == b"\xff\xd8\xff" else most, "formats": self.limits.formats}
        height, width = await self._workers.start(len(file), _tried, at, lambda: decoded_size(file, name, **bounds))
        bounds["least"] = min(height, width) // 2 if height * width > most else 0  # a JPEG alone
        decode, prepare = self.model.decode, self.model.prepare
        return await self._workers.start(height * width, _tried, at, lambda: prepare(decode(file, name, **bounds)))


def _tried(at: int | None, work: Callable[[], Any]) -> Any:
    """What `work` gives, or why the image cannot be decoded; that is not raised, since it would keep the pixels of all frames."""
    try:
        return work()
    except DataError as error:
        return RefusedError(422, str(error), image=at)
