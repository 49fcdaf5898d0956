"""Weights and checkpoints of others: read without running code, found wherever they lie, fitted by name and shape."""

import argparse
import collections
import enum
import logging
import os
import pathlib
import pickle
import re
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn

from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.models.backbones import build_backbone
from fivefold.models.weights import load_matching, read_weights

SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}


def drawn(name: str = "test_resnet", seed: int = 1, **options: object) -> dict[str, torch.Tensor]:
    """The state dict of timm's whole network, drawn anew."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(t) if t.is_floating_point() else t
            for name, t in timm.create_model(name, **options).state_dict().items()}  # fmt: skip


WEIGHTS, OTHERS = drawn(), drawn(seed=2)


def under(prefix: str, weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, torch.Tensor]:
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in weights.items())


class AttributeDict(dict):
    """As Lightning keeps hyperparameters: a class that a reader of the file may not have."""


class Listing(list):
    """A list of an unknown class."""


class Mode(enum.Enum):
    TRAIN = "train"


@dataclass
class Config:
    lr: float
    mode: Mode


def arguments() -> argparse.Namespace:
    return argparse.Namespace(
        lr=1e-3,
        output=pathlib.PurePosixPath("/tmp/out"),
        best=np.float64(0.9),
        mean=np.array([0.1, 0.2]),
        device=torch.device("cpu"),
        seen=collections.defaultdict(int, {"a": 1}),
        counts=collections.Counter("abc"),
        mode=Mode.TRAIN,
        names={"a", "b"},
        of=Config(0.1, Mode.TRAIN),
        listing=Listing([1, 2, Mode.TRAIN]),
    )


def optimizer() -> dict[str, object]:
    weight = nn.Parameter(torch.ones(3))
    kept = torch.optim.AdamW([weight])
    weight.sum().backward()
    kept.step()
    return kept.state_dict()


CHECKPOINTS = {
    "plain": lambda: WEIGHTS,
    "timm": lambda: {
        "epoch": 3, "arch": "test_resnet", "state_dict": WEIGHTS, "optimizer": optimizer(), "version": 2,
        "args": arguments(), "metric": np.float64(77.5),
    },
    "timm with EMA": lambda: {"state_dict": OTHERS, "state_dict_ema": WEIGHTS, "args": arguments(), "metric": np.float32(7)},
    "timm with an old EMA": lambda: {"state_dict": OTHERS, "state_dict_ema": under("module.")},
    "DeiT": lambda: {"model": WEIGHTS, "optimizer": optimizer(), "lr_scheduler": {}, "epoch": 3, "args": arguments()},
    "DeiT with EMA": lambda: {"model": OTHERS, "model_ema": WEIGHTS, "scaler": {}, "args": arguments()},
    "an EMA that holds a state dict": lambda: {"model": OTHERS, "ema": {"decay": 0.99, "state_dict": WEIGHTS}},
    "params_ema": lambda: {"params": OTHERS, "params_ema": WEIGHTS},
    "an EMA without BatchNorm's counts": lambda: {
        "model": WEIGHTS, "model_ema": {name: t for name, t in OTHERS.items() if "running" not in name}
    },
    "Lightning": lambda: {
        "pytorch-lightning_version": "2.0", "state_dict": under("model.") | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": AttributeDict(lr=0.1, config=Config(0.1, Mode.TRAIN)), "callbacks": {Mode: {"best": torch.ones(1)}},
    },
    "Lightning with an EMA": lambda: {"state_dict": under("model.", OTHERS) | under("ema_model.module.")},
    "DINO": lambda: {"student": under("module.backbone.", OTHERS), "teacher": under("backbone.") | {"head.mlp.0.weight": torch.ones(4, 4)}},
    "MoCo": lambda: {"state_dict": under("module.base_encoder.") | under("module.momentum_encoder.", OTHERS), "arch": "resnet50"},
    "compiled, then distributed": lambda: {"state_dict": under("module._orig_mod.")},
    "distributed, then compiled": lambda: under("_orig_mod.module."),
    "compiled by parts": lambda: {name.replace("layer1.", "layer1._orig_mod."): t for name, t in WEIGHTS.items()},
    "sharded": lambda: {name.replace("layer1.0.", "layer1.0._fsdp_wrapped_module."): t for name, t in WEIGHTS.items()},
    "prefixes at depth": lambda: {"a": [{"net": under("net.encoder.model.module.")}]},
    "DeepSpeed": lambda: {"module": WEIGHTS, "ds_version": "0.1"},
    "parameters": lambda: {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in WEIGHTS.items()},
    "in an unknown map": lambda: AttributeDict(weights=AttributeDict(WEIGHTS)),
    "half precision": lambda: {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in WEIGHTS.items()},
}  # fmt: skip


def in_zip(content, path):
    torch.save(content, path)


def in_stream(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def in_later_protocol(content, path):
    torch.save(content, path, pickle_protocol=5)


@pytest.mark.parametrize("write", [in_zip, in_stream, in_later_protocol])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_others_are_read_whatever_else_they_hold(kind, write, tmp_path, caplog):
    write(CHECKPOINTS[kind](), tmp_path / "c.pth")
    backbone = build_backbone("timm/test_resnet", False, {})
    with caplog.at_level(logging.INFO):
        load_matching(backbone, tmp_path / "c.pth")
    for name, tensor in backbone.state_dict().items():
        expected = WEIGHTS[name].bfloat16().to(tensor.dtype) if kind == "half precision" else WEIGHTS[name]
        assert torch.equal(tensor, expected), name
    assert {record.levelname for record in caplog.records} == {"INFO"}


class Running:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOSTILE = {
    "a shell": lambda marker: {"args": Running(os.system, f"touch {marker}")},
    "Python": lambda marker: {"args": Running(exec, f"open({str(marker)!r}, 'w')")},
    "a file": lambda marker: {"args": Running(pathlib.Path.touch, marker)},
    "a shell as a tensor": lambda marker: {"conv1.0.weight": Running(os.system, f"touch {marker}")},
    "a shell inside the weights": lambda marker: {
        "state_dict": {**WEIGHTS, "x": Running(os.system, f"touch {marker}")}
    },
}


@pytest.mark.parametrize("write", [in_zip, in_stream, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_code_of_a_file_runs(kind, write, tmp_path):
    write(HOSTILE[kind](tmp_path / "ran"), tmp_path / "c.pth")
    try:
        found = set(read_weights(tmp_path / "c.pth"))
    except DataError:
        found = set()
    assert found == (
        {f"state_dict.{name}" for name in WEIGHTS} if "inside" in kind and write in (in_zip, in_stream) else set()
    )
    assert not (tmp_path / "ran").exists()
    assert pickle.loads(pickle.dumps(Running(str, "it would"))) == "it would"


def in_archive(pickled: bytes, path: pathlib.Path) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return path


def pushed(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


@pytest.mark.parametrize(
    "name", ["torch\nTensor", "torch._utils\n_rebuild_tensor_v2", "builtins\ndict", "collections\nOrderedDict"]
)
def test_a_file_sets_no_attributes_of_functions_and_classes(name, tmp_path):
    state = b"N}" + pushed("changed_by_a_file") + b"K\x01s\x86b"  # (None, {name: 1}): what slots hold
    before = {
        each: set(vars(each)) for each in (torch.Tensor, torch._utils._rebuild_tensor_v2, collections.OrderedDict)
    }
    with pytest.raises(DataError):
        read_weights(in_archive(b"\x80\x02c" + name.encode() + b"\n" + state + b".", tmp_path / "c.pth"))
    assert before == {each: set(vars(each)) for each in before}


@pytest.mark.parametrize(
    ("size", "stride", "offset", "beyond"),
    [
        ((3,), (1,), 1, False),
        ((9,), (1,), 0, True),
        ((2, 2), (3, 1), 0, True),
        ((2,), (1,), 3, True),
        ((2,), (-1,), 1, True),
    ],
)
def test_no_tensor_reaches_beyond_its_numbers(size, stride, offset, beyond, tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as file:
        content = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    sound = re.compile(rb"K\x00K\x04\x85q(.)K\x01\x85q(.)", re.DOTALL)  # offset 0, size (4,), stride (1,)
    assert sound.search(content["data.pkl"])

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    spoilt = number(offset) + numbers(size) + numbers(stride)
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as file:
        for name, data in content.items():
            file.writestr(f"archive/{name}", sound.sub(lambda _: spoilt, data) if name == "data.pkl" else data)
    if beyond:
        with pytest.raises(DataError):
            read_weights(tmp_path / "c.pth")
    else:
        assert read_weights(tmp_path / "c.pth")["w"].tolist() == [1, 2, 3]


def cut_off(path):
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_off_stream(path):
    in_stream(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def compressed(path):
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            file.writestr(name, bytes(len(data)) if "/data/" in name else data)


def other_zip(path):
    np.savez(path.with_suffix(".npz"), a=np.ones(3))
    path.with_suffix(".npz").rename(path)


NO_WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("hello"),
    "a pointer of Git LFS": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    ),
    "cut off": cut_off,
    "cut off, of an old torch": cut_off_stream,
    "another zip": other_zip,
    "compressed": compressed,
    "a whole network": lambda path: torch.save(nn.Linear(3, 3), path),
    "a whole network in a checkpoint": lambda path: torch.save({"model": nn.Linear(3, 3), "ema": None}, path),
    "a program": lambda path: torch.jit.save(torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), path),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps({"w": np.ones(3)})),
    "one tensor": lambda path: torch.save(torch.ones(3), path),
    "numbers": lambda path: torch.save({"epoch": 3}, path),
    "no tensors": lambda path: safetensors.torch.save_file({}, path),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_files_that_are_no_weights_are_refused_in_words_of_our_own(kind, tmp_path):
    NO_WEIGHTS[kind](tmp_path / "c.pth")
    with pytest.raises(DataError) as error:
        load_matching(build_backbone("timm/test_resnet", False, {}), tmp_path / "c.pth")
    words = str(error.value)
    assert str(tmp_path / "c.pth") in words
    for foreign in ("\x1b", "weights_only", "\n"):
        assert foreign not in words
    with pytest.raises(MissingInputError):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_a_suffix_says_nothing_of_the_form(suffix, tmp_path):
    safetensors.torch.save_file(under("model.encoder."), tmp_path / f"s{suffix}")
    torch.save(under("model.encoder."), tmp_path / f"t{suffix}")
    for name in ("s", "t"):
        backbone = build_backbone("timm/test_resnet", False, {})
        load_matching(backbone, tmp_path / f"{name}{suffix}")
        assert all(torch.equal(tensor, WEIGHTS[key]) for key, tensor in backbone.state_dict().items())


def started(backbone, content, tmp_path, caplog):
    """What was logged as (level, text), and the backbone's state."""
    torch.save(content, tmp_path / "c.pth")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_matching(backbone, tmp_path / "c.pth")
    return [
        (record.levelname, record.getMessage()) for record in caplog.records if record.name == "fivefold"
    ], backbone.state_dict()


