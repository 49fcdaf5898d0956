"""`python -m jobs serve` as a real process on a free local port, and plain clients of a server."""

import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from reference_run import REPOSITORY, wait_until

TIMEOUT_S = 60.0
"""Time limit for the process to start, to respond and to end."""
POST = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """A response: status, headers by lower-case name, and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Clients of the local server on `port`."""

    port: int

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)

    def raw(self) -> socket.socket:
        """A plain connection, for arbitrary bytes."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request on its own connection; `content_type="image/png"` is a header."""
        with closing(self.connection()) as connection:
            return send_request(connection, method, path, body, **headers)

    def post(self, body: Any, content_type: str = "image/png", **headers: str) -> Answer:
        return self.request("POST", "/invocations", body, content_type=content_type, **headers)

    def ping(self) -> Answer:
        return self.request("GET", "/ping")


class ServerProcess(Client):
    """A server that is starting; as a context manager it waits until the server is ready, and kills it at the end."""

    def __init__(self, log: Path, *arguments: str, **environ: str) -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SM_", "SAGEMAKER_"))}
        environment |= {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "OMP_NUM_THREADS": "1", **environ}
        port = [] if "SAGEMAKER_BIND_TO_PORT" in environment else ["serve.port=0"]
        command = [sys.executable, "-W", "error", "-m", "jobs", "serve", *port, *arguments]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=file)

    def __enter__(self) -> "ServerProcess":
        self.port = int(self.wait_for(r"ready: http://127\.0\.0\.1:(\d+)")[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the log contains the pattern; return the match."""
        wait_until(lambda: re.search(pattern, self.log.read_text()) or self.process.poll() is not None, TIMEOUT_S)
        match = re.search(pattern, self.log.read_text())
        assert match, self.log.read_text()
        return match

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.terminate()
        return self.process.wait(TIMEOUT_S)


def send_request(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str
) -> Answer:
    """Send a request on this connection and return the response; the body of an iterator is sent in chunks."""
    http_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, http_headers, encode_chunked=hasattr(body, "__next__"))
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def make_image(
    width: int = 4, height: int = 4, mode: str = "L", file_format: str = "PNG", color: Any = 0, **options: Any
) -> bytes:
    """Return an image file of one colour."""
    content = io.BytesIO()
    Image.new(mode, (width, height), color).save(content, file_format, **options)
    return content.getvalue()
