"""SageMaker on this machine: training jobs that really run, in front of moto's server for S3 and logs.

moto completes each job at once and ignores its `Environment`, so this service answers the calls on training jobs. A
job's container is a process with SageMaker's folders (SAGEMAKER_BASE_DIR for /opt/ml); of the container contract's variables it
gets only the job's own. Its channels come from moto's S3. Its outputs and checkpoints go there, compressed or not, and
its log goes to moto's CloudWatch. A job can be stopped, and interrupted once, as spot instances are.
"""

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import requests
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from reference_run import REPOSITORY
from s3_server import CREDENTIALS, Bucket

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/fivefold:1"
ROLE = "arn:aws:iam::123456789012:role/fivefold"
CONTRACT_PREFIXES = ("SM_", "AWS_", "SAGEMAKER_", "FOLD", "STAGE")
NOT_FORWARDED = ("content-length", "transfer-encoding", "connection", "content-encoding")


@dataclass
class Job:
    """A training job: its request and status; `details` lists all its secondary statuses so far."""

    request: dict[str, Any]
    folder: Path
    status: str = "InProgress"
    reason: str = ""
    details: list[str] = field(default_factory=lambda: ["Starting"])
    thread: threading.Thread | None = None
    interrupted: bool = False
    stopped: bool = False

    @property
    def name(self) -> str:
        return self.request["TrainingJobName"]


