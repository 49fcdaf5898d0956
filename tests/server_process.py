"""`python -m jobs serve` as a real process on a free port of this machine, and plain clients of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reference_run import REPOSITORY, wait_until

SECONDS = 60.0
"""So long the process has to start, to answer or to end."""


@dataclass(frozen=True)
class Answer:
    """What came back: status, headers by their lower-case names, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ServerProcess:
    """A server that is being started; to be used as a context, which kills what has not ended."""

    early: Sequence[Answer] = ()
    """What it said before it was ready, where somebody asked."""

    def __init__(self, log: Path, *arguments: str, **environ: str) -> None:
        self.log = log
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "SAGEMAKER_"))}
        plain |= {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "OMP_NUM_THREADS": "1", **environ}
        port = [] if "SAGEMAKER_BIND_TO_PORT" in plain else ["serve.port=0"]
        command = [sys.executable, "-W", "error", "-m", "jobs", "serve", *port, *arguments]
        with open(log, "wb") as file:
            # a shell has what it starts in the background ignore SIGINT, and a process that ignores it goes on to
            self.process = subprocess.Popen(
                command,
                env=plain,
                cwd=REPOSITORY,
                stderr=file,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def told(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The match of a pattern in the log, as soon as it is there."""
        wait_until(lambda: re.search(pattern, self.told()) or self.process.poll() is not None, SECONDS)
        found = re.search(pattern, self.told())
        assert found, self.told()
        return found

    @property
    def port(self) -> int:
        return int(self.wait_for(r"listens at http://127\.0\.0\.1:(\d+)")[1])

    def ready(self) -> "ServerProcess":
        self.wait_for("ready: ")
        return self

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def raw(self) -> socket.socket:
        """A plain connection, to be sent any bytes."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; `content_type="image/png"` is a header."""
        with closing(self.connection()) as connection:
            return sent(connection, method, path, body, **headers)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code after this signal."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def sent(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """The answer to a request on this connection; a body that is iterated over goes in chunks."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named, encode_chunked=hasattr(body, "__next__"))
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
