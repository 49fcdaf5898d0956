"""What a server counts, as the text that Prometheus reads.

Five series in the plain text format (version 0.0.4), which is lines of a name and a number: no library is needed.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """How many of the values seen were at most as large as each of `bounds`, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {below}"


class Counters:
    """Requests by status, the seconds that they took, images by the size of their batch; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[int] = Counter()
        self.seconds = Histogram(SECONDS)
        self.batches = Histogram(SIZES)

    def request(self, status: int, seconds: float) -> None:
        with self._lock:
            self.requests[status] += 1
            self.seconds.add(seconds)

    def batch(self, images: int) -> None:
        with self._lock:
            self.batches.add(images)

    @property
    def images(self) -> int:
        """Images that the model has seen."""
        return round(self.batches.sum)

    def text(self, under_way: int) -> str:
        """All of it, and the images under way now."""
        with self._lock:
            return "\n".join(self._lines(under_way)) + "\n"

    def _lines(self, under_way: int) -> Iterator[str]:
        yield from head("fivefold_requests_total", "counter", "requests of /invocations by the status of their answer")
        for status, count in sorted(self.requests.items()):
            yield f'fivefold_requests_total{{status="{status}"}} {count}'
        yield from head("fivefold_images_under_way", "gauge", "images of requests that are not yet answered")
        yield f"fivefold_images_under_way {under_way}"
        yield from head("fivefold_request_seconds", "histogram", "seconds from a request's head to its answer")
        yield from self.seconds.lines("fivefold_request_seconds")
        yield from head("fivefold_batch_images", "histogram", "images in one step of the model")
        yield from self.batches.lines("fivefold_batch_images")


def head(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"
