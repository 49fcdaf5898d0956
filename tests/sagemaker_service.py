"""SageMaker on this machine: moto's server for its API, and before it one that really runs the jobs.

What moto does not do is done here: a job's container is a process with SageMaker's folders (SAGEMAKER_BASE_DIR for
/opt/ml) and nothing of the contract in its environment but the job's own; its channels come from moto's S3, its outputs
and checkpoints go there, packed or not, its words go to moto's CloudWatch; it can be stopped, and interrupted once, as spot instances are.
All other calls are moto's.
"""

import http.client
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

from s3_server import CREDENTIALS

REPOSITORY = Path(__file__).parents[1]
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ROLE = "arn:aws:iam::123456789012:role/fivefold"
OF_THE_CONTRACT = ("SM_", "AWS_", "SAGEMAKER_", "FOLD", "STAGE")


@dataclass
class Job:
    """One training job: what was asked for, and how it stands."""

    request: dict[str, Any]
    folder: Path
    status: str = "InProgress"
    detail: str = "Starting"
    reason: str = ""
    details: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    thread: threading.Thread | None = None
    interrupted: bool = False
    stopped: bool = False

    def turn(self, detail: str) -> None:
        self.detail = detail
        self.details.append(detail)


@dataclass
class Service:
    """The server: `endpoint` is what AWS_ENDPOINT_URL is set to; `calls` are the actions that came by."""

    moto: str
    folder: Path
    endpoint: str = ""
    calls: list[str] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    interrupt_once: str = ""
    """A part of the name of jobs that lose their instance once, after their first checkpoint."""
    hold: str = ""
    """A part of the name of jobs that stay at Starting until this is emptied."""
    quota: int = 0
    """How many jobs the account may run at once, 0: any number; `refused` counts those that were too many."""
    refused: int = 0
    down: int = 0
    """How many of the next calls are answered 503."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    group: threading.Lock = field(default_factory=threading.Lock)
    clients: dict[str, Any] = field(default_factory=dict)

    def client(self, name: str) -> Any:
        with self.lock:
            if name not in self.clients:
                self.clients[name] = self._client(name)
            return self.clients[name]

    def _client(self, name: str) -> Any:
        keys = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client(name, endpoint_url=self.moto, region_name=CREDENTIALS["AWS_DEFAULT_REGION"], **keys)

    def environ(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint, "SAGEMAKER_TELEMETRY_OPT_OUT": "true"}

    def answer(self, action: str, body: bytes) -> tuple[int, bytes] | None:
        """The answer to a call that is ours, None for one that is moto's alone."""
        given = json.loads(body) if action.startswith("SageMaker.") and body else {}
        job = self.jobs.get(given.get("TrainingJobName", ""))
        running = sum(each.status == "InProgress" for each in self.jobs.values())
        if action == "SageMaker.CreateTrainingJob" and self.quota and running >= self.quota:
            self.refused += 1
            return (
                400,
                b'{"__type": "ResourceLimitExceeded", "message": "the account-level service limit is 1 Instances"}',
            )
        if action == "SageMaker.StopTrainingJob" and job is not None:
            job.stopped = True
            if job.process is not None:
                job.process.send_signal(signal.SIGTERM)
            return 200, b"{}"
        return None

    def after(self, action: str, body: bytes, answer: bytes) -> bytes:
        """moto's answer with what is known here; a job that moto has taken is started."""
        if action == "SageMaker.CreateTrainingJob":
            request = json.loads(body)
            job = self.jobs[request["TrainingJobName"]] = Job(request, self.folder / request["TrainingJobName"])
            job.thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            job.thread.start()
        if action == "SageMaker.DescribeTrainingJob":
            told = json.loads(answer)
            job = self.jobs[told["TrainingJobName"]]
            told |= {"TrainingJobStatus": job.status, "SecondaryStatus": job.detail, "FailureReason": job.reason}
            return json.dumps({name: value for name, value in told.items() if value != ""}).encode()
        return answer

    def close(self) -> None:
        """Ends the jobs that still run, and waits for them: their folders may go then."""
        self.hold = ""
        for job in self.jobs.values():
            job.stopped = True
            while job.thread is not None and job.thread.is_alive():
                if job.process is not None and job.process.poll() is None:
                    job.process.kill()
                job.thread.join(0.1)

    def _run(self, job: Job) -> None:
        name = job.request["TrainingJobName"]
        while self.hold and self.hold in name:
            time.sleep(0.05)
        try:
            code = 0 if job.stopped else self._attempt(job)
            while job.interrupted and code == 143 and not job.stopped:
                job.turn("Interrupted")
                job.interrupted, self.interrupt_once = False, ""
                job.turn("Restarting")
                code = self._attempt(job)
            self._over(job, code)
        except Exception as error:
            job.status, job.reason = "Failed", f"InternalServerError: {error!r}"
            raise

    def _over(self, job: Job, code: int) -> None:
        output = job.folder / "output"
        if job.stopped:
            job.turn("Stopped")
            job.status = "Stopped"
        elif code:
            told = (output / "failure").read_text()[:1024] if (output / "failure").is_file() else ""
            job.reason = f"AlgorithmError: {told}, exit code: {code}"
            job.turn("Failed")
            job.status = "Failed"
        else:
            job.turn("Uploading")
            self._upload(job)
            job.turn("Completed")
            job.status = "Completed"

    def _attempt(self, job: Job) -> int:
        """The job's container, once, on an instance that has nothing but what is fetched; its exit code."""
        shutil.rmtree(job.folder, ignore_errors=True)
        job.turn("Downloading")
        base, request = job.folder, job.request
        for folder in ("input/config", "input/data", "model", "output/data", "checkpoints"):
            (base / folder).mkdir(parents=True)
        for channel in request["InputDataConfig"]:
            source = channel["DataSource"]["S3DataSource"]
            self._fetch(source["S3Uri"], base / "input" / "data" / channel["ChannelName"])
        if "CheckpointConfig" in request:
            self._fetch(request["CheckpointConfig"]["S3Uri"] + "/", base / "checkpoints", needed=False)
        config = {channel["ChannelName"]: {"TrainingInputMode": "File"} for channel in request["InputDataConfig"]}
        (base / "input/config/inputdataconfig.json").write_text(json.dumps(config))
        (base / "input/config/hyperparameters.json").write_text(json.dumps(request.get("HyperParameters", {})))
        (base / "input/config/resourceconfig.json").write_text(
            json.dumps({"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"})
        )
        job.turn("Training")
        return self._contained(job)

    def _contained(self, job: Job) -> int:
        own = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_CONTRACT)}
        given = {"TRAINING_JOB_NAME": job.request["TrainingJobName"], "SAGEMAKER_BASE_DIR": str(job.folder)}
        environ = {**own, "PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", **given, **job.request.get("Environment", {})}
        command = [sys.executable, "-m", "jobs", "train"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job.process = subprocess.Popen(command, cwd=job.folder, env=environ, start_new_session=True, **pipes)
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(job.process.stdout), daemon=True)
        reader.start()
        while job.process.poll() is None:
            time.sleep(0.05)
            wanted = self.interrupt_once and self.interrupt_once in job.request["TrainingJobName"]
            if wanted and not job.interrupted and list((job.folder / "checkpoints").rglob("*.pt")):
                job.interrupted = True
                job.process.send_signal(signal.SIGTERM)
        reader.join(5)
        job.process.stdout.close()
        if "CheckpointConfig" in job.request:
            self._mirror(job.folder / "checkpoints", job.request["CheckpointConfig"]["S3Uri"])
        self._log(job, lines)
        return job.process.returncode

    def _fetch(self, url: str, folder: Path, needed: bool = True) -> None:
        """All objects whose keys begin so, named by what follows the last slash of the prefix."""
        bucket, prefix = urlsplit(url).netloc, urlsplit(url).path.lstrip("/")
        pages = self.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        assert keys or not needed, f"no object below {url}"
        start = len(prefix.rpartition("/")[0]) + 1 if "/" in prefix else 0
        for key in keys:
            path = folder / key[start:]
            path.parent.mkdir(parents=True, exist_ok=True)
            self.client("s3").download_file(bucket, key, str(path))

    def _mirror(self, folder: Path, url: str) -> None:
        bucket, prefix = urlsplit(url).netloc, urlsplit(url).path.strip("/")
        there = self.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        for entry in there:
            self.client("s3").delete_object(Bucket=bucket, Key=entry["Key"])
        for path in (path for path in folder.rglob("*") if path.is_file()):
            self.client("s3").upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")

    def _upload(self, job: Job) -> None:
        config = job.request["OutputDataConfig"]
        url = f"{config['S3OutputPath']}/{job.request['TrainingJobName']}/output"
        for name, folder in (("model", job.folder / "model"), ("output", job.folder / "output" / "data")):
            if config["CompressionType"] == "NONE":
                self._mirror(folder, f"{url}/{'data' if name == 'output' else name}")
                continue
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as archive:
                archive.add(folder, ".")
            bucket, prefix = urlsplit(url).netloc, urlsplit(url).path.strip("/")
            body = packed.getvalue()
            self.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}.tar.gz", Body=body)

    def _log(self, job: Job, lines: list[str]) -> None:
        logs, stream = self.client("logs"), f"{job.request['TrainingJobName']}/algo-1-{time.time_ns()}"
        with self.group:
            if LOG_GROUP not in [each["logGroupName"] for each in logs.describe_log_groups()["logGroups"]]:
                logs.create_log_group(logGroupName=LOG_GROUP)
        logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
        now = int(time.time() * 1000)
        events = [{"timestamp": now, "message": line.rstrip("\n")} for line in lines if line.strip()]
        for start in range(0, len(events), 500):
            logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=events[start : start + 500])


