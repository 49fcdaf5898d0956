"""Processes that train together, for real: what two of them make is what one makes, and they stay alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distributed_worker
from distributed_worker import CASES, COUNTS, OTHERS, ROWS, SIZE, predicted, trained
from fivefold.distributed.process_group import ProcessGroup, convert_sync_batchnorm
from fivefold.distributed.rank_launcher import free_port
from fivefold.distributed.ranks import SHARED_SCRATCH, HostGroup, Rank
from fivefold.models.backbones import build_backbone
from toy_training import images_in

PROGRAM = Path(distributed_worker.__file__)
WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images in three colours, one after the other."""
    made = tmp_path_factory.mktemp("images")
    images_in(made, ROWS, SIZE)
    return made


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes made of all cases."""
    results, port = tmp_path_factory.mktemp("results"), free_port()
    shared = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", PROGRAM, folder, results],
            env={**shared, SHARED_SCRATCH: str(results), **HostGroup().variables(WORLD, rank, port)},
            stderr=subprocess.PIPE,
        )
        for rank in range(WORLD)
    ]
    said = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    return [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_loss_curve_of_one(name: str, found: list[dict], folder: Path) -> None:
    alone, two = trained(folder, CASES[name]), found[0][name]
    loose = name == "bf16"
    assert len(two["rows"]) == len(alone["rows"])
    for one, other in zip(alone["rows"], two["rows"], strict=True):
        assert other == pytest.approx(one, rel=2e-2 if loose else 1e-4, abs=1e-2 if loose else 1e-5)
    assert alone["rows"][0]["train_loss"] != alone["rows"][-1]["train_loss"], "it learns something"
    if not loose:
        assert two["best"] == alone["best"]
        for which, state in alone["states"].items():
            for key, tensor in state.items():
                torch.testing.assert_close(
                    two["states"][which][key], tensor, rtol=1e-3, atol=1e-2 if name == "muon" else 1e-4
                )


@pytest.mark.parametrize("name", [*CASES, *OTHERS, "stopped"])
def test_all_processes_hold_the_same_bits(name: str, found: list[dict]) -> None:
    first, second = (each[name]["states"] for each in found)
    assert first.keys() == second.keys()
    for which in first:
        assert all(torch.equal(first[which][key], second[which][key]) for key in first[which])


def test_statistics_of_norms_are_averaged_over_the_processes(found: list[dict], folder: Path) -> None:
    """The mean of two equal parts' means is the batch's; the variances of parts lack what is between them."""
    alone, two = (each["states"]["raw"] for each in (trained(folder, OTHERS["one step"]), found[0]["one step"]))
    mean, variance = "backbone.stem.1.running_mean", "backbone.stem.1.running_var"
    torch.testing.assert_close(two[mean], alone[mean])
    assert float(alone[mean].abs().max()) > 0.001
    torch.testing.assert_close(two[variance], alone[variance], rtol=0.05, atol=0.0)
    assert not torch.equal(two[variance], alone[variance])


def test_frozen_norms_stay_as_they_are(found: list[dict]) -> None:
    state = found[0]["frozen norms"]["states"]["raw"]
    assert all(not state[name].any() for name in state if name.endswith("running_mean"))


def test_one_told_to_stop_is_all_told_to_stop_and_they_go_on_to_the_same_bits(found: list[dict]) -> None:
    assert [each["stopped"]["told"] for each in found] == [15, 15]
    for each in found:
        assert each["shared"]["word"] == "of 0", "what the first says is known to all"
        assert torch.equal(each["shared"]["numbers"], torch.arange(3.0))
    whole, gone_on = found[0]["norms"], found[0]["stopped"]
    assert gone_on["rows"] == whole["rows"]
    for which, state in whole["states"].items():
        assert all(torch.equal(gone_on["states"][which][key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("count", COUNTS)
def test_every_row_is_predicted_once_and_all_processes_know_it(count: int, found: list[dict], folder: Path) -> None:
    alone = predicted(folder, count)
    parts = [each["predicted"][str(count)] for each in found]
    for part in parts:
        torch.testing.assert_close(part["found"], alone["found"])
    read = [set(part["read"]) for part in parts]
    assert read[0] | read[1] == set(alone["read"])
    assert len(alone["read"]) == count
    if count >= 2 * WORLD:
        assert not read[0] & read[1]
        assert sorted(parts[0]["read"] + parts[1]["read"]) == sorted(alone["read"])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 16, 17, 100])
def test_shares_are_disjoint_and_whole(world: int, count: int) -> None:
    shares = [ProcessGroup(Rank(rank, world)).shard(count) for rank in range(world)]
    rows = list(range(count))
    if count < 2 * world:
        assert all(share.take(rows) == rows and not share.is_sharded for share in shares)
        return
    taken = [share.take(rows) for share in shares]
    assert [row for part in taken for row in part] == rows
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert max(map(len, taken)) == ProcessGroup(Rank(0, world)).max_shard_size(count)


NETWORKS = {
    "torch's": lambda: build_backbone("fivefold/small_net", False, {"widths": [8, 16]}),
    "timm's, with activations inside": lambda: build_backbone("timm/efficientnet_b0", False, {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_on_gpus_are_synchronised_and_give_what_they_gave(name: str) -> None:
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
