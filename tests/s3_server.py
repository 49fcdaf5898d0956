"""A real server for S3's protocol, and a proxy in front of it that injects faults."""

import base64
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3

REGION = "eu-central-1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-see",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
SECONDS_TO_START = 60.0
ERROR_CODES = {"503": "ServiceUnavailable", "403": "AccessDenied", "400": "BadDigest"}
DELAY_SECONDS = {"slow": 1.0, "silent": 60.0}


@contextmanager
def run_server() -> Iterator[str]:
    """Run moto's server, empty, as a separate process; yield its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server ended at once"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@cache
def _connect(endpoint: str):
    """Return a client of its own session, because boto3's default session is not thread-safe."""
    return boto3.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
    )


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server, accessed with boto3 and without Fivefold's code."""

    endpoint: str
    name: str

    @classmethod
    def create(cls, endpoint: str, name: str) -> "Bucket":
        """Create a bucket named after a test."""
        bucket = cls(endpoint, f"b{hashlib.sha256(name.encode()).hexdigest()[:20]}")
        bucket.client.create_bucket(Bucket=bucket.name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return bucket

    @property
    def client(self):
        return _connect(self.endpoint)

    def listed(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def environ(self, endpoint: str = "") -> dict[str, str]:
        """Return the variables a process needs to use the bucket; `endpoint` replaces the server's by a proxy's."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": endpoint or self.endpoint}


@dataclass
class Request:
    """A request that reached the proxy."""

    method: str
    path: str


@dataclass
class Proxy:
    """Forward requests to a server, except those for which `fault` returns a fault.

    503, 403: respond with this error; drop: close the connection; truncate: send half of the response's body, then close;
    slow: respond a second later; silent: no response for a minute; lost: forward the request, but send no response;
    spoilt: flip a bit of the response's body; garbled: flip a bit of the request's body; the server then responds with 400 if
    the request has a SHA-256.
    """

    endpoint: str
    fault: Callable[[Request], str | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Start the proxy and yield its endpoint."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                with suppress(OSError):
                    self.close_connection = not proxy._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        with Server(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def _answer(self, client: BaseHTTPRequestHandler) -> bool:
        """Respond to one request; return whether the connection stays open."""
        body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        request = Request(client.command, client.path)
        self.requests.append(request)
        if fault := self.fault(request):
            self.faults.append(fault)
        if fault == "drop":
            return False
        time.sleep(DELAY_SECONDS.get(fault, 0))
        if fault == "garbled":
            body = _flip_bit(body)
            checksum = client.headers.get("x-amz-checksum-sha256")
            if checksum and base64.b64decode(checksum) != hashlib.sha256(body).digest():
                fault = "400"  # moto accepts the body, S3 does not
        if fault in ERROR_CODES:
            error = f"<Error><Code>{ERROR_CODES[fault]}</Code><Message>a fault</Message></Error>".encode()
            client.send_response_only(int(fault))
            client.send_header("Content-Length", str(len(error)))
            client.end_headers()
            client.wfile.write(error)
            return True
        with closing(HTTPConnection(self.endpoint.removeprefix("http://"))) as server:
            headers = {name: value for name, value in client.headers.items() if name.lower() != "expect"}
            server.request(client.command, client.path, body, headers)
            response = server.getresponse()
            content = response.read()
        if fault == "lost":
            return False
        client.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                client.send_header(name, value)
        client.send_header("Content-Length", response.getheader("Content-Length") or str(len(content)))
        client.end_headers()
        if fault == "spoilt":
            content = _flip_bit(content)
        client.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)
        return fault != "truncate"


def _flip_bit(body: bytes) -> bytes:
    """Return the bytes with one bit flipped, in the middle."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


def now_and_then(seed: int, share: float, faults: tuple[str, ...]) -> Callable[[Request], str | None]:
    """Return a fault function for this share of all requests; equal seeds give equal faults."""
    generator = random.Random(seed)
    return lambda request: generator.choice(faults) if generator.random() < share else None