def test_the_log_names_the_weights_taken_and_those_left(tmp_path, caplog):
    backbone = build_backbone("timm/test_resnet", False, {})
    (told,), _ = started(backbone, {"model": OTHERS, "model_ema": WEIGHTS}, tmp_path, caplog)
    assert all(part in told[1] for part in ("below 'model_ema.'", "EMA", "'model.'"))
    lacking = {name: t for name, t in OTHERS.items() if "running" not in name}
    (told,), _ = started(backbone, {"model": WEIGHTS, "model_ema": lacking}, tmp_path, caplog)
    assert all(part in told[1] for part in ("below 'model.'", "'model_ema.'"))


def test_a_backbone_s_own_prefix_may_be_lacking_in_the_file(tmp_path, caplog):
    torch.manual_seed(1)
    theirs = build_backbone("torchvision/mobilenet_v3_small", False, {})
    content = {
        "module." + name.removeprefix("features."): t
        for name, t in theirs.state_dict().items()
        if name.startswith("features.")
    }
    _, state = started(build_backbone("torchvision/mobilenet_v3_small", False, {}), content, tmp_path, caplog)
    for name, tensor in content.items():
        assert torch.equal(state["features." + name.removeprefix("module.")], tensor)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        "efficientnet_pytorch/efficientnet-b0",
        "fivefold/small_net",
        "fivefold/base_model",
    ],
)
def test_networks_of_every_family_start_from_their_own_checkpoints(name, tmp_path, caplog):
    torch.manual_seed(1)
    theirs = build_backbone(name, False, {}).state_dict()
    head = {"classifier.weight": torch.ones(3, 3)}
    logged, state = started(
        build_backbone(name, False, {}),
        {"net": {f"backbone.{k}": t for k, t in theirs.items()} | head},
        tmp_path,
        caplog,
    )
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in state.items())
    assert [level for level, _ in logged] == ["INFO"]


