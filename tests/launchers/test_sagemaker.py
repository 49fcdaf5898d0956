"""Jobs at SageMaker: what is sent, waited for, found again, refused; against moto's server and one that runs the jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fivefold.errors import DataError, RetryableError, SettingsError
from fivefold.launchers.sagemaker.service import Look
from s3_server import Bucket
from sagemaker_service import ROLE, Service, serving

REPOSITORY = Path(__file__).parents[2]
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/fivefold:1"


@pytest.fixture
def service(bucket: Bucket, tmp_path: Path) -> Iterator[Service]:
    """A service with a bucket that holds six drawn images of each of two classes."""
    with serving(bucket.endpoint, tmp_path / "service") as found:
        for number in range(12):
            path = tmp_path / f"{number}.png"
            Image.new("L", (4, 4), number * 20).save(path)
            bucket.write(f"train/{'ab'[number % 2]}/{number}.png", path.read_bytes())
        yield found


def arguments(bucket: Bucket, tmp_path: Path, *more: str) -> list[str]:
    given = ["platform=sagemaker", f"train=s3://{bucket.name}/train", f"runs={tmp_path / 'runs'}", "run=r"]
    given += [f"sagemaker.image={IMAGE}", f"sagemaker.role={ROLE}", f"sagemaker.output=s3://{bucket.name}/runs"]
    return [*given, "sagemaker.instance_type=ml.m5.large", "sagemaker.poll_seconds=0.2", "split.folds=3", *more]


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
def test_a_job_is_sent_by_the_sdk_as_it_was_printed_run_and_found_again(
    service: Service, bucket: Bucket, tmp_path: Path
) -> None:
    given = arguments(
        bucket,
        tmp_path,
        "stages=split",
        "sagemaker.tags={team='vision'}",
        "sagemaker.spot=true",
        "sagemaker.subnets=subnet-1",
        "sagemaker.security_groups=sg-1",
        "sagemaker.kms_key=alias/out",
        "sagemaker.volume_kms_key=1234",
        "sagemaker.isolate=true",
    )
    code, printed = submit(service, *given, "--dry-run")
    assert code == 0
    assert service.calls == []
    asked = json.loads(printed[printed.index("{") :])["split"]

    code, said = submit(service, *given)
    assert code == 0, said
    (job,) = service.jobs.values()
    sent = {name: value for name, value in job.request.items() if name != "TrainingJobName"}
    assert sent == {name: value for name, value in asked.items() if name != "TrainingJobName"}
    assert re.fullmatch(r"fivefold-r-split-\d{14}", job.request["TrainingJobName"])
    assert job.details == ["Downloading", "Training", "Uploading", "Completed"]
    assert "[split] " in said  # its log was followed
    assert "split: Completed, Completed" in said
    place = f"runs/r/split/{job.request['TrainingJobName']}/output"
    assert bucket.listed("runs/") == [f"{place}/model.tar.gz", f"{place}/output.tar.gz"]

    code, said = submit(service, *given, "sagemaker.stages.split.instance_type=ml.c5.xlarge")
    assert code == 0
    assert "nothing to do" in said
    assert len(service.jobs) == 1

    code, said = submit(service, *given, "split.seed=7")
    assert code == SettingsError.exit_code
    assert "HyperParameters differ" in said
    assert "choose another run=" in said
    assert len(service.jobs) == 1


@pytest.mark.slow
def test_a_fold_with_everything_is_sent_as_it_was_printed(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    """What the SDK makes of a fold's request, which has metrics and checkpoints; its job waits until it is stopped."""
    code, said = submit(service, *arguments(bucket, tmp_path, "stages=split"))
    assert code == 0, said
    service.hold = "fold-1"
    given = arguments(bucket, tmp_path, "stages=train-fold", "folds=1", "sagemaker.keep_alive_minutes=5")
    code, printed = submit(service, *given, "--dry-run")
    assert code == 0, printed
    process = command(service, *given)
    wait_until(lambda: len(service.jobs) == 2)
    (_, job) = service.jobs.values()
    asked = json.loads(printed[printed.index("{") :])["fold-1"]
    assert job.request | {"TrainingJobName": ""} == asked | {"TrainingJobName": ""}
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"aws sagemaker stop-training-job --training-job-name {job.request['TrainingJobName']}" in said
    assert not job.stopped

    looks = service.calls.count("SageMaker.DescribeTrainingJob")
    # another command of the same run takes the split as done, and waits for the fold again
    process = command(service, *arguments(bucket, tmp_path, "folds=1", "sagemaker.keep_alive_minutes=5"))
    wait_until(lambda: service.calls.count("SageMaker.DescribeTrainingJob") > looks + 2)
    service.answer(
        "SageMaker.StopTrainingJob", json.dumps({"TrainingJobName": job.request["TrainingJobName"]}).encode()
    )
    service.hold = ""
    said, _ = process.communicate(timeout=120)
    assert "split: nothing to do" in said
    assert "fold-1: waits for job" in said
    assert process.returncode == 143, said
    assert len(service.jobs) == 2


