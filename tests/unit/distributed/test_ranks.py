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

MASTER = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29400"}
SAGEMAKER = {"SM_HOSTS": '["algo-2", "algo-1"]', "SM_CURRENT_HOST": "algo-2", "SM_NETWORK_INTERFACE_NAME": "eth0"}


def test_rank_is_single_unless_rank_and_world_size_are_set() -> None:
    assert rank_from_env({}) == rank_from_env({"RANK": "1"}) == rank_from_env({"WORLD_SIZE": "4"}) == SINGLE_RANK
    assert rank_from_env({"RANK": "0", "WORLD_SIZE": "1"}) == SINGLE_RANK
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MASTER}
    assert rank_from_env(torchrun) == Rank(5, 8, 1, 4)
    assert not rank_from_env(torchrun).is_main


def test_pet_variables_describe_hosts_until_local_rank_is_set() -> None:
    pod = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "t-0", "PET_MASTER_PORT": "29400"}
    assert not started_as_rank({**pod, "RANK": "1", "WORLD_SIZE": "2"})
    assert hosts_from_env(pod) == HostGroup(2, 1, "t-0", 29400)
    assert started_as_rank({**pod, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("environ", "hosts"),
    [
        ({}, HostGroup()),
        ({"NNODES": "1"}, HostGroup()),
        ({"NNODES": "1", "MASTER_PORT": "29400"}, HostGroup()),
        # Kubernetes sets these for a Service called master, in every pod of its namespace
        ({"MASTER_PORT": "tcp://10.96.0.12:7077", "MASTER_SERVICE_HOST": "10.96.0.12"}, HostGroup()),
        ({"PET_MASTER_PORT": "tcp://10.96.0.12:7077"}, HostGroup()),
        ({"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "a"}, HostGroup(3, 2, "a", 29500)),
        ({"NNODES": "3", "NODE_RANK": "0", **MASTER}, HostGroup(3, 0, "host-0", 29400)),
        (SAGEMAKER, HostGroup(2, 1, "algo-1", 29500, "eth0")),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}, HostGroup()),
        ({**SAGEMAKER, "NNODES": "1"}, HostGroup()),
    ],
)
def test_hosts_come_from_the_variables_of_the_platform(environ: dict[str, str], hosts: HostGroup) -> None:
    assert hosts_from_env(environ) == hosts


def test_hosts_come_from_sagemakers_resource_config(tmp_path: Path) -> None:
    config = tmp_path / "input" / "config"
    config.mkdir(parents=True)
    resource_config = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"], "network_interface_name": "ens5"}
    (config / "resourceconfig.json").write_text(json.dumps(resource_config))
    assert hosts_from_env({"SAGEMAKER_BASE_DIR": str(tmp_path)}) == HostGroup(2, 0, "algo-1", 29500, "ens5")


def test_process_count_is_nproc_or_the_gpu_count() -> None:
    counts = {"2": {"NPROC": "2", "SM_NUM_GPUS": "8"}, "8": {"SM_NUM_GPUS": "8"}, "1": {"SM_NUM_GPUS": "0"}}
    assert {str(processes_from_env(environ)): environ for environ in counts.values()} == counts
    assert processes_from_env({"PET_NPROC_PER_NODE": "cpu"}) == 1
    for environ in ({}, {"PET_NPROC_PER_NODE": "gpu"}, {"PET_NPROC_PER_NODE": "auto"}):
        assert processes_from_env(environ) is None


def test_host_group_variables_give_the_rank_of_a_process() -> None:
    env = hosts_from_env(SAGEMAKER).variables(4, 3)
    assert rank_from_env(env) == Rank(7, 8, 3, 4)
    assert (env["MASTER_ADDR"], env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("algo-1", "eth0", "eth0")


@pytest.mark.parametrize(
    ("read", "environ", "names"),
    [
        (hosts_from_env, {"NNODES": "two"}, "NNODES=two"),
        (hosts_from_env, {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 .*NNODES=2 .* 0 to 1"),
        (hosts_from_env, {"NNODES": "2", "MASTER_ADDR": "a"}, r"NODE_RANK \(0 to 1\) and MASTER_ADDR"),
        (hosts_from_env, {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        (hosts_from_env, {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT=x"),
        (hosts_from_env, {**SAGEMAKER, "NNODES": "3"}, "NNODES=3.* SM_HOSTS .*algo-1, algo-2"),
        (hosts_from_env, {**SAGEMAKER, "SM_CURRENT_HOST": "algo-9"}, "SM_CURRENT_HOST=algo-9 .*algo-1, algo-2"),
        (hosts_from_env, {"SM_HOSTS": "algo-1"}, "SM_HOSTS=algo-1"),
        (hosts_from_env, {"SM_HOSTS": '{"a": 1}'}, "SM_HOSTS="),
        (rank_from_env, {"RANK": "4", "WORLD_SIZE": "4", **MASTER}, "RANK=4 .*WORLD_SIZE=4 .* 0 to 3"),
        (rank_from_env, {"RANK": "0", "WORLD_SIZE": "x", **MASTER}, "WORLD_SIZE=x"),
        (rank_from_env, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MASTER}, "LOCAL_RANK=1 .*LOCAL_WORLD_SIZE=1"),
        (rank_from_env, {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        (processes_from_env, {"NPROC": "none"}, "NPROC=none"),
    ],
)  # fmt: skip
def test_invalid_variables_raise_settings_errors_that_name_them(read, environ: dict[str, str], names: str) -> None:
    with pytest.raises(SettingsError, match=names):
        read(environ)


def test_job_index_is_a_fold_unless_several_hosts_train_one_model() -> None:
    assert not index_means_host({"JOB_COMPLETION_INDEX": "1"})
    assert not index_means_host({"JOB_COMPLETION_INDEX": "1", **HostGroup().variables(8, 0)})
    assert index_means_host({"JOB_COMPLETION_INDEX": "1", "PET_NNODES": "2"})
    assert index_means_host({"JOB_COMPLETION_INDEX": "1", **hosts_from_env(SAGEMAKER).variables(8, 0)})


def test_only_the_first_rank_has_output_folders(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    environ = {"SAGEMAKER_BASE_DIR": str(tmp_path), **MASTER, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = context_from_env(STAGES["train-fold"], {**environ, "RANK": "0"}, tmp_path)
    second = context_from_env(STAGES["train-fold"], {**environ, "RANK": "1", "LOCAL_RANK": "1"}, tmp_path)
    assert (first.model_dir, first.checkpoint_dir) == (tmp_path / "model", tmp_path / "checkpoints")
    assert (second.model_dir, second.output_data_dir, second.checkpoint_dir) == (None, None, None)
    remote = {**environ, "RANK": "1", "LOCAL_RANK": "1", "SM_MODEL_DIR": "s3://nowhere/model"}
    assert context_from_env(STAGES["train-fold"], remote, tmp_path).remote.outputs == [], "no request to the store"
    assert context_from_env(STAGES["ensemble"], {**environ, "RANK": "0"}, tmp_path).rank == SINGLE_RANK


def test_batch_needs_two_rows_for_each_process() -> None:
    check_batch(1, 1)
    check_batch(8, 4)
    with pytest.raises(SettingsError, match=r"train\.batch_size=7 is the batch of all 4 .*train\.batch_size=8 or more"):
        check_batch(7, 4)