def small_vit_of_torchvision(size: int) -> nn.Module:
    return torchvision.models.VisionTransformer(size, 16, 1, 2, 16, 16, num_classes=3)


VITS = {
    "timm": (lambda size: build_backbone("timm/test_vit", False, {"img_size": size}), "pos_embed", 1),
    "timm, registers": (lambda size: build_backbone("timm/test_vit2", False, {"img_size": size}), "pos_embed", None),
    "DeiT": (
        lambda size: build_backbone("timm/deit_tiny_distilled_patch16_224", False, {"img_size": size, "depth": 1}), "pos_embed", 2,
    ),
    "torchvision": (small_vit_of_torchvision, "encoder.pos_embedding", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", VITS)
def test_positions_are_resampled_to_another_size_of_images(kind, tmp_path, caplog):
    make, key, tokens = VITS[kind]
    torch.manual_seed(1)
    content = make(96).state_dict()
    content[key].normal_()
    logged, state = started(make(64), {"model": content}, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "INFO"]
    assert key in logged[1][1]
    assert state[key].shape != content[key].shape
    if tokens:
        torch.testing.assert_close(state[key], resample_abs_pos_embed(content[key], [4, 4], num_prefix_tokens=tokens))
    assert all(torch.equal(tensor, content[other]) for other, tensor in state.items() if other != key)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's own interpolation
@pytest.mark.parametrize("head", [True, False])
def test_tables_of_relative_positions_are_resampled_to_another_window(head, tmp_path, caplog):
    torch.manual_seed(1)
    options = {**SWIN, "window_size": 8}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5 if head else 0, **options)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("table"):
            tensor.copy_(torch.linspace(0, 1, len(tensor))[:, None].expand_as(tensor))
    ours = build_backbone("timm/swin_tiny_patch4_window7_224", False, {**SWIN, "window_size": 4})
    logged, state = started(ours, {"model": theirs.state_dict(), "args": arguments()}, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "INFO"]
    for name, tensor in state.items():
        if name.endswith("table"):
            given = theirs.state_dict()[name]
            expected = resize_rel_pos_bias_table(given, (4, 4), tensor.shape) if len(given) > len(tensor) else given
            torch.testing.assert_close(tensor, expected)
        elif tensor.is_floating_point():
            assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_names_of_a_networks_authors_are_translated_where_timm_knows_them(tmp_path, caplog):
    torch.manual_seed(1)
    theirs = timm.create_model("test_convnext", num_classes=5).state_dict()
    original = {}
    for name, tensor in theirs.items():
        name = (
            name.replace("stem.", "downsample_layers.0.")
            .replace("blocks.", "")
            .replace("conv_dw", "dwconv")
            .replace("mlp.fc", "pwconv")
        )
        for stage in range(1, 4):
            name = name.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
        original[name.replace("head.norm", "norm").replace("head.fc", "head")] = tensor
    assert "downsample_layers.0.0.weight" in original
    content = {"model": {name: t + 1 for name, t in original.items()}, "model_ema": original, "args": arguments()}
    logged, state = started(build_backbone("timm/test_convnext", False, {}), content, tmp_path, caplog)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())
    assert [level for level, _ in logged] == ["INFO"]
    assert "EMA" in logged[0][1]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_first_convolution_of_other_channels_is_adapted(channels, tmp_path, caplog):
    content = drawn(in_chans=channels)
    logged, state = started(build_backbone("timm/test_resnet", False, {}), content, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "INFO"]
    first = content["conv1.0.weight"]
    expected = first.expand(-1, 3, -1, -1) / 3 if channels == 1 else first[:, :3] * 4 / 3
    torch.testing.assert_close(state["conv1.0.weight"], expected)
    grey = torch.randn(1, 1, 8, 8)
    if channels == 1:  # a grey image is to it what it was
        same = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), state["conv1.0.weight"])
        torch.testing.assert_close(same, nn.functional.conv2d(grey, first), rtol=1e-4, atol=1e-4)


