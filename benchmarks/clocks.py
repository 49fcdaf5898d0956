"""Seconds on the wall and of the processor, of this process and of the workers that it ended."""

import resource
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Reading":
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)

    def since(self, images: int) -> dict[str, Any]:
        """What was done since this reading, as a figure of the JSON that a process tells."""
        now = Reading.now()
        return {"images": images, "seconds": now.wall - self.wall, "cpu_seconds": now.cpu - self.cpu}


def rate(passes: list[dict[str, Any]]) -> dict[str, float]:
    """Images a second, and seconds of the processor an image, of several passes together."""
    images, seconds = (sum(each[name] for each in passes) for name in ("images", "seconds"))
    return {
        "images_per_second": images / seconds,
        "cpu_seconds_per_image": sum(each["cpu_seconds"] for each in passes) / images,
    }
