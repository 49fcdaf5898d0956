"""SageMaker jobs: requests, waiting, reuse and refusals, against moto's server and a server that runs the jobs."""

import io
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from fivefold.errors import DataError, FivefoldError, MissingInputError, RetryableError, SettingsError
from fivefold.launchers.sagemaker.training_jobs import JobStatus, translate_errors
from jobs import submit
from reference_run import act_when, interrupt, start_submit, wait_until
from s3_server import Bucket
from sagemaker_service import Service, arguments, serving
from toy_data import noise_in


@pytest.fixture
def service(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service for this process, with a bucket that holds six generated images for each of two classes."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with serving(bucket.endpoint, tmp_path / "service") as running_service:
        for name, value in running_service.environ().items():
            monkeypatch.setenv(name, value)
        noise_in(tmp_path / "train", ("a", "b"), 6)
        for path in (tmp_path / "train").rglob("*.png"):
            bucket.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
        yield running_service


def make_arguments(bucket: Bucket, tmp_path: Path, *overrides: str) -> list[str]:
    return arguments(bucket, tmp_path, f"train=s3://{bucket.name}/train", "split.folds=3", "check=false", *overrides)


def run_submit(*args: str) -> tuple[int, str]:
    """Run `submit` in this process. Return its exit code and its output, with the message of an error."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        try:
            code = submit.main(args)
        except FivefoldError as error:
            code = error.exit_code
            print(error)
    return code, output.getvalue()


def test_job_matches_the_printed_request_runs_and_is_reused(service, bucket, tmp_path):
    args = make_arguments(bucket, tmp_path, "stages=split", "sagemaker.tags={team='vision'}", "sagemaker.spot=true")
    args.append("sagemaker.environment={API_TOKEN='canary'}")
    code, printed = run_submit(*args, "--dry-run")
    assert code == 0
    assert service.calls == []
    printed_request = json.loads(printed[printed.index("{") :])["split"]
    assert printed_request["Environment"].pop("API_TOKEN") == "***"

    code, output = run_submit(*args)
    assert code == 0, output
    (job,) = service.jobs.values()
    assert job.request["Environment"].pop("API_TOKEN") == "canary"
    assert job.request | {"TrainingJobName": ""} == printed_request | {"TrainingJobName": ""}
    assert re.fullmatch(r"fivefold-r-split-\d{14}", job.name)
    assert job.details == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    title, *log = (tmp_path / "runs" / "r" / "split" / "log.txt").read_text().splitlines()
    assert title.endswith(f" job {job.name}")
    assert log
    assert [line for line in output.splitlines() if line.startswith("[split]")] == [f"[split] {line}" for line in log]
    prefix = f"runs/r/split/{job.name}/output"
    assert bucket.listed("runs/") == [f"{prefix}/model.tar.gz", f"{prefix}/output.tar.gz"]

    # only the request contains the value: no file, object or output does
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files] + [bucket.read(key) for key in bucket.listed("")]
    assert not [content for content in (*contents, output.encode(), printed.encode()) if b"canary" in content]
    record = tmp_path / "runs" / "r" / "split" / "sagemaker.json"
    assert record.stat().st_mode & 0o777 == 0o600
    assert "API_TOKEN" in record.read_text()

    # another value, or none, makes another request
    code, output = run_submit(*args, "sagemaker.environment={API_TOKEN='parakeet'}")
    assert code == SettingsError.exit_code
    assert "Environment" in output
    assert "parakeet" not in output

    # another instance type gives the same result
    code, output = run_submit(*args, "sagemaker.stages.split.instance_type=ml.c5.xlarge")
    assert code == 0
    assert len(service.jobs) == 1


def test_signal_leaves_the_job_running_and_the_next_submit_follows_it(service, bucket, tmp_path):
    service.hold = "split"
    args = make_arguments(bucket, tmp_path, "stages=split")
    process = start_submit(*args)
    wait_until(lambda: "SageMaker.DescribeTrainingJob" in service.calls)
    (job,) = service.jobs.values()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"aws sagemaker stop-training-job --training-job-name {job.name}" in output
    assert not job.stopped

    # a submit with other settings cannot wait for it
    code, output = run_submit(*args, "split.seed=7")
    assert code == SettingsError.exit_code
    assert "HyperParameters" in output

    # the service is unreachable for a while; the job continues and is stopped
    def fail_for_a_while_and_stop_the_job() -> None:
        service.down = 6
        wait_until(lambda: service.down == 0)
        job.stopped, service.hold = True, ""

    service.calls.clear()
    with act_when(lambda: service.calls.count("SageMaker.DescribeTrainingJob") > 2, fail_for_a_while_and_stop_the_job):
        assert run_submit(*args)[0] == 143
    assert len(service.jobs) == 1


@pytest.mark.slow
def test_failure_reports_its_reason_and_its_exit_code(service, bucket, tmp_path):
    bucket.write("train/a/0.png", b"no image")
    code, output = run_submit(*make_arguments(bucket, tmp_path, "stages=split,train-fold"))
    assert code == DataError.exit_code, output
    (job,) = service.jobs.values()
    assert re.search(rf"split failed \(exit code 65\): job {job.name}: AlgorithmError: .*0\.png", output)
    bucket.write(f"runs/r/split/{job.name}/output/output.tar.gz", b"what a failed job may leave")

    # after the fix, the same command starts the job again; a quota makes one fold wait for another
    bucket.delete("train/a/0.png")
    service.hold, service.quota = "r-fold", 1
    with act_when(lambda: service.refused, interrupt):
        code, output = run_submit(*make_arguments(bucket, tmp_path, "stages=split,train-fold"))
    (_, split, _) = service.jobs.values()
    assert not bucket.listed(f"runs/r/split/{job.name}/")
    assert split.status == "Completed"
    assert "ResourceLimitExceeded" in output
    assert code == 130


def test_outputs_of_an_unknown_job_raise_an_error(service, bucket, tmp_path):
    key = "runs/r/split/fivefold-r-split-1/output/output.tar.gz"
    bucket.write(key, b"another's")
    code, output = run_submit(*make_arguments(bucket, tmp_path, "stages=split"))
    assert code == SettingsError.exit_code
    assert key in output
    assert not service.jobs


def test_error_about_a_refused_value_does_not_contain_the_value(service, bucket, tmp_path):
    service.refuses = "canary"
    args = make_arguments(bucket, tmp_path, "stages=split", "sagemaker.environment={API_TOKEN='canary-1234'}")
    code, output = run_submit(*args)
    assert code == SettingsError.exit_code
    assert "API_TOKEN" in output
    assert "***" in output
    assert "canary" not in output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


def test_missing_credentials_are_reported_before_anything_starts(service, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it may have the credentials of another test
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")
    code, output = run_submit(*make_arguments(bucket, tmp_path, "stages=split"))
    assert code == SettingsError.exit_code, output
    assert "AWS_PROFILE" in output
    assert not service.jobs


@pytest.mark.parametrize(
    ("status", "detail", "reason", "code"),
    [
        ("Stopping", "Stopping", "", None),
        ("Completed", "Completed", "", 0),
        ("Failed", "Failed", "AlgorithmError: no folds.parquet, exit code: 66", MissingInputError.exit_code),
        ("Failed", "Failed", "AlgorithmError: exit code: 137", 1),
        ("Stopped", "Stopped", "", 143),
        ("Stopped", "MaxRuntimeExceeded", "", RetryableError.exit_code),
    ],
)
def test_job_status_maps_to_an_exit_code(status, detail, reason, code):
    assert JobStatus(status, detail, reason).exit_code == code


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDeniedException", 400, SettingsError),
        ("ThrottlingException", 400, RetryableError),
        ("Unknown", 503, RetryableError),
        ("ResourceNotFoundException", 400, MissingInputError),
    ],
)
def test_service_errors_are_translated_to_fivefold_errors(code, status, expected):
    response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(expected, match=f"{code}.*CreateTrainingJob"), translate_errors():
        raise ClientError(response, "CreateTrainingJob")
