import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fivefold import execution
from fivefold.build import build_classifier
from fivefold.config.schema import Model, Settings, Train
from fivefold.distributed.process_group import SINGLE_PROCESS
from fivefold.errors import SettingsError
from fivefold.execution import (
    cached_probe,
    choose_fastest,
    choose_precision,
    make_prediction_runtime,
    make_training_runtime,
    optimize_for_cpu,
    precision_name,
    time_steps,
    time_undisturbed,
)
from fivefold.models.cpu_convs import DepthwiseConv2d
from fivefold.system import count_cpus

CPU = torch.device("cpu")
HAS_BF16 = choose_precision("auto", CPU) == "bf16"
GROUPED, SMALL = "timm/tf_mobilenetv3_small_075", "fivefold/small_net"
PRECISIONS = ["fp32", "bf16", "bf16_grouped_fp32"]


def make_settings(backbone: str = GROUPED, **train) -> Settings:
    return Settings(model=Model(backbone=backbone, image_size=32), train=Train(**{"batch_size": 4} | train))


def make_network(settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(settings.model, 3)


@pytest.mark.parametrize(
    ("milliseconds", "quiet", "disturbed"),
    [
        ((100.0, 98.0, 97.5), "fp32", "bf16"),
        ((100.0, 80.0, 79.0), "bf16", "bf16"),
        ((100.0, 160.0, 155.0), "fp32", "fp32"),
        ((100.0, 80.0, 70.0), PRECISIONS[2], "bf16"),
        ((100.0, 80.0, 50.0), PRECISIONS[2], PRECISIONS[2]),
    ],
)
def test_disturbed_probe_leaves_the_usual_precision_only_for_a_clearly_faster_one(milliseconds, quiet, disturbed):
    times = dict(zip(PRECISIONS, milliseconds, strict=True))
    assert (choose_fastest(times, False), choose_fastest(times, True)) == (quiet, disturbed)


@pytest.mark.parametrize(("seconds", "rounds"), [(60.0, execution.MAX_ROUNDS), (0.0, 1)])
def test_time_steps_interleaves_steps_drops_the_first_round_and_obeys_the_time_limit(seconds, rounds, monkeypatch):
    monkeypatch.setattr(execution, "PROBE_S", seconds)
    order: list[str] = []
    steps = {name: lambda name=name: (order.append(name), time.sleep(0.005)) for name in ("one", "other")}
    times = time_steps(steps)
    assert order == ["one", "other"] * (1 + rounds)
    assert all(5 <= milliseconds < math.inf for milliseconds in times.values())


def test_probe_next_to_busy_processes_is_repeated_and_reported_as_disturbed(monkeypatch):
    monkeypatch.setattr(execution, "PROBE_S", 0.2)
    monkeypatch.setattr(execution, "PROBE_PAUSE_S", 0.0)
    rounds: list[int] = []
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    with ExitStack() as stack:
        for _ in range(2 * count_cpus()):
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            process.stdout.readline()  # the process is running
        times, disturbed = time_undisturbed({"one": lambda: (rounds.append(1), sum(range(1_000_000)))})
    assert disturbed
    assert 0 < times["one"] < math.inf
    assert len(rounds) >= 2 * execution.MAX_PROBES


def test_probe_does_not_change_the_network_or_the_random_state(monkeypatch):
    monkeypatch.setattr(execution, "PROBE_S", 0.0)
    monkeypatch.setattr(execution, "MAX_PROBES", 1)
    settings = make_settings()
    probed, reference = make_network(settings), make_network(settings)
    random_state = torch.get_rng_state()
    result = execution._probe(settings, probed, PRECISIONS, 2)
    assert list(result["milliseconds"]) == PRECISIONS
    assert result["choice"] == choose_fastest(result["milliseconds"], result["disturbed"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(map(type, probed.modules())) == list(map(type, reference.modules()))
    assert all(parameter.grad is None for parameter in probed.parameters())
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in probed.state_dict().items())


def resolve(settings: Settings, folder: Path, resumed: dict | None = None) -> str:
    """Return the precision of a run whose stages share `folder`."""
    resolved = execution.resolve_precision(settings, make_network(settings), SINGLE_PROCESS, resumed, folder)
    return resolved.train.precision


@pytest.mark.skipif(not HAS_BF16, reason="bf16 is no candidate on this CPU")
def test_all_stages_of_a_run_reuse_one_precision_choice(tmp_path):
    settings = make_settings(SMALL)
    assert execution._candidates(settings, make_network(settings)) == PRECISIONS[:2]
    assert execution._candidates(make_settings(), make_network(make_settings())) == PRECISIONS
    first = resolve(settings, tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["choice"] == first
    for name in ("fp32", "bf16"):  # other stages take the stored choice, whatever their own probe would choose
        path.write_text(json.dumps({"choice": name}))
        assert resolve(settings, tmp_path) == name
    resolve(make_settings(SMALL, batch_size=3), tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2, "another batch size needs another probe"


def test_precision_is_not_probed_if_set_or_in_a_checkpoint_or_the_only_candidate(tmp_path):
    assert resolve(make_settings(SMALL, precision="bf16_grouped_fp32"), tmp_path) == "bf16_grouped_fp32"
    resumed = {"precision": "bf16_grouped_fp32", "channels_last": True}
    assert resolve(make_settings(SMALL), tmp_path, resumed) == "bf16_grouped_fp32"
    if not HAS_BF16:
        assert resolve(make_settings(SMALL), tmp_path) == "fp32"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRECISIONS)
def test_cpu_optimization_replaces_depthwise_convolutions_in_each_precision(name):
    runtime = make_training_runtime(make_settings(precision=name))
    assert precision_name(runtime) == precision_name(make_prediction_runtime(make_settings(), name, "cpu")) == name
    meta = replace(runtime, device=torch.device("meta"))
    for machine, enabled, expected in ((runtime, True, 7), (runtime, False, 0), (meta, True, 0)):
        network = optimize_for_cpu(make_network(make_settings()), machine, enabled)
        assert sum(isinstance(module, DepthwiseConv2d) for module in network.modules()) == expected


@pytest.mark.parametrize("content", [b"", b"[]", b'{"choice": "fp64"}', b"\xff\xfe"])
def test_unreadable_probe_result_is_replaced(content, tmp_path):
    assert cached_probe({"a": 1}, PRECISIONS, tmp_path, lambda: {"choice": "bf16"}) == "bf16"
    (path,) = tmp_path.glob("*.json")
    original = path.read_bytes()
    path.write_bytes(content)
    assert cached_probe({"a": 1}, PRECISIONS, tmp_path, lambda: {"choice": "bf16"}) == "bf16"
    assert path.read_bytes() == original


def test_concurrent_callers_share_the_result_of_one_probe(tmp_path):
    """Use threads; each opens the lock file itself, as a process would."""
    probed = []

    def probe(name: str) -> dict:
        probed.append(name)
        time.sleep(0.1)
        return {"choice": name}

    with ThreadPoolExecutor(3) as pool:
        choices = pool.map(lambda name: cached_probe({}, "abc", tmp_path, lambda: probe(name)), "abc")
        assert [*set(choices)] == probed


def test_unknown_or_unsupported_training_options_on_a_cpu_are_rejected():
    for train in ({"precision": "bf61"}, {"precision": "fp16", "device": "cpu"}, {"compile": True, "device": "cpu"}):
        with pytest.raises(SettingsError):
            make_training_runtime(make_settings(**train))
    assert precision_name(make_prediction_runtime(make_settings(), "fp16", "cpu")) == "fp32"


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_float32_is_not_rounded_to_tf32(precision, allowed):
    make_prediction_runtime(make_settings(), precision, "cpu")
    assert torch.backends.cudnn.allow_tf32 is allowed
