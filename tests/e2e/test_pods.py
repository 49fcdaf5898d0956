"""The Jobs of `k8s/` for real: each container spec on the Docker engine, and the same bytes as a run on this machine."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from docker_helpers import ONE_THREAD, ROOT, SETTINGS, as_arguments, differing
from fake_kubelet import Ended, Node
from fivefold.contract.files import read_json
from fivefold.launchers.kubernetes import launch as kubernetes
from fivefold.launchers.plan import Inputs, make_plan
from kubernetes_schemas import read
from s3_server import Bucket

pytestmark = pytest.mark.docker

STAGES = ("split", "train-folds", "ensemble", "evaluate", "distill")


@pytest.fixture(scope="module")
def claim(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Path]:
    """A claim with the digits where the Jobs look for them."""
    folder = tmp_path_factory.mktemp("node") / "claim"
    shutil.copytree(digits / "train", folder / "data" / "train")
    shutil.copytree(digits / "test", folder / "data" / "eval")
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def node(claim: Path, image: str) -> Node:
    return Node(claim, image)


def shipped(stage: str, *more: str) -> dict[str, Any]:
    """A Job as its file has it, but for the recipe, few epochs and the number of threads."""
    job = deepcopy(read(ROOT / "k8s" / f"{stage}-job.yaml")[-1])
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][1:] == ["recipe=small_images"]
    training = as_arguments(SETTINGS) if container["args"][0] in ("train-fold", "distill") else []
    container["args"][1:] = ["recipe=demo", *training, *more]
    container["env"] += [{"name": name, "value": value} for name, value in ONE_THREAD.items()]
    return job


@pytest.fixture(scope="module")
def ran(node: Node) -> dict[str, list[Ended]]:
    """Every stage in order, every index of the folds."""
    found = {}
    for stage in STAGES:
        found[stage] = node.run_all(shipped(stage))
        assert [ended.code for ended in found[stage]] == [0] * len(found[stage]), found[stage][-1].log[-3000:]
    return found


def test_the_run_in_pods_is_the_local_run(ran: dict[str, list[Ended]], claim: Path, here: Path) -> None:
    run = claim / "runs" / "first"
    models = [read_json(run / f"fold-{index}" / "model" / "model.json") for index in range(len(ran["train-folds"]))]
    assert [model["fold"] for model in models] == list(range(5))
    assert not [model for model in models if "kubernetes" in model["settings"]], "where it ran is no part of a model"
    steps = ("split", *(f"fold-{index}" for index in range(5)), "ensemble", "distill")
    assert differing(run, here, steps) == []
    metrics = read_json(run / "evaluate/output/metrics.json")
    assert metrics == read_json(here / "evaluate/output/metrics.json")
    assert metrics["test"]["n"] == 360
    written = [path for path in run.parent.rglob("*") if path.is_file()]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(10001, 10001)}
    assert {each.words for ended in ran.values() for each in ended} == {""}


def test_an_error_that_comes_again_ends_the_index_and_leaves_its_words(node: Node) -> None:
    job = shipped("train-folds", "train.epochs=many")
    ended = node.run(job, index=0)
    rule = job["spec"]["podFailurePolicy"]["rules"][1]
    assert rule["action"] == "FailIndex"
    assert ended.code in rule["onExitCodes"]["values"]
    assert "train.epochs" in ended.words.splitlines()[0], ended.words


def test_data_cannot_be_written(node: Node) -> None:
    job = shipped("split")
    job["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": "SM_OUTPUT_DATA_DIR", "value": "/data/out"})
    ended = node.run(job)
    assert ended.code == 64
    assert "/data/out" in ended.words.splitlines()[0]


def test_data_come_in_by_the_loader(node: Node) -> None:
    """What `kubectl cp` does there: tar, as the pod's user, into a folder of the claim."""
    spec = deepcopy(read(ROOT / "k8s" / "loader-pod.yaml")[-1]["spec"])
    copy = "cd /tmp && echo 1 >a && tar -cf - a | tar -xmf - -C /data && cat /data/a"
    spec["containers"][0]["command"] = ["sh", "-c", copy]
    ended = node.run({"metadata": {"name": "loader"}, "spec": {"template": {"spec": spec}}})
    assert (ended.code, ended.log) == (0, "1\n")
    assert (node.claim / "data" / "a").stat().st_uid == 10001


def test_a_fold_in_a_bucket_has_no_claim(claim: Path, image: str, bucket: Bucket) -> None:
    train = claim / "data" / "train"
    for path in sorted(train.rglob("*.png"))[::6]:
        bucket.write(f"data/train/{path.relative_to(train)}", path.read_bytes())
    at = f"s3://{bucket.name}"
    settings = ["split.folds=2", f"kubernetes.runs_path={at}/runs", "kubernetes.gpus=0", *as_arguments(SETTINGS)]
    plan = make_plan(Inputs(f"{at}/data/train"), settings, run="first", recipe="demo")
    objects = kubernetes.objects(plan)
    assert {one["kind"] for one in objects} == {"Job"}
    # the server is on this machine's loopback
    there = Node(claim, image, {"fivefold-s3": bucket.environ()}, network="host")
    split, folds, evaluate, _ = objects
    for job, index in ((split, None), (folds, 1), (evaluate, None)):
        ended = there.run(job, index)
        assert ended.code == 0, ended.log[-3000:]
    written = [name for name in bucket.listed("runs/") if name.endswith(("model.safetensors", "report.html"))]
    assert sorted(name.split("/")[2] for name in written) == ["evaluate", "fold-1"]
