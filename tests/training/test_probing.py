"""The probe: what it chooses, that it leaves everything as it was, and that all stages of a run get one answer."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from fivefold.assemble import build_classifier, settled
from fivefold.distributed.replicas import BY_ITSELF
from fivefold.errors import SettingsError
from fivefold.inference.predictor import make_runtime
from fivefold.models.depthwise import DepthwiseConv2d
from fivefold.recipe import Model, Settings, Train
from fivefold.runtimes import (
    PRECISIONS,
    _candidates,
    choose_precision,
    precision_name,
    quickened,
    runtime_for_prediction,
    runtime_of,
)
from fivefold.training.probing import FIRST_ROUNDS, ROUNDS, Decision, Probe, decided_once, fastest, probe_images, timed

CPU = torch.device("cpu")
FAST = choose_precision("auto", CPU) == "bf16"


GROUPED, SMALL = "timm/tf_mobilenetv3_small_075", "fivefold/small_net"


def settings(backbone: str = GROUPED, **train) -> Settings:
    return Settings(model=Model(backbone=backbone, image_size=32), train=Train(**{"batch_size": 4} | train))


def network(of: Settings) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(of.model, 3)


def test_what_is_less_simple_must_be_faster_by_the_margin():
    assert fastest({"fp32": 100.0, "bf16": 98.0, "bf16_grouped_fp32": 97.5}) == "fp32"
    assert fastest({"fp32": 100.0, "bf16": 80.0, "bf16_grouped_fp32": 79.0}) == "bf16"
    assert fastest({"fp32": 100.0, "bf16": 120.0, "bf16_grouped_fp32": 70.0}) == "bf16_grouped_fp32"


def ticking(order, **seconds):
    """A clock of its own, that each step in `order` moves by its seconds (1e-3 where none are given)."""
    return lambda: sum(seconds.get(name, 1e-3) for name in order)


def test_steps_are_timed_in_turns_without_the_first_round_and_within_the_time():
    order: list[str] = []

    def step(name: str, seconds: float):
        return lambda: (order.append(name), time.sleep(seconds))

    times = timed({"one": step("one", 0.01), "other": step("other", 0.01)}, clock=ticking(order))
    assert order == ["one", "other"] * (1 + ROUNDS)
    assert {name: len(each) for name, each in times.items()} == {"one": ROUNDS, "other": ROUNDS}
    order.clear()
    both = timed({"one": step("one", 0.03), "other": step("other", 0.03)}, seconds=0.05)
    assert [len(each) for each in both.values()] == [1, 1]


def test_what_is_clearly_slower_runs_in_the_first_rounds_alone():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("slow", "quick", "near")}
    times = timed(steps, 1e9, ticking(order, slow=5.0, quick=1.0, near=1.1))
    assert order == ["slow", "quick", "near"] * (1 + FIRST_ROUNDS) + ["quick", "near"] * (ROUNDS - FIRST_ROUNDS)
    assert {len(times["slow"]), len(times["quick"])} == {FIRST_ROUNDS, ROUNDS}
    order.clear()
    timed({name: steps[name] for name in ("slow", "quick")}, 1e9, ticking(order, slow=5.0, quick=1.0))
    assert order == ["slow", "quick"] * (1 + FIRST_ROUNDS)


def test_a_step_has_two_images_at_least_and_no_more_than_the_batch():
    assert probe_images(32, (32, 32)) == 32
    assert probe_images(32, (224, 224)) == 4
    assert probe_images(32, (456, 456)) == 2
    assert probe_images(1, (32, 32)) == 2


def test_a_probe_leaves_network_and_random_state_as_they_were():
    of = settings()
    probed = network(of)
    before = {name: tensor.clone() for name, tensor in probed.state_dict().items()}
    kinds = [type(module) for module in probed.modules()]
    state = torch.get_rng_state()
    probe = Probe((32, 32), 2, probed, seconds=0.2)
    for name, (dtype, grouped) in list(PRECISIONS.items())[:3]:
        runtime = make_runtime(CPU, dtype, True, [0.5] * 3, [0.5] * 3, grouped_fp32=grouped)
        probe.add(name, runtime, runtime.place)
    found = probe.run()
    assert set(found.milliseconds) == {"fp32", "bf16", "bf16_grouped_fp32"}
    assert found.choice == fastest(found.milliseconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in probed.modules()] == kinds
    assert all(parameter.grad is None for parameter in probed.parameters())
    for name, tensor in probed.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_run_decides_once_and_its_stages_agree(tmp_path, caplog):
    of = settings(SMALL, channels_last="auto")
    with caplog.at_level("INFO"):
        first = settled(of, network(of), BY_ITSELF, None, tmp_path / "d")
    (kept,) = (tmp_path / "d").glob("*.json")
    found = json.loads(kept.read_text())
    names = ["fp32", "bf16"] if FAST else ["fp32"]
    assert list(found["milliseconds"]) == [f"{name} {format_}" for name in names for format_ in ("NHWC", "NCHW")]
    assert found["choice"] == f"{first.train.precision} {'NHWC' if first.train.channels_last else 'NCHW'}"
    (line,) = [text for text in caplog.messages if "by a probe" in text]
    assert all(name in line for name in found["milliseconds"])
    # another stage takes what stands there, whatever it would have found
    kept.write_text(json.dumps({**found, "choice": "fp32 NCHW"}))
    second = settled(of, network(of), BY_ITSELF, None, tmp_path / "d")
    assert (second.train.precision, second.train.channels_last) == ("fp32", False)
    settled(settings(SMALL, channels_last="auto", batch_size=3), network(of), BY_ITSELF, None, tmp_path / "d")
    assert len(list((tmp_path / "d").glob("*.json"))) == 2, "another batch is another question"


@pytest.mark.skipif(not FAST, reason="bf16 is no candidate on this CPU")
def test_grouped_convolutions_in_float32_are_a_candidate_where_there_are_any():
    found = {
        backbone: _candidates(settings(backbone), network(settings(backbone)), CPU) for backbone in (SMALL, GROUPED)
    }
    assert list(found[SMALL]) == ["fp32", "bf16"]
    assert list(found[GROUPED]) == ["fp32", "bf16", "bf16_grouped_fp32"]
    assert list(_candidates(settings(precision="bf16"), network(settings()), CPU)) == ["bf16"]


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16_grouped_fp32"])
def test_on_a_cpu_depthwise_convolutions_of_torchs_own_class_train_quickly_in_each_precision(name):
    runtime = runtime_of(settings(precision=name))
    made = runtime.place(quickened(network(settings()), runtime))
    grouped = [type(each) for each in made.modules() if isinstance(each, nn.Conv2d) and each.groups > 1]
    assert (len(grouped), grouped.count(DepthwiseConv2d)) == (11, 7), "four of stride 2 pad to the same size"
    elsewhere = quickened(network(settings()), replace(runtime, device=torch.device("meta")))
    assert not any(isinstance(each, DepthwiseConv2d) for each in elsewhere.modules())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"choice": "fp64", "milliseconds": {}, "images": 2}', b"\xff\xfe"]
)
def test_a_decision_that_cannot_be_read_is_made_anew(content, tmp_path):
    asked, made = {"a": 1}, Decision("bf16", {"fp32": 2.0, "bf16": 1.0}, 4)
    assert decided_once(asked, ["fp32", "bf16"], tmp_path, lambda: made) == made
    (kept,) = tmp_path.glob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert decided_once(asked, ["fp32", "bf16"], tmp_path, lambda: made) == made
    assert kept.read_bytes() == whole


def test_those_who_ask_at_once_get_one_answer_of_one_probe(tmp_path):
    """Threads, each of which opens the lock by itself as a process would."""
    probed = []

    def probe(name: str) -> Decision:
        probed.append(name)
        time.sleep(0.1)
        return Decision(name, {}, 2)

    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda name: decided_once({}, ["a", "b", "c"], tmp_path, lambda: probe(name)).choice, "abc")
        assert set(found) == set(probed)
    assert len(probed) == 1


def test_what_the_settings_say_or_a_checkpoint_knows_is_not_probed(tmp_path):
    stated = settings(precision="bf16_grouped_fp32")
    assert settled(stated, network(stated), BY_ITSELF, None, tmp_path) is stated
    asked = settings(channels_last="auto")
    before = {"precision": "bf16_grouped_fp32", "channels_last": False}
    found = settled(asked, network(asked), BY_ITSELF, before, tmp_path)
    assert (found.train.precision, found.train.channels_last) == ("bf16_grouped_fp32", False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16_grouped_fp32"])
def test_each_precision_has_its_name_wherever_it_runs(name):
    assert precision_name(runtime_of(settings(precision=name))) == name
    assert precision_name(runtime_for_prediction(settings(), name, "cpu")) == name


def test_names_that_do_not_work_here_are_refused():
    with pytest.raises(SettingsError, match=r"unknown precision 'bf61', did you mean|unknown precision"):
        runtime_of(settings(precision="bf61"))
    with pytest.raises(SettingsError, match=r"train\.precision=fp16 needs CUDA, and this runs on cpu"):
        runtime_of(settings(precision="fp16", device="cpu"))
    with pytest.raises(SettingsError, match=r"train\.compile=true needs CUDA, and this runs on cpu"):
        runtime_of(settings(compile=True, device="cpu"))
    assert precision_name(runtime_for_prediction(settings(), "fp16", "cpu")) == "fp32"
