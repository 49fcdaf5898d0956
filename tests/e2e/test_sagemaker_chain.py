"""The whole run as SageMaker's jobs, each really run: the same bytes as on this machine, packed or plain, interrupted or not."""

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
"""What each call needs."""


@pytest.fixture
def service(bucket: Bucket, digits: Path, tmp_path: Path) -> Iterator[Service]:
    """A service whose bucket holds the digits."""
    with serving(bucket.endpoint, tmp_path / "service") as found:
        archive = Path(shutil.make_archive(str(tmp_path / "train"), "zip", digits / "train"))
        bucket.write("data/train.zip", archive.read_bytes())
        for path in (digits / "test").iterdir():
            bucket.write(f"data/test/{path.name}", path.read_bytes())
        yield found


def asked(bucket: Bucket, tmp_path: Path, *more: str) -> list[str]:
    data = f"s3://{bucket.name}/data"
    given = [f"train={data}/train.zip", f"eval={data}/test/", f"ground_truth={data}/test/gt.csv", "parallel=2"]
    return arguments(bucket, tmp_path, *given, "sagemaker.environment={OMP_NUM_THREADS='1'}", *more)


def fetched(bucket: Bucket, service: Service, folder: Path) -> Path:
    """What the jobs wrote to the bucket, as a run's folder on this machine."""
    for name, job in service.jobs.items():
        place = job.request["OutputDataConfig"]["S3OutputPath"].removeprefix(f"s3://{bucket.name}/")
        step = re.sub(r"^fivefold-r-|-\d{14}$", "", name)
        for key in bucket.listed(f"{place}/{name}/output/"):
            inside = key.removeprefix(f"{place}/{name}/output/")
            target = folder / step / inside.replace("data/", "output/", 1)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bucket.read(key))
            if inside.endswith(".tar.gz"):
                shutil.unpack_archive(target, folder / step / inside.removesuffix(".tar.gz"))
    return folder


@pytest.mark.parametrize("compress", ["true", "false"])
def test_the_whole_run_is_the_same_bytes(
    compress: str, service: Service, bucket: Bucket, small_run: Path, tmp_path: Path
) -> None:
    # without compression only the files' form differs, and the stages that read and write each form tell that
    steps = STEPS if compress == "true" else STEPS[:4]
    some = [] if compress == "true" else ["stages=split,train-fold,ensemble"]
    ended = submit(asked(bucket, tmp_path, f"sagemaker.compress_outputs={compress}", *some), service.environ())
    assert ended.returncode == 0, ended.stdout
    assert len(service.jobs) == len(steps)
    there = fetched(bucket, service, tmp_path / "there")
    assert len(list(there.rglob("*.tar.gz"))) == (2 * len(steps) if compress == "true" else 0)
    assert differing(there, small_run, steps) == []
    assert f"results: s3://{bucket.name}/runs/r/" in ended.stdout
    # the caller's policy allows what it called, and nothing that it did not
    allowed = {action for each in json.loads(POLICY.read_text())["Statement"] for action in each["Action"]}
    called = {ACTIONS[call] for call in service.calls}
    assert called <= allowed
    assert allowed - called == {
        "iam:PassRole", "sagemaker:AddTags", "sagemaker:StopTrainingJob", "s3:DeleteObject", "sagemaker:ListPipelines",
        "sagemaker:CreatePipeline", "sagemaker:UpdatePipeline", "sagemaker:StartPipelineExecution",
    }  # fmt: skip


def test_a_spot_instance_that_is_taken_back_loses_nothing(
    service: Service, bucket: Bucket, small_run: Path, tmp_path: Path
) -> None:
    service.interrupt_once = "fold-1"
    given = ["stages=split,train-fold", "sagemaker.spot=true", "train.checkpoint_steps=2"]
    ended = submit(asked(bucket, tmp_path, *given), service.environ())
    assert ended.returncode == 0, ended.stdout
    (details,) = [job.details for name, job in service.jobs.items() if "fold-1" in name]
    assert details[1:6] == ["Downloading", "Training", "Interrupted", "Restarting", "Downloading"]
    assert "[fold-1] " in ended.stdout
    assert re.search(r"fold 1 .* after step \d+ of epoch", ended.stdout)
    there = fetched(bucket, service, tmp_path / "there")
    # the settings in model.json say checkpoint_steps=2, and nothing else differs
    assert differing(there, small_run, ("fold-0", "fold-1")) == [f"fold-{fold}/model/model.json" for fold in (0, 1)]
    assert not [key for key in bucket.listed("runs/r/checkpoints/") if key.endswith(".pt")]