@contextmanager
def serving(moto: str, folder: Path) -> Iterator[Service]:
    """A service before moto's server at `moto`; its role may do all that the SDK asks after."""
    service = Service(moto, folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            action = self.headers.get("X-Amz-Target") or _action(self, body)
            service.calls.append(action)
            if service.down > 0:
                service.down -= 1
                return self.send(503, b'{"__type":"ServiceUnavailable"}', {})
            if ours := service.answer(action, body):
                return self.send(*ours, {"Content-Type": "application/x-amz-json-1.1"})
            status, headers, answer = self.forwarded(body)
            if status == 200:
                answer = service.after(action, body, answer)
            return self.send(status, answer, headers)

        def forwarded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            host = urlsplit(service.moto)
            connection = http.client.HTTPConnection(host.hostname, host.port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, dict(answer.getheaders()), content

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing: the calls are kept."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        service.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        yield service
        server.shutdown()
        service.close()


def _action(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> str:
    """The action of a call in another protocol than JSON: `Action=GetRole` of a form, or S3's own."""
    form = dict(part.partition("=")[::2] for part in body.decode("latin-1").split("&") if "=" in part)
    if "Action" in form:
        return f"{'sts' if form['Action'].startswith('GetCaller') else 'iam'}.{form['Action']}"
    return f"s3.{handler.command}{'?list' if 'list-type' in handler.path else ''}"
