"""Pretrained weights on a machine without a network: in a namespace of its own, whose counters of packets stay at 0."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from fivefold.contract.files import read_json, sha256
from fivefold.models.pretrained import find_packaged
from toy_data import environment, run_stage, variables

LITE = (
    "model.backbone=timm/tf_efficientnet_lite0",
    "model.pretrained=auto",
    "train.method=linear_probe",
    "train.loggers=[]",
)
COUNTERS = ("OutRequests", "OutNoRoutes", "ActiveOpens", "OutDatagrams", "Ip6OutRequests", "Ip6OutNoRoutes")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A split of plain images in two colours."""
    root = tmp_path_factory.mktemp("offline")
    for colour, name in ((90, "dark"), (160, "light")):
        (root / "train" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 30), (colour, colour + number, 100)).save(root / "train" / name / f"{number}.png")
    assert run_stage(root, "split", "split", "split.folds=2") == 0
    return root


def run_isolated(root: Path, step: str, *arguments: str, **more: object) -> tuple[int, int]:
    """Run train-fold in a network namespace of its own; return its exit code and the number of packets that it tried to send."""
    script = '"$@"; code=$?; cat /proc/net/snmp /proc/net/snmp6; exit $code'
    command = [sys.executable, "-m", "jobs", "train-fold", "FOLD=0", *arguments]
    caches = {"HF_HOME": root / "hf", "TORCH_HOME": root / "torch", "HOME": root}
    ended = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", *command],
        capture_output=True, text=True, timeout=240, check=False, env=environment(**variables(root, step), **caches, **more),
    )  # fmt: skip
    if "unshare" in ended.stderr:
        pytest.skip(f"no network namespace can be made here: {ended.stderr.strip()}")
    return ended.returncode, count_packets(ended.stdout)


def count_packets(text: str) -> int:
    """Return the sum of the kernel's counters of sent packets, connections and packets without a route."""
    lines = [line.split() for line in text.splitlines()]
    values = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}  # snmp6
    for names, numbers in pairwise(lines):  # snmp: a line of names, then one of numbers
        if names and names[0] in ("Ip:", "Tcp:", "Udp:") and numbers[0] == names[0] and numbers[1:] != names[1:]:
            values |= {
                name: int(number) for name, number in zip(names[1:], numbers[1:], strict=True) if number.isdigit()
            }
    assert "OutRequests" in values
    return sum(values.get(name, 0) for name in COUNTERS)


@pytest.mark.slow
def test_a_packages_weights_are_used_and_no_packet_leaves(root):
    assert run_isolated(root, "fold-0", *LITE, "offline=true") == (0, 0)
    packaged = find_packaged("timm/tf_efficientnet_lite0")
    for path in (root / "fold-0" / "model" / "model.json", root / "fold-0" / "model" / "stage.json"):
        content = read_json(path)
        start = content.get("initial_weights") or content["metrics"]["initial_weights"]
        assert start == {
            "file": packaged.path.name, "source": packaged.source, "licence": "Apache-2.0", "sha256": sha256(packaged.path)
        }  # fmt: skip
    settings = read_json(root / "fold-0" / "model" / "model.json")["settings"]["model"]
    assert (settings["image_size"], settings["mean"], settings["interpolation"]) == (224, [0.5, 0.5, 0.5], "bicubic")


@pytest.mark.slow
def test_weights_that_are_not_on_this_machine_exit_66_without_a_packet_and_75_after_one_try(root):
    resnet = ("model.backbone=timm/resnet10t", "model.pretrained=auto", "train.loggers=[]")
    assert run_isolated(root, "none", *resnet, "offline=true") == (66, 0)
    code, packets = run_isolated(root, "tried", *resnet)
    assert code == 75
    assert packets > 0


@pytest.mark.slow
def test_a_file_in_the_channel_comes_first(root, tmp_path):
    (tmp_path / "start.pth").symlink_to(find_packaged("timm/tf_efficientnet_lite0").path)
    channel = {"SM_CHANNEL_WEIGHTS": tmp_path}
    assert run_isolated(root, "given", *LITE, "offline=true", **channel) == (0, 0)
    assert read_json(root / "given" / "model" / "model.json")["initial_weights"]["source"] == "weights channel"
    (tmp_path / "second.pth").touch()
    assert run_isolated(root, "two", *LITE, "offline=true", **channel) == (64, 0)
