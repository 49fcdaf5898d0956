"""Seconds on the wall and of the processor, of this process and of the workers that it ended."""

import resource
import statistics
import time
from collections.abc import Mapping
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


def counted(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The passes of a process but the first, which warms up; of a single one that one."""
    return told["passes"][1:] or told["passes"]


def ratio_of_rounds(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Images a second of the first process ÷ those of the second: the median over passes that followed each other."""
    rounds = zip(counted(first), counted(second), strict=True)
    return statistics.median(
        rate([one])["images_per_second"] / rate([other])["images_per_second"] for one, other in rounds
    )
