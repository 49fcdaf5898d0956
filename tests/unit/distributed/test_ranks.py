"""Where a process stands, which hosts there are, and what cannot be."""

import json
from pathlib import Path

import pytest

from fivefold.contract.job import context_from_env
from fivefold.contract.stage_specs import STAGES
from fivefold.distributed.ranks import (
    SINGLE_RANK,
    HostGroup,
    Rank,
    check_batch,
    hosts_from_env,
    index_means_host,
    processes_from_env,
    rank_from_env,
    started_as_rank,
)
from fivefold.errors import SettingsError

MET = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29400"}
SAGEMAKER = {"SM_HOSTS": '["algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-2", "SM_NETWORK_INTERFACE_NAME": "eth0"}


def test_a_process_is_alone_unless_somebody_says_its_rank() -> None:
    assert rank_from_env({}) == rank_from_env({"RANK": "1"}) == rank_from_env({"WORLD_SIZE": "4"}) == SINGLE_RANK
    assert rank_from_env({"RANK": "0", "WORLD_SIZE": "1"}) == SINGLE_RANK
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MET}
    assert rank_from_env(torchrun) == Rank(5, 8, 1, 4)
    assert not rank_from_env(torchrun).is_main


def test_what_the_trainer_says_of_a_pod_is_of_hosts_until_its_processes_are_started() -> None:
    pod = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "t-0", "PET_MASTER_PORT": "29400"}
    assert not started_as_rank({**pod, "RANK": "1", "WORLD_SIZE": "2"})
    assert hosts_from_env(pod) == HostGroup(2, 1, "t-0", 29400)
    assert started_as_rank({**pod, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert (
        processes_from_env({"PET_NPROC_PER_NODE": "gpu"}) is processes_from_env({"PET_NPROC_PER_NODE": "auto"}) is None
    )
    assert processes_from_env({"PET_NPROC_PER_NODE": "cpu"}) == 1


@pytest.mark.parametrize(
    ("environ", "hosts"),
    [
        ({}, HostGroup()),
        ({"NNODES": "1"}, HostGroup()),
        ({"NNODES": "1", "MASTER_PORT": "29400"}, HostGroup(port=29400)),
        # of a Service called master, in every pod of its namespace
        ({"MASTER_PORT": "tcp://10.96.0.12:7077", "MASTER_SERVICE_HOST": "10.96.0.12"}, HostGroup()),
        ({"PET_MASTER_PORT": "tcp://10.96.0.12:7077"}, HostGroup()),
        ({"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "a"}, HostGroup(3, 2, "a", 29500)),
        ({"NNODES": "3", "NODE_RANK": "0", **MET}, HostGroup(3, 0, "host-0", 29400)),
        (SAGEMAKER, HostGroup(2, 1, "algo-1", 29500, "eth0")),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}, HostGroup()),
        ({**SAGEMAKER, "NNODES": "1"}, HostGroup()),
    ],
)
def test_hosts_are_those_that_the_platform_names(environ: dict[str, str], hosts: HostGroup) -> None:
    assert hosts_from_env(environ) == hosts


def test_hosts_of_sagemakers_file(tmp_path: Path) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    said = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"], "network_interface_name": "ens5"}
    (config / "resourceconfig.json").write_text(json.dumps(said))
    assert hosts_from_env({"SAGEMAKER_BASE_DIR": str(tmp_path)}) == HostGroup(2, 0, "algo-1", 29500, "ens5")


def test_processes_are_told_or_counted() -> None:
    assert processes_from_env({"NPROC": "2", "SM_NUM_GPUS": "8"}) == 2
    assert processes_from_env({"SM_NUM_GPUS": "8"}) == 8
    assert processes_from_env({"SM_NUM_GPUS": "0"}) == 1
    assert processes_from_env({}) is None


def test_the_variables_of_a_process_give_its_place() -> None:
    hosts = hosts_from_env(SAGEMAKER)
    own = hosts.variables(4, 3, 29500)
    assert rank_from_env(own) == Rank(7, 8, 3, 4)
    assert (own["MASTER_ADDR"], own["NCCL_SOCKET_IFNAME"], own["GLOO_SOCKET_IFNAME"]) == ("algo-1", "eth0", "eth0")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NNODES": "two"}, "NNODES=two is not a whole number from 1"),
        ({"NNODES": "0"}, "NNODES=0 is not a whole number from 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, r"NODE_RANK=2 is out of range: NNODES=2 .* 0 to 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, r"NNODES=2 hosts need NODE_RANK \(0 to 1\) and MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "need NODE_RANK .* and MASTER_ADDR"),
        ({**SAGEMAKER, "NNODES": "3"}, "NNODES=3, but SM_HOSTS names 2: algo-1, algo-2"),
        ({**SAGEMAKER, "SM_CURRENT_HOST": "algo-9"}, "SM_CURRENT_HOST=algo-9 is none of the hosts algo-1, algo-2"),
        ({"SM_HOSTS": "algo-1"}, "SM_HOSTS=algo-1 is not a JSON list"),
        ({"SM_HOSTS": '{"a": 1}'}, "is not a JSON list of names"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT=x is not a whole number"),
    ],
)  # fmt: skip
def test_hosts_that_cannot_be_are_told(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        hosts_from_env(environ)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4", **MET}, "RANK=4 is out of range: .*WORLD_SIZE=4 .* 0 to 3"),
        ({"RANK": "0", "WORLD_SIZE": "x", **MET}, "WORLD_SIZE=x is not a whole number from 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MET}, "LOCAL_RANK=1 is out of range: LOCAL_WORLD_SIZE=1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT: set both"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_are_told(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        rank_from_env(environ)


def test_processes_that_cannot_be_are_told() -> None:
    with pytest.raises(SettingsError, match="NPROC=none is not a whole number from 1"):
        processes_from_env({"NPROC": "none"})


def test_the_index_of_a_job_is_a_fold_unless_hosts_train_together() -> None:
    assert not index_means_host({"JOB_COMPLETION_INDEX": "1"})
    assert not index_means_host({"JOB_COMPLETION_INDEX": "1", **HostGroup().variables(8, 0, 1)})
    assert index_means_host({"JOB_COMPLETION_INDEX": "1", "PET_NNODES": "2"})
    assert index_means_host({"JOB_COMPLETION_INDEX": "1", **hosts_from_env(SAGEMAKER).variables(8, 0, 1)})


def test_the_first_alone_has_places_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path), **MET, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = context_from_env(STAGES["train-fold"], {**environ, "RANK": "0"}, tmp_path)
    second = context_from_env(STAGES["train-fold"], {**environ, "RANK": "1", "LOCAL_RANK": "1"}, tmp_path)
    assert (first.model_dir, first.checkpoint_dir) == (tmp_path / "model", tmp_path / "checkpoints")
    assert (second.model_dir, second.output_data_dir, second.checkpoint_dir) == (None, None, None)
    away = {**environ, "RANK": "1", "LOCAL_RANK": "1", "SM_MODEL_DIR": "s3://nowhere/model"}
    assert context_from_env(STAGES["train-fold"], away, tmp_path).remote.outputs == [], "nothing is asked of the store"
    assert context_from_env(STAGES["ensemble"], {**environ, "RANK": "0"}, tmp_path).rank == SINGLE_RANK


def test_a_batch_needs_two_rows_for_each_process() -> None:
    check_batch(1, 1)
    check_batch(8, 4)
    with pytest.raises(SettingsError, match=r"train\.batch_size=7 is the batch of all 4 .*train\.batch_size=8 or more"):
        check_batch(7, 4)
