"""Jobs at SageMaker: what is sent, waited for, found again, refused; against moto's server and one that runs the jobs."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from PIL import Image

from fivefold.errors import DataError, FivefoldError, MissingInputError, RetryableError, SettingsError
from fivefold.launchers.sagemaker.client import JobStatus, translate_errors
from fivefold.launchers.sagemaker.launch import variables_digest
from reference_run import REPOSITORY, wait_until
from s3_server import Bucket
from sagemaker_service import Service, arguments, serving


@pytest.fixture
def service(bucket: Bucket, tmp_path: Path) -> Iterator[Service]:
    """A service with a bucket that holds six drawn images of each of two classes."""
    with serving(bucket.endpoint, tmp_path / "service") as found:
        for number in range(12):
            path = tmp_path / f"{number}.png"
            Image.new("L", (4, 4), number * 20).save(path)
            bucket.write(f"train/{'ab'[number % 2]}/{number}.png", path.read_bytes())
        yield found


def asked(bucket: Bucket, tmp_path: Path, *more: str) -> list[str]:
    return arguments(bucket, tmp_path, f"train=s3://{bucket.name}/train", "split.folds=3", *more)


def command(service: Service, *given: str, **variables: str) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ = {**own, **service.environ(), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "jobs", "submit", *given], cwd=REPOSITORY, env=environ, **pipes)


def submit(service: Service, *given: str, **variables: str) -> tuple[int, str]:
    """The exit code of `submit`, and all that it said."""
    process = command(service, *given, **variables)
    said, _ = process.communicate(timeout=180)
    return process.returncode, said


@pytest.mark.slow
def test_a_job_is_sent_as_it_was_printed_run_and_found_again(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    given = asked(bucket, tmp_path, "stages=split", "sagemaker.tags={team='vision'}", "sagemaker.spot=true")
    given.append("sagemaker.environment={API_TOKEN='canary'}")
    code, printed = submit(service, *given, "--dry-run")
    assert code == 0
    assert service.calls == []
    printed_request = json.loads(printed[printed.index("{") :])["split"]
    assert printed_request["Environment"].pop("API_TOKEN") == "***"

    code, said = submit(service, *given)
    assert code == 0, said
    (job,) = service.jobs.values()
    assert job.request["Environment"].pop("API_TOKEN") == "canary"
    assert job.request | {"TrainingJobName": ""} == printed_request | {"TrainingJobName": ""}
    assert re.fullmatch(r"fivefold-r-split-\d{14}", job.name)
    assert job.details == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    log = (tmp_path / "runs" / "r" / "split" / "log.txt").read_text().splitlines()
    assert log
    assert [line for line in said.splitlines() if line.startswith("[split]")] == [f"[split] {line}" for line in log]
    place = f"runs/r/split/{job.name}/output"
    assert bucket.listed("runs/") == [f"{place}/model.tar.gz", f"{place}/output.tar.gz"]

    # the value is in the request alone: in no file, object or word
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = [path.read_bytes() for path in kept] + [bucket.read(key) for key in bucket.listed("")]
    assert not [text for text in (*found, said.encode(), printed.encode()) if b"canary" in text]
    record = tmp_path / "runs" / "r" / "split" / "sagemaker.json"
    assert record.stat().st_mode & 0o777 == 0o600
    assert "API_TOKEN" in record.read_text()

    # another value, or none, is another request
    code, said = submit(service, *given, "sagemaker.environment={API_TOKEN='parakeet'}")
    assert code == SettingsError.exit_code
    assert "Environment" in said
    assert "parakeet" not in said

    # another instance makes the same result, another seed does not
    code, said = submit(service, *given, "sagemaker.stages.split.instance_type=ml.c5.xlarge")
    assert code == 0
    code, said = submit(service, *given, "split.seed=7")
    assert code == SettingsError.exit_code
    assert "HyperParameters" in said
    assert len(service.jobs) == 1


@pytest.mark.slow
def test_a_signal_leaves_the_job_which_is_found_again(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    service.hold = "split"
    given = asked(bucket, tmp_path, "stages=split")
    process = command(service, *given)
    wait_until(lambda: "SageMaker.DescribeTrainingJob" in service.calls)
    (job,) = service.jobs.values()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"aws sagemaker stop-training-job --training-job-name {job.name}" in said
    assert not job.stopped

    # it cannot be waited for as something else
    code, said = submit(service, *given, "split.seed=7")
    assert code == SettingsError.exit_code
    assert "HyperParameters" in said

    # the service is away for a while, the job goes on and is stopped
    process = command(service, *given)
    service.calls.clear()
    wait_until(lambda: service.calls.count("SageMaker.DescribeTrainingJob") > 2)
    service.down = 12
    wait_until(lambda: service.down == 0)
    assert process.poll() is None
    job.stopped = True
    service.hold = ""
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert len(service.jobs) == 1


@pytest.mark.slow
def test_a_failure_has_its_reason_and_its_exit_code(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("train/a/0.png", b"no image")
    code, said = submit(service, *asked(bucket, tmp_path, "stages=split,train-fold"))
    assert code == DataError.exit_code, said
    (job,) = service.jobs.values()
    assert re.search(rf"split failed \(exit code 65\): job {job.name}: AlgorithmError: .*0\.png", said)
    bucket.write(f"runs/r/split/{job.name}/output/output.tar.gz", b"what a failed job may leave")

    # mended, the same command starts it anew; a quota lets one fold wait for another
    bucket.delete("train/a/0.png")
    service.hold, service.quota = "r-fold", 1
    process = command(service, *asked(bucket, tmp_path, "stages=split,train-fold"))
    wait_until(lambda: service.refused)
    (_, split, first) = service.jobs.values()
    assert not bucket.listed(f"runs/r/split/{job.name}/")
    assert split.status == "Completed"
    first.stopped = True
    service.hold = ""
    wait_until(lambda: len(service.jobs) > 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert "ResourceLimitExceeded" in said
    assert process.returncode == 130


def test_what_another_job_left_is_not_mixed_in(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    place = "runs/r/split/fivefold-r-split-1/output/output.tar.gz"
    bucket.write(place, b"another's")
    code, said = submit(service, *asked(bucket, tmp_path, "stages=split"))
    assert code == SettingsError.exit_code
    assert place in said
    assert not service.jobs


def test_a_value_that_the_service_refuses_is_not_repeated(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    service.refuses = "canary"
    given = asked(bucket, tmp_path, "stages=split", "sagemaker.environment={API_TOKEN='canary-1234'}")
    code, said = submit(service, *given)
    assert code == SettingsError.exit_code
    assert "API_TOKEN" in said
    assert "***" in said
    assert "canary" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


def test_without_credentials_it_says_so_before_anything_starts(
    service: Service, bucket: Bucket, tmp_path: Path
) -> None:
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    code, said = submit(service, *asked(bucket, tmp_path, "stages=split"), **nothing)
    assert code == SettingsError.exit_code, said
    assert "AWS_PROFILE" in said
    assert "Traceback" not in said
    assert not service.jobs


def test_a_pipeline_is_created_then_updated(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    given = asked(bucket, tmp_path, "--pipeline")
    code, said = submit(service, *given)
    assert code == 0, said
    assert "arn:aws:sagemaker:eu-central-1:123456789012:pipeline/fivefold-r" in said
    client = service.client("sagemaker")
    stored = client.describe_pipeline(PipelineName="fivefold-r")
    _, printed = submit(service, *given, "--dry-run")
    assert json.loads(stored["PipelineDefinition"]) == json.loads(printed[printed.index("{") :])

    code, said = submit(service, *given, "train.epochs=5", "parallel=2")
    assert code == 0, said
    stored = client.describe_pipeline(PipelineName="fivefold-r")
    assert '"train__epochs": "5"' in stored["PipelineDefinition"]
    actions = ("ListPipelines", "CreatePipeline", "ListPipelines", "UpdatePipeline")
    assert service.calls == [f"SageMaker.{action}" for action in actions]
    assert not (tmp_path / "runs").exists()


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
def test_how_a_job_ended_is_an_exit_code(status: str, detail: str, reason: str, code: int | None) -> None:
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
def test_an_error_of_the_service_is_one_of_ours(code: str, status: int, expected: type[FivefoldError]) -> None:
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(expected, match=f"{code}.*CreateTrainingJob"), translate_errors():
        raise ClientError(answer, "CreateTrainingJob")


def test_what_is_kept_of_variables_tells_other_values_and_holds_none() -> None:
    variables = {"STAGE": "split", "API_TOKEN": "canary"}
    kept = variables_digest(variables)
    assert kept["names"] == sorted(variables)
    assert "canary" not in json.dumps(kept)
    assert kept != variables_digest({**variables, "API_TOKEN": "other"})