@dataclass
class Service:
    """The server: `endpoint` is the value for AWS_ENDPOINT_URL; `calls` lists the actions requested."""

    moto: str
    folder: Path
    endpoint: str = ""
    calls: list[str] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    interrupt_once: str = ""
    """Part of the name of a job that loses its instance once, after its first checkpoint."""
    hold: str = ""
    """Part of the name of jobs that stay at Starting until this is empty again."""
    quota: int = 0
    """Maximum number of running jobs of the account, 0 for no limit; `refused` counts the jobs above it."""
    refused: int = 0
    refuses: str = ""
    """Part of a variable's value that the service rejects; it repeats the value in its response, as SageMaker does."""
    down: int = 0
    """The number of next calls that get a 503."""

    def environ(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def respond(self, call: Request) -> Response:
        """Answer a call on training jobs; forward any other call to moto."""
        action = call.headers.get("X-Amz-Target") or f"s3.{call.method}{'?list' if 'list-type' in call.args else ''}"
        self.calls.append(action)
        if self.down > 0:
            self.down -= 1
            return Response('{"__type": "ServiceUnavailable"}', 503)
        body = call.get_data()
        if action.endswith("TrainingJob"):
            status, result = self.training_job(action, json.loads(body))
            return Response(json.dumps(result), status, content_type="application/x-amz-json-1.1")
        url = f"{self.moto}{call.full_path.removesuffix('?')}"
        moto = requests.request(call.method, url, data=body, headers=dict(call.headers), timeout=60)
        headers = {name: value for name, value in moto.headers.items() if name.lower() not in NOT_FORWARDED}
        return Response(moto.content, moto.status_code, headers)

    def training_job(self, action: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = request["TrainingJobName"]
        arn = {"TrainingJobArn": f"arn:aws:sagemaker:eu-central-1:123456789012:training-job/{name}"}
        if action == "SageMaker.CreateTrainingJob":
            if self.quota and sum(job.status == "InProgress" for job in self.jobs.values()) >= self.quota:
                self.refused += 1
                return 400, {"__type": "ResourceLimitExceeded", "message": "the account-level limit is 1 Instances"}
            for variable, value in request["Environment"].items():
                if self.refuses and self.refuses in value:
                    message = f"Value '{value}' at 'environment.{variable}.member' failed to satisfy constraint"
                    return 400, {"__type": "ValidationException", "message": message}
            assert name not in self.jobs, f"two jobs are called {name}"
            job = self.jobs[name] = Job(request, self.folder / name)
            job.thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            job.thread.start()
            return 200, arn
        job = self.jobs[name]
        status = {"TrainingJobStatus": job.status, "SecondaryStatus": job.details[-1], "FailureReason": job.reason}
        return 200, {"TrainingJobName": name, **arn, **{key: value for key, value in status.items() if value}}

    def close(self) -> None:
        """Stop the running jobs and wait for them, so that their folders can be deleted."""
        self.hold = ""
        for job in self.jobs.values():
            job.stopped = True
        for job in self.jobs.values():
            job.thread.join(60)

    def _run(self, job: Job) -> None:
        while self.hold and self.hold in job.name:
            time.sleep(0.05)
        try:
            code = 0 if job.stopped else self._attempt(job)
            while job.interrupted and code == 143 and not job.stopped:
                job.interrupted, self.interrupt_once = False, ""
                job.details += ["Interrupted", "Restarting"]
                code = self._attempt(job)
            failure = job.folder / "output" / "failure"
            ending = "Stopped" if job.stopped else "Failed" if code else "Completed"
            if ending == "Failed":
                message = failure.read_text()[:1024] if failure.is_file() else ""
                job.reason = f"AlgorithmError: {message}, exit code: {code}"
            elif ending == "Completed":
                job.details.append("Uploading")
                self._upload(job)
            job.details.append(ending)
            job.status = ending
        except Exception as error:
            job.status, job.reason = "Failed", f"InternalServerError: {error!r}"
            raise

    def _attempt(self, job: Job) -> int:
        """Run the job's container once, on an instance with only the downloaded files; return the exit code."""
        shutil.rmtree(job.folder, ignore_errors=True)
        job.details.append("Downloading")
        channels = {
            entry["ChannelName"]: entry["DataSource"]["S3DataSource"] for entry in job.request["InputDataConfig"]
        }
        for folder in ("input/config", "input/data", "model", "output/data", "checkpoints"):
            (job.folder / folder).mkdir(parents=True)
        for name, source in channels.items():
            assert self._fetch(source["S3Uri"], job.folder / "input" / "data" / name), f"nothing at {source}"
        checkpoints = job.request.get("CheckpointConfig", {}).get("S3Uri")
        if checkpoints:
            self._fetch(f"{checkpoints}/", job.folder / "checkpoints")
        configs = {
            "inputdataconfig": {name: {"TrainingInputMode": "File"} for name in channels},
            "hyperparameters": job.request.get("HyperParameters", {}),
            "resourceconfig": {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"},
        }
        for name, config in configs.items():
            (job.folder / f"input/config/{name}.json").write_text(json.dumps(config))
        job.details.append("Training")
        code = self._run_container(job)
        if checkpoints:
            self._mirror(job.folder / "checkpoints", checkpoints)
        return code

    def _run_container(self, job: Job) -> int:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(CONTRACT_PREFIXES)}
        inherited |= {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "SAGEMAKER_BASE_DIR": str(job.folder)}
        environ = inherited | {"TRAINING_JOB_NAME": job.name} | job.request.get("Environment", {})
        command = [sys.executable, "-m", "jobs", "train"]
        with open(job.folder / "log", "w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=job.folder, env=environ, stdout=log, stderr=log)
            is_signalled = False
            while process.poll() is None:
                time.sleep(0.05)
                if self.interrupt_once and self.interrupt_once in job.name:
                    job.interrupted = job.interrupted or any((job.folder / "checkpoints").rglob("*.pt"))
                if (job.stopped or job.interrupted) and not is_signalled:
                    is_signalled = True
                    process.send_signal(signal.SIGTERM)
            log.seek(0)
            self._log(job, [line.rstrip("\n") for line in log if line.strip()])
        return process.returncode

    def _fetch(self, url: str, folder: Path) -> int:
        """Download all objects with this key prefix, named by what follows the prefix's last slash; return their number."""
        bucket, prefix = Bucket(self.moto, urlsplit(url).netloc), urlsplit(url).path.lstrip("/")
        keys = bucket.listed(prefix)
        for key in keys:
            path = folder / key[prefix.rfind("/") + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bucket.read(key))
        return len(keys)

    def _mirror(self, folder: Path, url: str) -> None:
        bucket, prefix = Bucket(self.moto, urlsplit(url).netloc), urlsplit(url).path.strip("/")
        for key in bucket.listed(f"{prefix}/"):
            bucket.delete(key)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            bucket.write(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def _upload(self, job: Job) -> None:
        config = job.request["OutputDataConfig"]
        packed = job.folder / "packed"
        packed.mkdir()
        for name, folder in (("model", job.folder / "model"), ("output", job.folder / "output" / "data")):
            if config["CompressionType"] == "NONE":
                folder.rename(packed / ("data" if name == "output" else name))
            else:
                with tarfile.open(packed / f"{name}.tar.gz", "w:gz") as archive:
                    archive.add(folder, ".")
        self._mirror(packed, f"{config['S3OutputPath']}/{job.name}/output")

    def _log(self, job: Job, lines: list[str]) -> None:
        logs = boto3.Session().client("logs", endpoint_url=self.moto)  # its own session, for its own thread
        with suppress(logs.exceptions.ResourceAlreadyExistsException):
            logs.create_log_group(logGroupName=LOG_GROUP)
        stream = {"logGroupName": LOG_GROUP, "logStreamName": f"{job.name}/algo-1-{time.time_ns()}"}
        logs.create_log_stream(**stream)
        events = [{"timestamp": int(time.time() * 1000), "message": line} for line in lines]
        if events:
            logs.put_log_events(**stream, logEvents=events)


class Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: object) -> None:
        """Log nothing: `Service.calls` records the calls."""


def arguments(bucket: Bucket, folder: Path, *more: str) -> list[str]:
    """Return arguments of `submit` for jobs with outputs in `bucket` and a run in `folder`/runs."""
    keys = ["platform=sagemaker", "run=r", f"runs={folder / 'runs'}", f"sagemaker.output=s3://{bucket.name}/runs"]
    keys += [f"sagemaker.image={IMAGE}", f"sagemaker.role={ROLE}", "sagemaker.instance_type=ml.m5.large"]
    return [*keys, "sagemaker.poll_seconds=0.1", *more]


@contextmanager
def serving(moto: str, folder: Path) -> Iterator[Service]:
    """Run the service in front of moto's server at `moto`."""
    service = Service(moto, folder)
    server = make_server("127.0.0.1", 0, Request.application(service.respond), threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    service.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        service.close()
