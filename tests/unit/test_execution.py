"""The runtime of a network: what the probe chooses, that it leaves all as it was, and that all stages of a run get one answer."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from fivefold.build import build_classifier, resolve_precision
from fivefold.config.schema import Model, Settings, Train
from fivefold.distributed.process_group import SINGLE_PROCESS
from fivefold.errors import SettingsError
from fivefold.execution import (
    MAX_PROBES,
    MAX_ROUNDS,
    _candidates,
    _probe,
    cached_probe,
    choose_fastest,
    choose_precision,
    fastest,
    make_prediction_runtime,
    make_training_runtime,
    optimize_for_cpu,
    precision_name,
    time_steps,
    time_undisturbed,
)
from fivefold.models.cpu_convs import DepthwiseConv2d
from fivefold.system import count_cpus, other_cpu_seconds

CPU = torch.device("cpu")
FAST = choose_precision("auto", CPU) == "bf16"
GROUPED, SMALL = "timm/tf_mobilenetv3_small_075", "fivefold/small_net"
ALL = ["fp32", "bf16", "bf16_grouped_fp32"]


def settings(backbone: str = GROUPED, **train) -> Settings:
    return Settings(model=Model(backbone=backbone, image_size=32), train=Train(**{"batch_size": 4} | train))


def network(of: Settings) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(of.model, 3)


@pytest.mark.parametrize(
    ("milliseconds", "choice"),
    [((100.0, 98.0, 97.5), "fp32"), ((100.0, 80.0, 79.0), "bf16"), ((100.0, 120.0, 70.0), ALL[2])],
)
def test_what_is_less_simple_must_be_faster_by_the_margin(milliseconds, choice):
    assert fastest(dict(zip(ALL, milliseconds, strict=True))) == choice


def test_steps_are_timed_in_turns_without_the_first_round_and_within_the_time():
    order: list[str] = []
    steps = {name: lambda name=name: (order.append(name), time.sleep(0.01)) for name in ("one", "other")}
    times = time_steps(steps, seconds=60)
    assert order == ["one", "other"] * (1 + MAX_ROUNDS)
    assert all(each >= 10 for each in times.values())
    order.clear()
    time_steps(steps, seconds=0.0)
    assert order == ["one", "other"] * 2


@pytest.mark.parametrize(
    ("milliseconds", "quiet", "disturbed"),
    [
        ((100.0, 110.0, 120.0), "fp32", "bf16"),
        ((100.0, 160.0, 155.0), "fp32", "fp32"),
        ((100.0, 80.0, 70.0), ALL[2], "bf16"),
        ((100.0, 80.0, 50.0), ALL[2], ALL[2]),
    ],
)
def test_a_disturbed_probe_leaves_the_usual_precision_for_what_is_clearly_faster_alone(milliseconds, quiet, disturbed):
    times = dict(zip(ALL, milliseconds, strict=True))
    assert (choose_fastest(times, "bf16", False), choose_fastest(times, "bf16", True)) == (quiet, disturbed)


def test_a_probe_beside_busy_processes_is_repeated_and_known_as_disturbed():
    rounds: list[int] = []
    loops = [
        subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
        for _ in range(2 * count_cpus())
    ]
    try:
        for loop in loops:
            loop.stdout.readline()  # it runs
        steps = {"one": lambda: (rounds.append(1), sum(range(1_000_000)))}
        times, disturbed = time_undisturbed(steps, pause=0.0, seconds=1.0)
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()
    assert disturbed
    assert times["one"] > 0
    assert len(rounds) >= 2 * MAX_PROBES


def test_the_time_of_others_is_not_this_process_s():
    before = other_cpu_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert other_cpu_seconds() - before > 0.4
    before = other_cpu_seconds()
    start = time.process_time()
    while time.process_time() < start + 0.5:
        pass
    assert other_cpu_seconds() >= before - 0.05 * count_cpus()


def test_a_probe_leaves_network_and_random_state_as_they_were():
    of = settings()
    probed = network(of)
    before = {name: tensor.clone() for name, tensor in probed.state_dict().items()}
    kinds, state = [type(module) for module in probed.modules()], torch.get_rng_state()
    found = _probe(of, probed, ALL, 2)
    assert list(found["milliseconds"]) == ALL
    assert found["choice"] == choose_fastest(found["milliseconds"], "bf16", found["disturbed"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in probed.modules()] == kinds
    assert all(parameter.grad is None for parameter in probed.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in probed.state_dict().items())


@pytest.mark.skipif(not FAST, reason="bf16 is no candidate on this CPU")
def test_a_run_decides_once_and_its_stages_agree(tmp_path):
    of = settings(SMALL)
    assert _candidates(of, network(of)) == ALL[:2]
    assert _candidates(settings(), network(settings())) == ALL
    first = resolve_precision(of, network(of), SINGLE_PROCESS, None, tmp_path)
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["choice"] == first.train.precision
    for other in ("fp32", "bf16"):  # another stage takes what stands there, whatever it would have found
        kept.write_text(json.dumps({"choice": other}))
        assert resolve_precision(of, network(of), SINGLE_PROCESS, None, tmp_path).train.precision == other
    resolve_precision(settings(SMALL, batch_size=3), network(of), SINGLE_PROCESS, None, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2, "another batch is another question"


@pytest.mark.skipif(FAST, reason="bf16 is a candidate on this CPU")
def test_where_only_one_precision_can_be_fastest_nothing_is_probed(tmp_path):
    assert resolve_precision(settings(), network(settings()), SINGLE_PROCESS, None, tmp_path).train.precision == "fp32"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALL)
def test_on_a_cpu_depthwise_convolutions_of_torchs_own_class_train_quickly_in_each_precision(name):
    runtime = make_training_runtime(settings(precision=name))
    assert precision_name(runtime) == precision_name(make_prediction_runtime(settings(), name, "cpu")) == name
    made = runtime.to_device(optimize_for_cpu(network(settings()), runtime, enabled=True))
    grouped = [type(each) for each in made.modules() if isinstance(each, nn.Conv2d) and each.groups > 1]
    assert (len(grouped), grouped.count(DepthwiseConv2d)) == (11, 7), "four of stride 2 pad to the same size"
    elsewhere = optimize_for_cpu(network(settings()), replace(runtime, device=torch.device("meta")), enabled=True)
    for other in (elsewhere, optimize_for_cpu(network(settings()), runtime, enabled=False)):
        assert not any(isinstance(each, DepthwiseConv2d) for each in other.modules())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"choice": "fp64"}', b"\xff\xfe"])
def test_a_decision_that_cannot_be_read_is_made_anew(content, tmp_path):
    decision = {"choice": "bf16", "milliseconds": {"fp32": 2.0, "bf16": 1.0}, "images": 4}
    assert cached_probe({"a": 1}, ALL, tmp_path, lambda: decision) == "bf16"
    (kept,) = tmp_path.glob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert cached_probe({"a": 1}, ALL, tmp_path, lambda: decision) == "bf16"
    assert kept.read_bytes() == whole


def test_those_who_ask_at_once_get_one_answer_of_one_probe(tmp_path):
    """Threads, each of which opens the lock by itself as a process would."""
    probed = []

    def probe(name: str) -> dict:
        probed.append(name)
        time.sleep(0.1)
        return {"choice": name}

    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda name: cached_probe({}, ["a", "b", "c"], tmp_path, lambda: probe(name)), "abc")
        assert set(found) == set(probed)
    assert len(probed) == 1


def test_what_the_settings_say_or_a_checkpoint_knows_is_not_probed(tmp_path):
    stated = settings(precision="bf16_grouped_fp32")
    assert resolve_precision(stated, network(stated), SINGLE_PROCESS, None, tmp_path) is stated
    before = {"precision": "bf16_grouped_fp32", "channels_last": True}
    found = resolve_precision(settings(), network(settings()), SINGLE_PROCESS, before, tmp_path)
    assert found.train.precision == "bf16_grouped_fp32"
    assert not list(tmp_path.iterdir())


def test_names_that_do_not_work_here_are_refused():
    for train in ({"precision": "bf61"}, {"precision": "fp16", "device": "cpu"}, {"compile": True, "device": "cpu"}):
        with pytest.raises(SettingsError):
            make_training_runtime(settings(**train))
    assert precision_name(make_prediction_runtime(settings(), "fp16", "cpu")) == "fp32"


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_float32_is_not_rounded_to_tf32(precision, allowed):
    make_prediction_runtime(settings(), precision, "cpu")
    assert torch.backends.cudnn.allow_tf32 is allowed
