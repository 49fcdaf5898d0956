import argparse
import collections
import enum
import logging
import os
import pathlib
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from torch import nn

from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.models.backbones import build_backbone
from fivefold.models.pretrained import find_packaged, published
from fivefold.models.weights import load_matching, read_weights


def make_weights(name: str = "test_resnet", seed: int = 1, **options: object) -> dict[str, torch.Tensor]:
    """Return a state dict of a complete timm network with random weights."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(t) if t.is_floating_point() else t
            for name, t in timm.create_model(name, **options).state_dict().items()}  # fmt: skip


WEIGHTS, OTHER_WEIGHTS = make_weights(), make_weights(seed=2)


def add_prefix(prefix: str, weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, torch.Tensor]:
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in weights.items())


class AttributeDict(dict):
    """Lightning's class for hyperparameters, which the reader of a file may lack."""


class Mode(enum.Enum):
    TRAIN = "train"


@dataclass
class Config:
    lr: float
    mode: Mode


def make_arguments() -> argparse.Namespace:
    return argparse.Namespace(
        lr=1e-3,
        output=pathlib.PurePosixPath("/tmp/out"),
        mean=np.array([0.1, 0.2]),
        device=torch.device("cpu"),
        seen=collections.defaultdict(int, {"a": 1}),
        names={"a", "b"},
        of=Config(0.1, Mode.TRAIN),
        history=collections.deque([1, 2, Mode.TRAIN]),
    )


CHECKPOINTS = {
    "plain": lambda: WEIGHTS,
    "timm": lambda: {
        "epoch": 3, "arch": "test_resnet", "state_dict": WEIGHTS, "optimizer": {"state": {0: {"step": torch.ones(3)}}},
        "args": make_arguments(), "metric": np.float64(77.5), "loss": nn.Linear(2, 2),
    },
    "timm with EMA": lambda: {"state_dict": OTHER_WEIGHTS, "state_dict_ema": WEIGHTS, "args": make_arguments(), "metric": np.float32(7)},
    "an EMA that holds a state dict": lambda: {"model": OTHER_WEIGHTS, "ema": {"decay": 0.99, "state_dict": WEIGHTS}},
    "an EMA without BatchNorm's counts": lambda: {
        "model": WEIGHTS, "model_ema": {name: t for name, t in OTHER_WEIGHTS.items() if "running" not in name}
    },
    "Lightning": lambda: {
        "pytorch-lightning_version": "2.0", "state_dict": add_prefix("model.") | {"criterion.weight": torch.ones(5)},
        "hyper_parameters": AttributeDict(lr=0.1, config=Config(0.1, Mode.TRAIN)), "callbacks": {Mode: {"best": torch.ones(1)}},
    },
    "Lightning with an EMA": lambda: {"state_dict": add_prefix("model.", OTHER_WEIGHTS) | add_prefix("ema_model.module.")},
    "DINO": lambda: {"student": add_prefix("module.backbone.", OTHER_WEIGHTS), "teacher": add_prefix("backbone.") | {"head.mlp.0.weight": torch.ones(4, 4)}},
    "MoCo": lambda: {"state_dict": add_prefix("module.base_encoder.") | add_prefix("module.momentum_encoder.", OTHER_WEIGHTS), "arch": "resnet50"},
    "compiled, then distributed": lambda: {"state_dict": add_prefix("module._orig_mod.")},
    "partly compiled parameters": lambda: {
        name.replace("layer1.", "layer1._orig_mod."): nn.Parameter(t) if t.is_floating_point() else t for name, t in WEIGHTS.items()
    },
    "nested prefixes": lambda: {"a": [{"net": add_prefix("net.encoder.model.module.")}]},
    "unknown mapping class": lambda: AttributeDict(weights=AttributeDict(WEIGHTS)),
    "half precision": lambda: {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in WEIGHTS.items()},
}  # fmt: skip


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_protocol_5(content, path):
    torch.save(content, path, pickle_protocol=5)


@pytest.mark.parametrize("write", [save_zip, save_legacy, save_protocol_5])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_foreign_checkpoints_are_read_despite_other_content(kind, write, tmp_path, caplog):
    write(CHECKPOINTS[kind](), tmp_path / "c.pth")
    backbone = build_backbone("timm/test_resnet", {})
    with caplog.at_level(logging.INFO):
        load_matching(backbone, tmp_path / "c.pth")
    for name, tensor in backbone.state_dict().items():
        expected = WEIGHTS[name].bfloat16().to(tensor.dtype) if kind == "half precision" else WEIGHTS[name]
        assert torch.equal(tensor, expected), name
    assert {record.levelname for record in caplog.records} == {"INFO"}


