"""Serving under load: images a second over HTTP, against what the model does on batches that lie ready in memory.

    python benchmarks/serving.py MODEL IMAGES [SECONDS] [ROUNDS] [KEY=VALUE…]

MODEL is anything that `serve` takes, IMAGES a folder of image files, SECONDS how long each turn lasts (5), ROUNDS how
many there are (5); KEY=VALUE go to the server. In each round, in turns: `limit`, the networks on a resident batch of
serve.batch_size; `files`, the same images from encoded files in one process, without HTTP; `single`, 4 × serve.batch_size
connections that send an image each; `lists`, 4 that send lists of serve.batch_size. Every answer is compared with the
one-process one. Clients share the machine with the server: what they cost is told as cores. Printed as a table on
stderr and as JSON on stdout. Compare nothing between two runs: leave the machine alone while it runs.
"""

import asyncio
import base64
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fivefold.committee import Committee
from fivefold.data.dataset import joined
from fivefold.data.given import HandedStore
from fivefold.data.images import is_image
from fivefold.errors import MissingInputError
from fivefold.inference.predictor import predict
from fivefold.members import ImageFiles
from fivefold.recipe import Settings
from fivefold.settings import arguments_layer, load
from jobs.serve import model_at

IMAGES = 512
"""So many different images are sent at most."""
SAME = 1e-3
"""How far a confidence may be off; networks in bf16 (a model.json says so) may be off by 2e-2."""
LOADS = ("single", "lists")


@dataclass
class Load:
    """What clients saw in one turn: images answered, seconds, latencies of requests, cores that the clients took."""

    images: int = 0
    wrong: int = 0
    seconds: float = 0.0
    cores: float = 0.0
    latencies: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Expected:
    """The likeliest class of an image, its probability, and how much less likely the next one is."""

    name: str
    confidence: float
    lead: float


@dataclass(frozen=True)
class Question:
    """A request's bytes, whole, and the answers to it."""

    request: bytes
    expected: Sequence[Expected]


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; 1 where an answer was wrong."""
    given = [text for text in arguments if "=" not in text]
    if not 2 <= len(given) <= 4 or given[0].startswith("-"):
        print(__doc__)
        return 64
    settings = load([arguments_layer(rest := [text for text in arguments if "=" in text])])
    seconds, rounds = float((*given[2:3], 5)[0]), int((*given[3:4], 5)[0])
    with tempfile.TemporaryDirectory() as scratch:
        committee = model_at(given[0], settings, Path(scratch))
    bench = Bench(committee, read(Path(given[1])), settings, seconds)
    with server(given[0], rest) as port:
        turns = [bench.round(port) for _ in range(rounds)]
    figures = summary(turns, settings, committee)
    print(json.dumps(figures, indent=1))
    print(table(figures), file=sys.stderr)
    return 1 if figures["wrong"] else 0


def read(folder: Path) -> list[bytes]:
    """The image files below a folder, IMAGES of them at most."""
    paths = sorted(path for path in folder.rglob("*") if is_image(path.name))[:IMAGES]
    if not paths:
        raise MissingInputError(f"no images below {folder}")
    return [path.read_bytes() for path in paths]


class Bench:
    """The turns of a round, each for the same number of seconds."""

    def __init__(self, committee: Committee, files: Sequence[bytes], settings: Settings, seconds: float) -> None:
        self.committee, self.files, self.seconds = committee, files, seconds
        self.batch = settings.serve.batch_size
        self.same = 2e-2 if any(member.runtime.dtype for member in committee.members) else SAME
        self.expected = self.answers()
        chosen = [files[at % len(files)] for at in range(self.batch)]
        prepared = [committee.prepare(committee.decode(file, "an image")) for file in chosen]
        self.resident = {sight: joined([image[sight] for image in prepared]) for sight in prepared[0]}

    def answers(self) -> list[Expected]:
        verdict = self.committee.predict(self.handed())
        assert not verdict.unreadable, verdict.unreadable
        found = []
        for row in np.exp(verdict.log_probs.astype(np.float64)):
            second, best = np.argsort(row)[-2:]
            found.append(Expected(self.committee.classes[best], float(row[best]), float(row[best] - row[second])))
        return found

    def handed(self) -> ImageFiles:
        names = [str(at) for at in range(len(self.files))]
        return ImageFiles(HandedStore(dict(zip(names, self.files, strict=True))), names)

    def round(self, port: int) -> dict[str, Any]:
        """Each turn's images a second; of the loads all that was seen."""
        found: dict[str, Any] = {"limit": self.a_second(self.one_batch), "files": self.a_second(self.all_files)}
        for name, clients, size in (("single", 4 * self.batch, 1), ("lists", 4, self.batch)):
            found[name] = asyncio.run(pressed(port, self.questions(size), clients, self.seconds, self.same))
        return found

    def a_second(self, step: Callable[[], int]) -> float:
        step()
        done, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < self.seconds:
            done += step()
        return done / spent

    def one_batch(self) -> int:
        for member in self.committee.members:
            predict(member.network, [self.resident[member.sight]], member.runtime, member.settings.predict.views)
        return self.batch

    def all_files(self) -> int:
        self.committee.predict(self.handed())
        return len(self.files)

    def questions(self, size: int) -> list[Question]:
        found = []
        for start in range(0, len(self.files), size):
            rows = [at % len(self.files) for at in range(start, start + size)]
            found.append(question([self.files[at] for at in rows], [self.expected[at] for at in rows], size > 1))
        return found


