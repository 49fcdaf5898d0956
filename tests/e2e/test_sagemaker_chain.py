"""A complete run as SageMaker jobs that really run: the same bytes as the local run, compressed or not, interrupted or not."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from docker_helpers import differing
from reference_run import STEPS, submit
from s3_server import Bucket
from sagemaker_service import Service, arguments, serving

pytestmark = pytest.mark.slow
POLICY = Path(__file__).parents[2] / "docs" / "sagemaker-caller-policy.json"
ACTIONS = {
    "SageMaker.CreateTrainingJob": "sagemaker:CreateTrainingJob",
    "SageMaker.DescribeTrainingJob": "sagemaker:DescribeTrainingJob",
    "Logs_20140328.DescribeLogStreams": "logs:DescribeLogStreams",
    "Logs_20140328.GetLogEvents": "logs:GetLogEvents",
    "s3.GET?list": "s3:ListBucket",
}
"""The IAM action that each call needs."""


@pytest.fixture
def service(bucket: Bucket, digits: Path, tmp_path: Path) -> Iterator[Service]:
    """A service whose bucket holds the digits."""
    with serving(bucket.endpoint, tmp_path / "service") as sagemaker:
        archive = Path(shutil.make_archive(str(tmp_path / "train"), "zip", digits / "train"))
        bucket.write("data/train.zip", archive.read_bytes())
        for path in (digits / "test").iterdir():
            bucket.write(f"data/test/{path.name}", path.read_bytes())
        yield sagemaker


def make_arguments(bucket: Bucket, tmp_path: Path, *more: str) -> list[str]:
    data = f"s3://{bucket.name}/data"
    inputs = [f"train={data}/train.zip", f"eval={data}/test/", f"ground_truth={data}/test/gt.csv", "parallel=2"]
    return arguments(bucket, tmp_path, *inputs, "sagemaker.environment={OMP_NUM_THREADS='1'}", *more)


def download_run(bucket: Bucket, service: Service, folder: Path) -> Path:
    """Download what the jobs wrote to the bucket into a local run folder."""
    for name, job in service.jobs.items():
        prefix = job.request["OutputDataConfig"]["S3OutputPath"].removeprefix(f"s3://{bucket.name}/")
        step = re.sub(r"^fivefold-r-|-\d{14}$", "", name)
        for key in bucket.listed(f"{prefix}/{name}/output/"):
            file = key.removeprefix(f"{prefix}/{name}/output/")
            target = folder / step / file.replace("data/", "output/", 1)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bucket.read(key))
            if file.endswith(".tar.gz"):
                shutil.unpack_archive(target, folder / step / file.removesuffix(".tar.gz"))
    return folder


def test_complete_run_writes_the_same_bytes_as_the_local_run(service, bucket, small_run, tmp_path):
    result = submit(make_arguments(bucket, tmp_path), service.environ())
    assert result.returncode == 0, result.stdout
    assert len(service.jobs) == len(STEPS)
    downloaded = download_run(bucket, service, tmp_path / "there")
    assert len(list(downloaded.rglob("*.tar.gz"))) == 2 * len(STEPS)
    assert differing(downloaded, small_run, STEPS) == []
    assert f"results: s3://{bucket.name}/runs/r/" in result.stdout
    # besides the actions called here, the caller's policy allows only those listed below
    allowed = {action for statement in json.loads(POLICY.read_text())["Statement"] for action in statement["Action"]}
    called = {ACTIONS[call] for call in service.calls}
    assert called <= allowed
    assert allowed - called == {
        "iam:PassRole", "sagemaker:AddTags", "sagemaker:StopTrainingJob", "s3:DeleteObject",
        "sagemaker:CreatePipeline", "sagemaker:UpdatePipeline", "sagemaker:StartPipelineExecution",
    }  # fmt: skip


def test_interrupted_spot_job_resumes_to_the_same_results(service, bucket, small_run, tmp_path):
    """The outputs are plain files, which the ensemble reads too."""
    service.interrupt_once = "fold-1"
    settings = ["stages=split,train-fold,ensemble", "sagemaker.compress_outputs=false", "sagemaker.spot=true"]
    settings += ["train.checkpoint_steps=2"]
    result = submit(make_arguments(bucket, tmp_path, *settings), service.environ())
    assert result.returncode == 0, result.stdout
    (details,) = [job.details for name, job in service.jobs.items() if "fold-1" in name]
    assert details[1:6] == ["Downloading", "Training", "Interrupted", "Restarting", "Downloading"]
    assert "[fold-1] " in result.stdout
    assert re.search(r"fold 1 .* after step \d+ of epoch", result.stdout)
    downloaded = download_run(bucket, service, tmp_path / "there")
    assert not list(downloaded.rglob("*.tar.gz"))
    # model.json differs because it records checkpoint_steps=2; nothing else differs
    assert differing(downloaded, small_run, ("split", "fold-0", "fold-1", "ensemble")) == [
        f"fold-{fold}/model/model.json" for fold in (0, 1)
    ]
    assert not [key for key in bucket.listed("runs/r/checkpoints/") if key.endswith(".pt")]