class CallOnLoad:
    def __init__(self, function, *call_arguments):
        self.call = function, call_arguments

    def __reduce__(self):
        return self.call


MALICIOUS = {
    "shell command": lambda marker: {"args": CallOnLoad(os.system, f"touch {marker}")},
    "file creation": lambda marker: {"args": CallOnLoad(pathlib.Path.touch, marker)},
    "shell command as a tensor": lambda marker: {"conv1.0.weight": CallOnLoad(os.system, f"touch {marker}")},
    "shell command inside the weights": lambda marker: {
        "state_dict": {**WEIGHTS, "x": CallOnLoad(os.system, f"touch {marker}")}
    },
}


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("kind", MALICIOUS)
def test_code_in_a_checkpoint_does_not_run(kind, write, tmp_path):
    write(MALICIOUS[kind](tmp_path / "ran"), tmp_path / "c.pth")
    names = set()
    with suppress(DataError):
        names = set(read_weights(tmp_path / "c.pth"))
    readable = "inside" in kind and write is not save_pickle
    assert names == ({f"state_dict.{name}" for name in WEIGHTS} if readable else set())
    assert not (tmp_path / "ran").exists()
    assert pickle.loads(pickle.dumps(CallOnLoad(str, "it would"))) == "it would"


def save_with_changed_pickle(path: pathlib.Path, change: Callable[[bytes], bytes]) -> pathlib.Path:
    """Save four numbers with torch.save, and change the pickle in the file."""
    torch.save({"w": torch.arange(4.0)}, path)
    rewrite_zip(path, lambda name, data: change(data) if name.endswith("data.pkl") else data)
    return path


def rewrite_zip(path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, change(name, data))


@pytest.mark.parametrize("name", ["torch\nTensor", "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict"])
def test_checkpoint_cannot_set_attributes_of_functions_and_classes(name, tmp_path):
    text = b"changed_by_a_file"
    state = b"N}X" + len(text).to_bytes(4, "little") + text + b"K\x01s\x86b"  # (None, {text: 1}): the state of slots
    pickled = b"\x80\x02c" + name.encode() + b"\n" + state + b"."
    targets = (torch.Tensor, torch._utils._rebuild_tensor_v2, torch.UntypedStorage, collections.OrderedDict)
    before = [set(vars(target)) for target in targets]
    with pytest.raises(DataError):
        read_weights(save_with_changed_pickle(tmp_path / "c.pth", lambda _: pickled))
    assert before == [set(vars(target)) for target in targets]


@pytest.mark.parametrize(
    ("size", "stride", "offset", "valid"),
    [
        ((3,), (1,), 1, True),
        ((9,), (1,), 0, False),
        ((2, 2), (3, 1), 0, False),
        ((2,), (1,), 3, False),
        ((2,), (-1,), 1, False),
        ((2**40,), (0,), 0, False),
    ],
)
def test_tensors_outside_their_storage_are_rejected(size, stride, offset, valid, tmp_path):
    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def change(pickled: bytes) -> bytes:
        shapes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride)]
        original = re.compile(rb"K\x00K\x04\x85q(.)K\x01\x85q(.)", re.DOTALL)  # offset 0, size (4,), stride (1,)
        changed, count = original.subn(lambda _: number(offset) + b"".join(shapes), pickled)
        assert count == 1
        return changed

    path = save_with_changed_pickle(tmp_path / "c.pth", change)
    if valid:
        assert read_weights(path)["w"].tolist() == [1, 2, 3]
    else:
        with pytest.raises(DataError):
            read_weights(path)


def write_truncated(path, write=save_zip):
    write(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_compressed(path):
    torch.save(WEIGHTS, path)
    rewrite_zip(path, lambda name, data: bytes(len(data)) if "/data/" in name else data, zipfile.ZIP_DEFLATED)


def write_tar(path):
    """Write the format of torch before 0.2, with a name that begins like a pickle."""
    with tarfile.open(path, "w") as file:
        for name in ("PK", "storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))


INVALID_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "Git LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    ),
    "truncated": write_truncated,
    "truncated legacy file": lambda path: write_truncated(path, save_legacy),
    "npz": lambda path: (np.savez(f"{path}.npz", a=np.ones(3)), os.replace(f"{path}.npz", path)),
    "tar": write_tar,
    "compressed": write_compressed,
    "pickled network": lambda path: torch.save(nn.Linear(3, 3), path),
    "pickled network in a checkpoint": lambda path: torch.save({"model": nn.Linear(3, 3), "ema": None}, path),
    "TorchScript": lambda path: torch.jit.save(torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), path),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps({"w": np.ones(3)})),
    "numbers": lambda path: torch.save({"epoch": 3}, path),
    "no tensors": lambda path: safetensors.torch.save_file({}, path),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.jit warns
