"""A real server that speaks S3's protocol, and a proxy before it that breaks what it is told to."""

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
from functools import cached_property

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
ANSWERS = {"503": b"ServiceUnavailable", "403": b"AccessDenied", "400": b"BadDigest"}
SECONDS = {"slow": 1.0, "silent": 60.0}


@contextmanager
def served() -> Iterator[str]:
    """The endpoint of moto's server, a process of its own with nothing in it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + SECONDS_TO_START
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server ended at once"
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server, looked at past all of our own code."""

    endpoint: str
    name: str

    @classmethod
    def made(cls, endpoint: str, name: str) -> "Bucket":
        """A new one, named after a test."""
        found = cls(endpoint, f"b{hashlib.sha256(name.encode()).hexdigest()[:20]}")
        found.client.create_bucket(Bucket=found.name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return found

    @cached_property
    def client(self):
        """Of a session of its own, since boto3's default one is not for several threads."""
        return boto3.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=REGION,
        )

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
        """What a process needs to work with it; `endpoint`: that of a proxy before it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": endpoint or self.endpoint}


@dataclass
class Request:
    """A request that came by: its method, path and number, counted from 0."""

    method: str
    path: str
    number: int


@dataclass
class Proxy:
    """Hands requests on to a server but for those that `fault` names a fault for.

    503, 403: an answer in its place; drop: the connection closed; truncate: half of the answer's body, then closed; slow: a
    second later; silent: no answer for a minute; lost: handed on, but its answer closed off; spoilt: a bit of the body turned on its way to the client,
    garbled: on its way to the server, which then answers 400 where the request has a SHA-256.
    """

    endpoint: str
    fault: Callable[[Request], str | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    down_until: float = 0.0
    """Until this moment (of time.monotonic) every connection is closed at once, as by a server that starts again."""

    @contextmanager
    def listening(self) -> Iterator[str]:
        """The proxy's own endpoint."""
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
        """Requests of one connection, one after another; each has a connection to the server of its own."""
        while time.monotonic() >= self.down_until:
            head, body = _message(client)
            if not head:
                return
            method, path = head.split(b" ", 2)[:2]
            request = Request(method.decode(), path.decode(), len(self.requests))
            self.requests.append(request)
            fault = self.fault(request)
            if fault:
                self.faults.append(fault)
            if not self._answer(client, head, body, fault):
                return

    def _answer(self, client: socket.socket, head: bytes, body: bytes, fault: str | None) -> bool:
        """Whether the connection goes on."""
        if fault == "drop":
            return False
        if fault in SECONDS:
            time.sleep(SECONDS[fault])
        checksum = re.search(rb"(?i)\r\nx-amz-checksum-sha256: *([^\r]+)", head)
        if fault == "garbled":
            body = _turned(body)
            if checksum and base64.b64decode(checksum[1]) != hashlib.sha256(body).digest():
                fault = "400"  # moto takes it, S3 does not
        if fault in ANSWERS:
            told = b"<Error><Code>%s</Code><Message>a fault</Message></Error>" % ANSWERS[fault]
            client.sendall(b"HTTP/1.1 %s Fault\r\nContent-Length: %d\r\n\r\n" % (fault.encode(), len(told)) + told)
            return True
        head_only = head.startswith(b"HEAD ")
        host, port = self.endpoint.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as server:
            server.sendall(re.sub(rb"(?i)\r\nexpect: [^\r]*", b"", head) + body)
            answer, content = _message(server, head_only=head_only)
        if fault == "lost":
            return False
        if fault == "truncate":
            client.sendall(answer + content[: len(content) // 2])
            return False
        client.sendall(answer + (_turned(content) if fault == "spoilt" else content))
        return True


def _turned(body: bytes) -> bytes:
    """The bytes with one bit turned, in the middle."""
    at = len(body) // 2
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :] if body else body


def _message(peer: socket.socket, head_only: bool = False) -> tuple[bytes, bytes]:
    """Head and body of the next request or answer; empty where the other side has closed."""
    found = b""
    while b"\r\n\r\n" not in found:
        more = peer.recv(65536)
        if not more:
            return b"", b""
        found += more
    head, _, body = found.partition(b"\r\n\r\n")
    head += b"\r\n\r\n"
    if re.search(rb"(?i)\r\nexpect: *100-continue", head):
        peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    chunked = re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head)
    while not head_only and ((length and len(body) < int(length[1])) or (chunked and not body.endswith(b"0\r\n\r\n"))):
        more = peer.recv(65536)
        if not more:
            break
        body += more
    return head, body


def now_and_then(seed: int, share: float, faults: tuple[str, ...]) -> Callable[[Request], str | None]:
    """A fault for this share of all requests, the same ones for the same seed."""
    source = random.Random(seed)
    return lambda request: source.choice(faults) if source.random() < share else None
