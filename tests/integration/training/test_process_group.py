"""Two real ranks that train together get the results of one process and hold equal states."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import distributed_worker
from distributed_worker import CASES, COUNTS, OTHERS, ROWS, SIZE, predict_rows, train_case
from fivefold.distributed.process_group import ProcessGroup, convert_sync_batchnorm
from fivefold.distributed.ranks import SHARED_SCRATCH, HostGroup, Rank
from fivefold.models.backbones import build_backbone
from forked_process import Forked
from toy_training import images_in

pytestmark = pytest.mark.slow

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    images_in(path, ROWS, SIZE)
    return path


@pytest.fixture(scope="module")
def rank_results(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return the results of all cases, one entry per rank."""
    results = tmp_path_factory.mktemp("results")
    environ = {"PATH": os.environ["PATH"], SHARED_SCRATCH: str(results)}
    command = [distributed_worker.__file__, str(image_folder), str(results)]
    processes = [Forked(command, environ | HostGroup().variables(WORLD_SIZE, rank)) for rank in range(WORLD_SIZE)]
    outputs = [process.wait() for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD_SIZE, "\n".join(outputs)
    return [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_loss_curve_of_one_process(name, rank_results, image_folder):
    single, double = train_case(image_folder, CASES[name]), rank_results[0][name]
    is_bf16 = name == "bf16"
    assert len(double["rows"]) == len(single["rows"])
    for expected, actual in zip(single["rows"], double["rows"], strict=True):
        assert actual == pytest.approx(expected, rel=2e-2 if is_bf16 else 1e-4, abs=1e-2 if is_bf16 else 1e-5)
    assert single["rows"][0]["train_loss"] != single["rows"][-1]["train_loss"], "training changes the loss"
    if not is_bf16:
        assert double["best"] == single["best"]
        atol = 1e-2 if name == "muon" else 1e-4
        torch.testing.assert_close(double["states"], single["states"], rtol=1e-3, atol=atol)


def test_all_ranks_hold_the_same_bits(rank_results):
    first, second = ({name: result[name]["states"] for name in [*CASES, *OTHERS, "stopped"]} for result in rank_results)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_norm_statistics_are_averaged_over_the_ranks(rank_results, image_folder):
    """The mean of two equal shards' means is the batch mean; averaged variances lack the variance between shards."""
    single = train_case(image_folder, OTHERS["one step"])["states"]["raw"]
    double = rank_results[0]["one step"]["states"]["raw"]
    mean, variance = "backbone.stem.1.running_mean", "backbone.stem.1.running_var"
    torch.testing.assert_close(double[mean], single[mean])
    assert float(single[mean].abs().max()) > 0.001
    torch.testing.assert_close(double[variance], single[variance], rtol=0.05, atol=0.0)
    assert not torch.equal(double[variance], single[variance])


def test_frozen_norms_stay_unchanged(rank_results):
    state = rank_results[0]["frozen norms"]["states"]["raw"]
    assert all(not state[name].any() for name in state if name.endswith("running_mean"))


def test_stopping_one_rank_stops_all_and_they_resume_to_the_same_bits(rank_results):
    assert [result["stopped"]["signal"] for result in rank_results] == [15, 15]
    for result in rank_results:
        assert result["shared"]["word"] == "of 0", "all ranks get the value of rank 0"
        assert torch.equal(result["shared"]["numbers"], torch.arange(3.0))
    uninterrupted, resumed = rank_results[0]["norms"], rank_results[0]["stopped"]
    assert resumed["rows"] == uninterrupted["rows"]
    torch.testing.assert_close(resumed["states"], uninterrupted["states"], rtol=0, atol=0)


def test_no_thread_of_the_group_outlives_it(rank_results):
    """Such a thread can crash the interpreter's end, after the results are complete."""
    assert not [name for result in rank_results for name in result["threads"] if "gloo" in name]


@pytest.mark.parametrize("count", COUNTS)
def test_every_row_is_predicted_once_and_all_ranks_get_the_result(count, rank_results, image_folder):
    single = predict_rows(image_folder, count)
    parts = [result["predicted"][str(count)] for result in rank_results]
    for part in parts:
        torch.testing.assert_close(part["log_probs"], single["log_probs"])
    assert len(single["read"]) == count
    if count < 2 * WORLD_SIZE:  # too few rows to shard
        assert [sorted(part["read"]) for part in parts] == [sorted(single["read"])] * 2
    else:
        assert sorted(parts[0]["read"] + parts[1]["read"]) == sorted(single["read"])


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("count", [0, 5, 6, 17])
def test_shards_are_disjoint_and_complete(world_size, count):
    shards = [ProcessGroup(Rank(rank, world_size)).shard(count) for rank in range(world_size)]
    rows = list(range(count))
    if count < 2 * world_size:
        assert all(shard.take(rows) == rows and not shard.is_sharded for shard in shards)
        return
    taken = [shard.take(rows) for shard in shards]
    assert [row for part in taken for row in part] == rows
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert max(map(len, taken)) == ProcessGroup(Rank(0, world_size)).max_shard_size(count)


NETWORKS = {
    "torch's": lambda: build_backbone("fivefold/small_net", {"widths": [8, 16]}),
    "timm's, with activations in its norms": lambda: build_backbone("timm/efficientnet_b0", {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_synchronised_norms_on_gpus_give_the_same_output(name):
    torch.manual_seed(0)
    network, images = NETWORKS[name](), torch.rand(2, 3, 32, 32)
    names, expected = list(network.state_dict()), network.eval()(images)
    assert convert_sync_batchnorm(network, torch.device("cpu")) is network
    synchronised = convert_sync_batchnorm(network, torch.device("cuda"))
    norms = [module for module in synchronised.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(synchronised.state_dict()) == names
    torch.testing.assert_close(synchronised(images), expected, rtol=0.0, atol=0.0)