def question(files: Sequence[bytes], expected: Sequence[Expected], many: bool) -> Question:
    body = json.dumps([base64.b64encode(file).decode() for file in files]).encode() if many else files[0]
    kind = "application/json" if many else "application/octet-stream"
    head = f"POST /invocations?top=1 HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return Question(head.encode() + body, expected)


async def pressed(port: int, questions: Sequence[Question], clients: int, seconds: float, same: float) -> Load:
    """So many connections ask one question after the other until the time is over."""
    load, begun, used = Load(), time.perf_counter(), time.process_time()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        at = number
        while time.perf_counter() - begun < seconds:
            asked = questions[at % len(questions)]
            start = time.perf_counter()
            writer.write(asked.request)
            answer = await received(reader)
            load.latencies.append(time.perf_counter() - start)
            load.images += len(asked.expected)
            load.wrong += wrong(answer, asked.expected, same)
            at += clients
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*map(client, range(clients)))
    load.seconds = time.perf_counter() - begun
    load.cores = (time.process_time() - used) / load.seconds
    return load


async def received(reader: asyncio.StreamReader) -> list[Any]:
    """The answers to one request; an error where it is refused."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"the server says {head[:40]!r}: {body[:200]!r}")
    told = json.loads(body)
    return told if isinstance(told, list) else [told]


def wrong(answers: Sequence[Mapping[str, Any]], expected: Sequence[Expected], same: float) -> int:
    """How many of the answers are not the expected ones; where two classes are as likely, either is right."""
    count = 0
    for told, right in zip(answers, expected, strict=True):
        other = told["predicted_class"] != right.name and right.lead > same
        count += other or abs(told["confidence"] - right.confidence) > same
    return count


@contextmanager
def server(model: str, arguments: Sequence[str]) -> Iterator[int]:
    """The port of a server in a process of its own, which is told to stop in the end."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "jobs", "serve", f"model={model}", "serve.port=0", "serve.host=127.0.0.1"]
        with open(log, "wb") as file:
            process = subprocess.Popen([*command, "serve.queue=10000", *arguments], stderr=file)
        try:
            while not (found := re.search(r"ready: http://127\.0\.0\.1:(\d+)", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield int(found[1])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143, log.read_text()
        finally:
            process.kill()


def summary(turns: Sequence[Mapping[str, Any]], settings: Settings, committee: Committee) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(committee.members[0].runtime.device),
        "models": len(committee.members),
        "batch_size": settings.serve.batch_size,
        "rounds": len(turns),
        "wrong": sum(turn[name].wrong for turn in turns for name in LOADS),
    }
    for name in ("limit", "files"):
        figures[name] = {"images_per_second": round(statistics.median(turn[name] for turn in turns), 1)}
    for name in LOADS:
        figures[name] = of_load([turn[name] for turn in turns], turns)
    return figures


def of_load(loads: Sequence[Load], turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; ratios are of the same round's limit and files."""
    rates = [load.images / load.seconds for load in loads]
    latencies = sorted(seconds for load in loads for seconds in load.latencies)
    return {
        "images_per_second": round(statistics.median(rates), 1),
        **{
            f"of_{name}": ratios([rate / turn[name] for rate, turn in zip(rates, turns, strict=True)])
            for name in ("limit", "files")
        },
        "clients_cores": round(statistics.median(load.cores for load in loads), 2),
        "requests": len(latencies),
        "latency_ms": {f"p{p}": round(1000 * float(np.percentile(latencies, p)), 2) for p in (50, 95, 99)},
    }


def ratios(found: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(found), 3), "least": round(min(found), 3), "most": round(max(found), 3)}


def table(figures: Mapping[str, Any]) -> str:
    lines = [f"{'':8} {'images/s':>10} {'of limit':>9} {'of files':>9} {'p50 ms':>8} {'p99 ms':>8}"]
    lines += [f"{name:8} {figures[name]['images_per_second']:10.1f}" for name in ("limit", "files")]
    for name in LOADS:
        each = figures[name]
        lines.append(
            f"{name:8} {each['images_per_second']:10.1f} {each['of_limit']['median']:9.3f} {each['of_files']['median']:9.3f} "
            f"{each['latency_ms']['p50']:8.1f} {each['latency_ms']['p99']:8.1f}"
        )
    return "\n".join([*lines, f"wrong answers: {figures['wrong']}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