def wait_until(is_so: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_failure_has_its_reason_and_its_exit_code(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("train/a/0.png", b"no image")
    code, said = submit(service, *arguments(bucket, tmp_path, "stages=split,train-fold"))
    assert code == DataError.exit_code, said
    assert re.search(r"split failed \(exit code 65\), job fivefold-r-split-\d+: AlgorithmError: .*0\.png", said)
    assert "fold-0 was not started: it needs split" in said
    assert len(service.jobs) == 1

    # mended, the same command starts it anew
    bucket.delete("train/a/0.png")
    time.sleep(1)  # names of jobs end with the second
    code, said = submit(service, *arguments(bucket, tmp_path, "stages=split"))
    assert code == 0, said
    assert len(service.jobs) == 2


def test_what_another_job_left_is_not_mixed_in(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("runs/r/split/fivefold-r-split-1/output/output.tar.gz", b"another's")
    code, said = submit(service, *arguments(bucket, tmp_path, "stages=split"))
    assert code == SettingsError.exit_code
    assert "of a job that this folder of runs does not know" in said
    assert not service.jobs


@pytest.mark.slow
def test_a_service_that_is_away_for_a_while_is_waited_for(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    service.hold = "split"
    process = command(service, *arguments(bucket, tmp_path, "stages=split"))
    wait_until(lambda: "SageMaker.DescribeTrainingJob" in service.calls)
    service.down = 12
    wait_until(lambda: service.down == 0)
    service.hold = ""
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_a_quota_lets_a_job_wait_for_those_that_run(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    code, said = submit(service, *arguments(bucket, tmp_path, "stages=split"))
    assert code == 0, said
    service.hold, service.quota = "fold", 1
    process = command(service, *arguments(bucket, tmp_path, "stages=train-fold"))
    wait_until(lambda: service.refused)
    (_, first) = service.jobs.values()
    service.answer(
        "SageMaker.StopTrainingJob", json.dumps({"TrainingJobName": first.request["TrainingJobName"]}).encode()
    )
    service.hold = ""
    wait_until(lambda: len(service.jobs) > 2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert "waits: CreateTrainingJob" in said
    assert "ResourceLimitExceeded" in said
    assert process.returncode == 130


def test_without_credentials_it_says_so_before_anything_starts(
    service: Service, bucket: Bucket, tmp_path: Path
) -> None:
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    code, said = submit(service, *arguments(bucket, tmp_path, "stages=split"), **nothing)
    assert code == SettingsError.exit_code, said
    assert "no credentials" in said
    assert "Traceback" not in said
    assert not service.jobs


def test_a_pipeline_is_created_then_updated(service: Service, bucket: Bucket, tmp_path: Path) -> None:
    given = arguments(bucket, tmp_path, "--pipeline")
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
    assert [call for call in service.calls if "Pipeline" in call] == [
        "SageMaker.ListPipelines", "SageMaker.CreatePipeline", "SageMaker.ListPipelines", "SageMaker.UpdatePipeline",
    ]  # fmt: skip
    assert not service.jobs
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("status", "detail", "reason", "code"),
    [
        ("Completed", "Completed", "", 0),
        ("Failed", "Failed", "AlgorithmError: no folds.parquet, exit code: 66", 66),
        ("Failed", "Failed", "AlgorithmError: exit code: 137", 1),
        ("Failed", "Failed", "CapacityError: unable to provision", 1),
        ("Stopped", "Stopped", "", 143),
        ("Stopped", "MaxRuntimeExceeded", "", RetryableError.exit_code),
        ("Stopped", "MaxWaitTimeExceeded", "", RetryableError.exit_code),
    ],
)
def test_how_a_job_ended_is_an_exit_code(status: str, detail: str, reason: str, code: int) -> None:
    assert Look(status, detail, reason).exit_code == code
