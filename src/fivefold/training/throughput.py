"""How fast a run trains: images a second of the training passes, the loader included, the validation not."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Images a second of each training pass that ran in this process, in order: `passes`.

    A pass that goes on from a checkpoint counts what it does itself.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.passes: list[float] = []
        self._clock = clock

    @contextmanager
    def of(self, images: int) -> Iterator[None]:
        """Times a pass over so many images; one that does not come to its end counts for nothing."""
        start = self._clock()
        yield
        if images:
            self.passes.append(images / max(self._clock() - start, 1e-9))

    @property
    def usual(self) -> float | None:
        """The median of the passes from the second on, since the first one warms up; of a single one that one, of none None."""
        counted = self.passes[1:] or self.passes
        return statistics.median(counted) if counted else None

    def figures(self) -> dict[str, float]:
        """`images_per_second` for a stage's record, if anything was trained."""
        return {} if self.usual is None else {"images_per_second": round(self.usual, 2)}