@pytest.mark.parametrize("kind", INVALID_FILES)
def test_files_without_weights_raise_plain_errors(kind, tmp_path):
    INVALID_FILES[kind](tmp_path / "c.pth")
    with pytest.raises(DataError) as error:
        load_matching(build_backbone("timm/test_resnet", {}), tmp_path / "c.pth")
    assert str(tmp_path / "c.pth") in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(MissingInputError):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("save", [safetensors.torch.save_file, torch.save])
def test_file_format_does_not_depend_on_the_suffix(suffix, save, tmp_path):
    save(WEIGHTS, tmp_path / f"w{suffix}")
    assert all(torch.equal(tensor, WEIGHTS[key]) for key, tensor in read_weights(tmp_path / f"w{suffix}").items())


def load_logged(backbone, content, tmp_path, caplog):
    """Load a checkpoint; return the log as (level, text) and the state of the backbone."""
    torch.save(content, tmp_path / "c.pth")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_matching(backbone, tmp_path / "c.pth")
    logged = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "fivefold"]
    return logged, backbone.state_dict()


def test_log_names_the_selected_and_the_unused_weights(tmp_path, caplog):
    backbone = build_backbone("timm/test_resnet", {})
    (record,), _ = load_logged(backbone, {"model": OTHER_WEIGHTS, "model_ema": WEIGHTS}, tmp_path, caplog)
    assert all(part in record[1] for part in ("below 'model_ema.'", "EMA", "'model.'"))
    incomplete = {name: t for name, t in OTHER_WEIGHTS.items() if "running" not in name}
    (record,), _ = load_logged(backbone, {"model": WEIGHTS, "model_ema": incomplete}, tmp_path, caplog)
    assert all(part in record[1] for part in ("below 'model.'", "'model_ema.'"))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "efficientnet_pytorch/efficientnet-b0", "fivefold/small_net"])
def test_networks_of_every_family_load_their_own_checkpoints(name, tmp_path, caplog):
    torch.manual_seed(1)
    source = build_backbone(name, {}).state_dict()
    content = {"net": add_prefix("backbone.", source) | {"classifier.weight": torch.ones(3, 3)}}
    logged, state = load_logged(build_backbone(name, {}), content, tmp_path, caplog)
    assert all(torch.equal(tensor, source[key]) for key, tensor in state.items())
    assert [level for level, _ in logged] == ["INFO"]


SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
VITS = {
    "timm": (lambda size: build_backbone("timm/test_vit", {"img_size": size}), "pos_embed", 1),
    "timm, registers": (lambda size: build_backbone("timm/test_vit2", {"img_size": size}), "pos_embed", None),
    "DeiT": (
        lambda size: build_backbone("timm/deit_tiny_distilled_patch16_224", {"img_size": size, "depth": 1}), "pos_embed", 2,
    ),
    "torchvision": (
        lambda size: torchvision.models.VisionTransformer(size, 16, 1, 2, 16, 16, num_classes=3), "encoder.pos_embedding", 1,
    ),
    "window of Swin": (
        lambda size: build_backbone("timm/swin_tiny_patch4_window7_224", {**SWIN, "window_size": (size - 32) // 8}),
        "layers.0.blocks.0.attn.relative_position_bias_table", None,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's interpolation warns
@pytest.mark.parametrize("kind", VITS)
def test_position_embeddings_are_resampled_to_another_image_size(kind, tmp_path, caplog):
    make, key, tokens = VITS[kind]
    torch.manual_seed(1)
    content = make(96).state_dict()
    content[key].normal_()
    logged, state = load_logged(make(64), {"model": content}, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "INFO"]
    assert key in logged[1][1]
    assert state[key].shape != content[key].shape
    if tokens:
        torch.testing.assert_close(state[key], resample_abs_pos_embed(content[key], [4, 4], num_prefix_tokens=tokens))
    assert all(torch.equal(tensor, content[other]) for other, tensor in state.items() if other != key)


def test_original_parameter_names_are_translated_if_timm_knows_them(tmp_path, caplog):
    torch.manual_seed(1)
    source = timm.create_model("test_convnext", num_classes=5).state_dict()
    renamed = {"stem.": "downsample_layers.0.", "blocks.": "", "conv_dw": "dwconv", "mlp.fc": "pwconv"}
    renamed |= {f"stages.{stage}.downsample": f"downsample_layers.{stage}" for stage in range(1, 4)}
    renamed |= {"head.norm": "norm", "head.fc": "head"}
    original = {}
    for name, tensor in source.items():
        for timms, authors in renamed.items():
            name = name.replace(timms, authors)
        original[name] = tensor
    assert "downsample_layers.0.0.weight" in original
    content = {"model": {name: t + 1 for name, t in original.items()}, "model_ema": original, "args": make_arguments()}
    logged, state = load_logged(build_backbone("timm/test_convnext", {}), content, tmp_path, caplog)
    assert all(torch.equal(tensor, source[name]) for name, tensor in state.items())
    assert [level for level, _ in logged] == ["INFO"]
    assert "EMA" in logged[0][1]


@pytest.mark.parametrize("channels", [1, 4])
def test_first_convolution_is_adapted_to_other_channel_counts(channels, tmp_path, caplog):
    content = make_weights(in_chans=channels)
    logged, state = load_logged(build_backbone("timm/test_resnet", {}), content, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "INFO"]
    first = content["conv1.0.weight"]
    expected = first.expand(-1, 3, -1, -1) / 3 if channels == 1 else first[:, :3] * 4 / 3
    torch.testing.assert_close(state["conv1.0.weight"], expected)


def test_parameters_left_random_are_logged_with_names_and_shapes(tmp_path, caplog):
    content, names = dict(WEIGHTS), ("layer1.0.conv1.weight", "layer2.0.conv1.weight")
    del content[names[0]]
    content[names[1]] = torch.ones(7, 5, 3, 3)
    backbone = build_backbone("timm/test_resnet", {})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    logged, state = load_logged(backbone, {"state_dict": add_prefix("module.", content)}, tmp_path, caplog)
    (warning,) = [text for level, text in logged if level == "WARNING"]
    shape = "x".join(map(str, state[names[1]].shape))
    assert all(part in warning for part in (*names, "7x5x3x3", shape, ": 2 of"))
    assert "fc." not in warning
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name] if name in names else WEIGHTS[name])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"model": {"blocks.0.qkv.weight": torch.ones(9, 3)}}, ["model.blocks.0.qkv.weight", "9x3", "conv1.0.weight"]),
        ({name: torch.ones(*t.shape, 2) for name, t in WEIGHTS.items()}, ["16x3x3x3x2", "16x3x3x3"]),
    ],
    ids=["different names", "different shapes"],
)
def test_weights_of_another_network_are_rejected_naming_both(content, parts, tmp_path, caplog):
    backbone = build_backbone("timm/test_resnet", {})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(SettingsError) as error:
        load_logged(backbone, content, tmp_path, caplog)
    assert all(part in str(error.value) for part in parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_weights_of_a_larger_network_log_a_warning(tmp_path, caplog):
    content = dict(WEIGHTS) | {f"layer1.{n}.{name}": t for n in range(1, 5) for name, t in WEIGHTS.items()}
    logged, _ = load_logged(build_backbone("timm/test_resnet", {}), content, tmp_path, caplog)
    assert [level for level, _ in logged] == ["INFO", "WARNING"]


def image_batch(size: int) -> torch.Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_efficientnet_pytorch_weights_give_timm_the_same_features(tmp_path, caplog):
    from efficientnet_pytorch import EfficientNet

    torch.manual_seed(0)
    source = EfficientNet.from_name("efficientnet-b0", image_size=64).eval()
    for name, tensor in source.state_dict().items():  # statistics that matter
        if name.endswith("running_mean"):
            tensor.normal_(std=0.05)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    torch.save({"state_dict": add_prefix("module.", source.state_dict())}, tmp_path / "b0.pth")
    backbone = build_backbone("timm/tf_efficientnet_b0", {}).eval()
    caplog.set_level("INFO")
    load_matching(backbone, tmp_path / "b0.pth")
    assert "stay random" not in caplog.text
    with torch.inference_mode():
        images = image_batch(64)
        expected = source.extract_features(images).mean(dim=(2, 3))
        assert torch.allclose(backbone(images), expected, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packaged_lite_weights_give_the_logits_of_their_own_library(number):
    from efficientnet_lite_pytorch import EfficientNet

    backbone = f"timm/tf_efficientnet_lite{number}"
    size = published(backbone).size
    found = find_packaged(backbone)
    own = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=str(found.path)).eval()
    network = build_backbone(backbone, {}).eval()
    load_matching(network, found.path)
    with torch.inference_mode():
        images = image_batch(size[0])
        logits = own._fc(network(images))
        assert (logits - own(images)).abs().max() < 1e-3 * own(images).abs().max()
