"""What pods say, line by line, on the screen and in the log of each step's folder."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fivefold.launchers.endings import has_started, is_over
from fivefold.launchers.kubectl import Kubectl
from fivefold.launchers.manifests import CONTAINER
from fivefold.launchers.plan import Step
from fivefold.launchers.screen import Lines, Screen
from fivefold.launchers.status import LOG

SECONDS_FOR_LAST_WORDS = 20.0


@dataclass
class Stream:
    """One pod's log as it is followed: the process, and the thread that reads it."""

    process: subprocess.Popen[bytes]
    reader: threading.Thread
    ended: str = ""


class Logs:
    """Follows the log of every pod that it is shown, each by a process of kubectl."""

    def __init__(self, kubectl: Kubectl, screen: Screen) -> None:
        self.kubectl, self.screen = kubectl, screen
        self._streams: dict[str, Stream] = {}

    def follow(self, pod: Mapping[str, Any], step: Step) -> None:
        """Follows a pod that has started. One whose stream broke off while it runs is taken up from there."""
        name = pod["metadata"]["name"]
        known = self._streams.get(name)
        if not has_started(pod) or (known and (known.process.poll() is None or is_over(pod))):
            return
        since = ["--since-time", known.ended or _now()] if known else []
        process = subprocess.Popen(
            self.kubectl.command("logs", "--follow", name, "--container", CONTAINER, *since),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(name, process, step), daemon=True)
        self._streams[name] = Stream(process, reader)
        reader.start()

    def finish(self, pods: Sequence[Mapping[str, Any]]) -> None:
        """Waits for the last words of pods that are over."""
        until = time.monotonic() + SECONDS_FOR_LAST_WORDS
        for pod in pods:
            if stream := self._streams.get(pod["metadata"]["name"]):
                stream.reader.join(max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """Ends every process that still follows."""
        for stream in self._streams.values():
            if stream.process.poll() is None:
                stream.process.terminate()
            stream.reader.join(SECONDS_FOR_LAST_WORDS)

    def _read(self, name: str, process: subprocess.Popen[bytes], step: Step) -> None:
        step.folder.mkdir(parents=True, exist_ok=True)
        assert process.stdout is not None
        with process.stdout as pipe, open(step.folder / LOG, "a", encoding="utf-8") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pod {name}\n")

            def keep(line: str) -> None:
                file.write(line + "\n")
                file.flush()
                self.screen.line(f"[{step.name}] {line}")

            lines = Lines(keep)
            while portion := pipe.read1():
                lines.feed(portion)
            lines.close()
        process.wait()
        self._streams[name].ended = _now()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
