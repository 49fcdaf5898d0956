"""The Jobs of `k8s/` for real: each container spec on the Docker engine, and the same bytes as a run on this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fivefold.contract.files import read_json
from fivefold.launchers import kubernetes
from fivefold.launchers.manifests import Pods
from fivefold.launchers.plan import Inputs, make_plan
from jobs.demo import write_digits
from kubernetes_rules import read
from platforms.pods import Ended, Node
from s3_server import Bucket

pytestmark = [pytest.mark.docker, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
IMAGE = os.environ.get("FIVEFOLD_IMAGE", "fivefold:latest")
STAGES = ("split", "train-folds", "ensemble", "evaluate", "distill")
SETTINGS = {"train-fold": ["train.epochs=4"], "distill": ["train.epochs=4"]}
THREADS = {"OMP_NUM_THREADS": "1"}
"""Bits depend on the number of threads."""
SAME = ("model.safetensors", "oof.parquet", "train_log.csv", "predictions.parquet", "submission.csv", "folds.parquet")


@pytest.fixture(scope="module")
def claim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A claim with the digits where the Jobs look for them."""
    folder = tmp_path_factory.mktemp("node") / "claim"
    write_digits(folder / "data")
    (folder / "data" / "test").rename(folder / "data" / "eval")
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def node(claim: Path) -> Node:
    asked = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, f"these tests need a Docker engine with the image {IMAGE}: {asked.stderr}"
    return Node(claim, IMAGE)


def shipped(stage: str, recipe: str = "demo") -> dict[str, Any]:
    """A Job as its file has it, but for the recipe, few epochs and the number of threads."""
    job = deepcopy(read(REPOSITORY / "k8s" / f"{stage}-job.yaml")[-1])
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][1:] == ["recipe=small_images"]
    container["args"][1:] = [f"recipe={recipe}", *SETTINGS.get(container["args"][0], [])]
    container["env"] += [{"name": name, "value": value} for name, value in THREADS.items()]
    return job


@pytest.fixture(scope="module")
def ran(node: Node) -> dict[str, list[Ended]]:
    """Every stage in order, every index of the folds."""
    found = {}
    for stage in STAGES:
        found[stage] = node.run_all(shipped(stage))
        assert [ended.code for ended in found[stage]] == [0] * len(found[stage]), found[stage][-1].log[-3000:]
    return found


@pytest.fixture(scope="module")
def local(claim: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as processes of this machine; the folder of the run."""
    runs = tmp_path_factory.mktemp("local")
    data = claim / "data"
    given = f"recipe=demo train={data / 'train'} eval={data / 'eval'} run=first runs={runs} parallel=1 train.epochs=4"
    command = [sys.executable, "-m", "jobs", "submit", *given.split()]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **THREADS}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return runs / "first"


def test_the_folds_are_the_indexes(ran: dict[str, list[Ended]], claim: Path) -> None:
    assert len(ran["train-folds"]) == 5
    models = [read_json(claim / "runs" / "first" / f"fold-{index}" / "model" / "model.json") for index in range(5)]
    assert [model["fold"] for model in models] == list(range(5))


def test_the_artifacts_are_the_local_runs(ran: dict[str, list[Ended]], claim: Path, local: Path) -> None:
    here = {path.relative_to(local): path for path in local.rglob("*") if path.name in SAME}
    steps = ("split", *(f"fold-{index}" for index in range(5)), "ensemble", "distill")
    compared = {name: path for name, path in here.items() if name.parts[0] in steps}
    assert len(compared) == 1 + 5 * 3 + 2 + 2
    different = [
        str(name) for name, path in compared.items() if path.read_bytes() != (claim / "runs/first" / name).read_bytes()
    ]
    assert different == []


def test_the_scores_are_the_local_runs(ran: dict[str, list[Ended]], claim: Path, local: Path) -> None:
    metrics = read_json(claim / "runs/first/evaluate/output/metrics.json")
    assert metrics == read_json(local / "evaluate/output/metrics.json")
    assert metrics["test"]["n"] == 360


def test_files_are_the_groups_and_last_words_there_are_none(ran: dict[str, list[Ended]], claim: Path) -> None:
    written = [path for path in (claim / "runs").rglob("*") if path.is_file()]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(10001, 10001)}
    assert {ended.words for all_ended in ran.values() for ended in all_ended} == {""}


def test_what_is_done_is_not_done_again(ran: dict[str, list[Ended]], node: Node) -> None:
    again = node.run(shipped("train-folds"), index=3)
    assert again.code == 0
    assert "nothing to do" in again.log


def test_an_error_that_comes_again_ends_the_index_and_leaves_its_words(ran: dict[str, list[Ended]], node: Node) -> None:
    job = shipped("train-folds")
    job["spec"]["template"]["spec"]["containers"][0]["args"].append("train.epochs=many")
    ended = node.run(job, index=0)
    rule = job["spec"]["podFailurePolicy"]["rules"][1]
    assert rule["action"] == "FailIndex"
    assert ended.code in rule["onExitCodes"]["values"]
    assert "train.epochs" in ended.words.splitlines()[0], ended.words


def test_data_cannot_be_written(node: Node) -> None:
    job = shipped("split")
    spec = job["spec"]["template"]["spec"]["containers"][0]
    spec["env"] = [entry for entry in spec["env"] if entry["name"] != "SM_OUTPUT_DATA_DIR"]
    spec["env"].append({"name": "SM_OUTPUT_DATA_DIR", "value": "/data/out"})
    ended = node.run(job)
    assert ended.code == 64
    assert "/data/out" in ended.words


def test_a_fold_in_a_bucket_has_no_claim(claim: Path, node: Node, bucket: Bucket) -> None:
    for path in (claim / "data" / "train").rglob("*.png"):
        bucket.write(f"data/train/{path.relative_to(claim / 'data' / 'train')}", path.read_bytes())
    at = f"s3://{bucket.name}"
    plan = make_plan(Inputs(f"{at}/data/train"), ["train.epochs=4"], run="first", recipe="demo")
    objects = kubernetes.objects(plan, Pods(runs=f"{at}/runs", gpus=0))
    assert {one["kind"] for one in objects} == {"Job"}
    there = Node(claim, IMAGE, {"fivefold-s3": bucket.environ()}, network="host")
    split, folds = objects[:2]
    for job, index in ((split, None), (folds, 2)):
        ended = there.run(job, index)
        assert ended.code == 0, ended.log[-3000:]
    assert any(name.startswith("runs/first/fold-2/model/") for name in bucket.listed())