def test_what_stays_random_is_a_warning_with_names_and_shapes(tmp_path, caplog):
    content = dict(WEIGHTS)
    del content["layer1.0.conv1.weight"]
    content["layer2.0.conv1.weight"] = torch.ones(7, 5, 3, 3)
    backbone = build_backbone("timm/test_resnet", False, {})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    logged, state = started(backbone, {"state_dict": {f"module.{k}": t for k, t in content.items()}}, tmp_path, caplog)
    (warning,) = [text for level, text in logged if level == "WARNING"]
    shape = "x".join(map(str, state["layer2.0.conv1.weight"].shape))
    for part in ("layer1.0.conv1.weight", "layer2.0.conv1.weight", "7x5x3x3", shape, ": 2 of"):
        assert part in warning
    assert "fc." not in warning
    for name, tensor in state.items():
        assert torch.equal(
            tensor, before[name] if name in ("layer1.0.conv1.weight", "layer2.0.conv1.weight") else WEIGHTS[name]
        )


def test_weights_of_a_larger_network_are_warned_of(tmp_path, caplog):
    content = dict(WEIGHTS) | {f"layer1.{n}.{name}": t for n in range(1, 5) for name, t in WEIGHTS.items()}
    logged, _ = started(build_backbone("timm/test_resnet", False, {}), content, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "WARNING"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lambda: {"model": {"blocks.0.attn.qkv.weight": torch.ones(9, 3)}}, ["model.blocks.0.attn.qkv.weight", "9x3", "conv1.0.weight", "16x3x3x3"]),
        (lambda: {f"module.{k}": torch.ones(*t.shape, 2) for k, t in WEIGHTS.items()}, ["conv1.0.weight", "16x3x3x3x2", "16x3x3x3"]),
    ],
    ids=["other names", "other shapes"],
)  # fmt: skip
def test_another_networks_weights_are_refused_with_a_name_of_both(content, parts, tmp_path, caplog):
    backbone = build_backbone("timm/test_resnet", False, {})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(SettingsError) as error:
        started(backbone, content(), tmp_path, caplog)
    assert all(part in str(error.value) for part in parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
