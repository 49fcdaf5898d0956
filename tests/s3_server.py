"""A real server for S3's protocol, and a proxy in front of it that injects faults."""

import base64
import hashlib
import os
import random
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache

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
ERROR_CODES = {"503": b"ServiceUnavailable", "403": b"AccessDenied", "400": b"BadDigest"}
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
    import boto3

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

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

        with Server(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()

    def _serve(self, client: socket.socket) -> None:
        """Handle the requests of one connection in order; each uses a new connection to the server."""
        while True:
            head, body = _read_message(client)
            if not head:
                return
            method, path = head.split(b" ", 2)[:2]
            request = Request(method.decode(), path.decode())
            self.requests.append(request)
            fault = self.fault(request)
            if fault:
                self.faults.append(fault)
            if not self._answer(client, head, body, fault):
                return

    def _answer(self, client: socket.socket, head: bytes, body: bytes, fault: str | None) -> bool:
        """Respond to one request; return whether the connection stays open."""
        if fault == "drop":
            return False
        if fault in DELAY_SECONDS:
            time.sleep(DELAY_SECONDS[fault])
        checksum = re.search(rb"(?i)\r\nx-amz-checksum-sha256: *([^\r]+)", head)
        if fault == "garbled":
            body = _flip_bit(body)
            if checksum and base64.b64decode(checksum[1]) != hashlib.sha256(body).digest():
                fault = "400"  # moto accepts the body, S3 does not
        if fault in ERROR_CODES:
            error = b"<Error><Code>%s</Code><Message>a fault</Message></Error>" % ERROR_CODES[fault]
            client.sendall(b"HTTP/1.1 %s Fault\r\nContent-Length: %d\r\n\r\n" % (fault.encode(), len(error)) + error)
            return True
        head_only = head.startswith(b"HEAD ")
        host, port = self.endpoint.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as server:
            server.sendall(re.sub(rb"(?i)\r\nexpect: [^\r]*", b"", head) + body)
            response, content = _read_message(server, head_only=head_only)
        if fault == "lost":
            return False
        if fault == "truncate":
            client.sendall(response + content[: len(content) // 2])
            return False
        client.sendall(response + (_flip_bit(content) if fault == "spoilt" else content))
        return True


def _flip_bit(body: bytes) -> bytes:
    """Return the bytes with one bit flipped, in the middle."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


def _read_message(peer: socket.socket, head_only: bool = False) -> tuple[bytes, bytes]:
    """Read head and body of the next request or response; both are empty if the peer closed the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = peer.recv(65536)
        if not chunk:
            return b"", b""
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    head += b"\r\n\r\n"
    if re.search(rb"(?i)\r\nexpect: *100-continue", head):
        peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    chunked = re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head)
    while not head_only and ((length and len(body) < int(length[1])) or (chunked and not body.endswith(b"0\r\n\r\n"))):
        chunk = peer.recv(65536)
        if not chunk:
            break
        body += chunk
    return head, body


def now_and_then(seed: int, share: float, faults: tuple[str, ...]) -> Callable[[Request], str | None]:
    """Return a fault function for this share of all requests; equal seeds give equal faults."""
    generator = random.Random(seed)
    return lambda request: generator.choice(faults) if generator.random() < share else None
