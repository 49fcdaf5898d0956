"""The Jobs of `k8s/`: each container spec runs on the Docker engine and writes the same bytes as a local run."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from docker_helpers import ONE_THREAD, ROOT, SETTINGS, as_arguments, differing
from fake_kubelet import Node
from fivefold.contract.files import read_json
from fivefold.launchers.kubernetes import launch as kubernetes
from fivefold.launchers.plan import Inputs, make_plan
from kubernetes_schemas import read

pytestmark = pytest.mark.docker

STAGES = ("split", "train-folds", "ensemble", "evaluate")
TRAINED_FOLD = 3


@pytest.fixture(scope="module")
def claim(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Path]:
    """A claim with the digits at the paths that the Jobs read."""
    folder = tmp_path_factory.mktemp("node") / "claim"
    shutil.copytree(digits / "train", folder / "data" / "train")
    shutil.copytree(digits / "test", folder / "data" / "eval")
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def node(claim: Path, image: str) -> Node:
    return Node(claim, image)


def read_job(stage: str) -> dict[str, Any]:
    """Read a Job's file and set the demo recipe, few epochs and one thread."""
    job = deepcopy(read(ROOT / "k8s" / f"{stage}-job.yaml")[-1])
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][1:] == ["recipe=small_images"]
    training = as_arguments(SETTINGS) if container["args"][0] in ("train-fold", "distill") else []
    container["args"][1:] = ["recipe=demo", *training]
    container["env"] += [{"name": name, "value": value} for name, value in ONE_THREAD.items()]
    return job


def test_pods_write_the_same_results_as_the_local_run(node, claim, local_run):
    """One pod of each stage; the other folds are those of the local run."""
    run = claim / "runs" / "first"
    for stage in STAGES:
        pod = node.run(read_job(stage), TRAINED_FOLD if stage == "train-folds" else None)
        assert (pod.code, pod.message) == (0, ""), pod.log[-3000:]
        if stage == "train-folds":
            written = [path for path in run.parent.rglob("*") if path.is_file()]
            assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(10001, 10001)}
            for fold in {*range(5)} - {TRAINED_FOLD}:
                shutil.copytree(local_run / f"fold-{fold}", run / f"fold-{fold}")
    model = read_json(run / f"fold-{TRAINED_FOLD}" / "model" / "model.json")
    assert "kubernetes" not in model["settings"], "the platform is no part of a model"
    assert differing(run, local_run, ("split", f"fold-{TRAINED_FOLD}", "ensemble")) == []
    metrics = read_json(run / "evaluate/output/metrics.json")
    assert metrics == read_json(local_run / "evaluate/output/metrics.json")
    assert metrics["test"]["n"] == 360


def test_data_volume_is_read_only(node):
    job = read_job("split")
    job["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": "SM_OUTPUT_DATA_DIR", "value": "/data/out"})
    pod = node.run(job)
    assert pod.code == 64
    assert "/data/out" in pod.message.splitlines()[0]


def test_loader_pod_accepts_data_from_kubectl_cp(node):
    """`kubectl cp` runs tar as the pod's user, into a folder of the claim."""
    spec = deepcopy(read(ROOT / "k8s" / "loader-pod.yaml")[-1]["spec"])
    copy = "cd /tmp && echo 1 >a && tar -cf - a | tar -xmf - -C /data && cat /data/a"
    spec["containers"][0]["command"] = ["sh", "-c", copy]
    pod = node.run({"metadata": {"name": "loader"}, "spec": {"template": {"spec": spec}}})
    assert (pod.code, pod.log) == (0, "1\n")
    assert (node.claim / "data" / "a").stat().st_uid == 10001


def test_jobs_with_a_bucket_need_no_claim(claim, image, bucket):
    train = claim / "data" / "train"
    for path in sorted(train.rglob("*.png"))[::6]:
        bucket.write(f"data/train/{path.relative_to(train)}", path.read_bytes())
    url = f"s3://{bucket.name}"
    settings = ["split.folds=2", f"kubernetes.runs_path={url}/runs", "kubernetes.gpus=0", *as_arguments(SETTINGS)]
    plan = make_plan(Inputs(f"{url}/data/train"), settings, run="first", recipe="demo")
    objects = kubernetes.objects(plan)
    assert {manifest["kind"] for manifest in objects} == {"Job"}
    # the server is on this machine's loopback
    host_node = Node(claim, image, {"fivefold-s3": bucket.environ()}, network="host")
    split, folds, *_ = objects
    for job, index in ((split, None), (folds, 1)):
        pod = host_node.run(job, index)
        assert pod.code == 0, pod.log[-3000:]
    weights = [key for key in bucket.listed("runs/first/fold-1/model/") if key.endswith("/model.safetensors")]
    assert len(weights) == 1
