"""Weights on disk: save and load models as safetensors, and initialise backbones from checkpoints of other programs."""

import hashlib
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from math import isqrt
from pathlib import Path

from torch import Tensor, nn

from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.log import log
from fivefold.models.safe_pickle import read_torch_file

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name parts that torch inserts anywhere if a network is compiled, sharded or uses activation checkpointing."""
AVERAGED = {"ema", "swa", "teacher", "averaged"}
"""Name parts of weights that are an average over the training."""
MIN_FRACTION = 0.5
"""If a smaller fraction of the backbone's tensors fits, the file contains another network."""
MAX_UNUSED = 0.25
"""If a larger fraction of the tensors below a prefix is unused, they may be of a larger network; a head has fewer."""
STEM = "_conv_stem.weight"
"""A tensor of the libraries efficientnet_pytorch and efficientnet_lite_pytorch."""
EFFICIENTNET_PARTS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
SQUEEZE_PARTS = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
EFFICIENTNET_BLOCKS = {
    "DepthwiseSeparableConv": SQUEEZE_PARTS
    | {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    "InvertedResidual": SQUEEZE_PARTS
    | {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    | {"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
"""timm's names of the libraries' parts, of the network and by the type of a block."""
MAX_SHOWN = 20
"""Maximum number of tensors that a message names."""


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors, with bytes that depend only on its values; the umask sets the file's permissions."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in sorted(state.items())}, path)
    with suppress(OSError):  # some network file systems have no modes
        path.chmod(mode)  # safetensors lets only the owner read the file


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or `torch.save` file by their path in it, without running code from the file."""
    if not path.is_file():
        raise MissingInputError(f"no weights at {path}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the weights: download them with `git lfs pull`")
    pickled = head[:1] in (b"P", b"\x80") and head[8:9] != b"{"
    tensors = read_torch_file(path) if pickled else _read_safetensors(path)
    if not tensors:
        raise DataError(f"{path} contains no tensors")
    return {".".join(p for p in name.split(".") if p not in WRAPPERS): tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{path} is damaged, or neither a safetensors nor a torch.save file ({type(error).__name__})"
        ) from error


@dataclass(frozen=True)
class WeightMatch:
    """The match between a backbone and the tensors of a file below the prefix `prefix`.

    `named`: tensors with the backbone's names, as in the file; `matched`: those with the backbone's shapes, some of them
    resampled; `learned`: number of these that training changes; `unused`: number of the file's tensors not in `matched`.
    """

    prefix: str
    named: Mapping[str, Tensor]
    matched: Mapping[str, Tensor]
    learned: int
    unused: int

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED & set(self.prefix.replace("_", ".").split(".")))


def load_matching(backbone: nn.Module, path: Path) -> None:
    """Load the tensors of `path` that fit `backbone`, log them, and warn about tensors that keep random values.

    Names can have an extra prefix. If the file has several sets, the best match is loaded, or an average (EMA) of equal
    matches. Position embeddings, relative position tables and a first convolution with other channels are resampled.
    Raise a SettingsError if fewer than half of the backbone's tensors match.
    """
    tensors, expected = read_weights(path), _trainable_state(backbone)
    matches = [_match(prefix, tensors, backbone, expected) for prefix in _find_prefixes(tensors, expected)]
    best = max(matches, key=lambda match: (match.learned, match.averaged))
    if best.learned < MIN_FRACTION * len(expected):
        file_name, name = next(iter(tensors)), next(iter(expected))
        raise SettingsError(
            f"{path} fits {best.learned} of the backbone's {len(expected)} tensors, so it contains another network; the file "
            f"has {file_name!r} ({_format_shape(tensors[file_name])}), the backbone {name!r} ({_format_shape(expected[name])})"
        )
    backbone.load_state_dict(dict(best.matched), strict=False)
    others = [repr(m.prefix) for m in matches if m is not best and m.learned >= MIN_FRACTION * len(expected)]
    source = f"those below {best.prefix!r}" if best.prefix else "by their names"
    source += ", an average (EMA)" if best.averaged else ""
    source += f", not those below {_shorten(others)}" if others else ""
    counts = f"{best.learned} of the backbone's {len(expected)} tensors, {source}; {best.unused} of the file's unused"
    log.info("weights from %s: %s", path, counts)
    shapes = {name: _format_shape(tensor) for name, tensor in backbone.state_dict().items()}
    shapes |= {name: f"{shapes[name]}, in the file {_format_shape(tensor)}" for name, tensor in best.named.items()}
    changed = [name for name, tensor in best.matched.items() if best.named[name].shape != tensor.shape]
    resampled = [f"{name!r} ({shapes[name]})" for name in changed]
    if resampled:
        log.info("weights from %s: resampled to the backbone's shapes: %s", path, _shorten(resampled))
    if best.unused > MAX_UNUSED * (best.unused + len(best.matched)):
        log.warning("weights from %s: %d of its tensors are unused; are they of a larger network?", path, best.unused)
    missing = [f"{name!r} ({shapes[name]})" for name in expected if name not in best.matched]
    if missing:
        text = "weights from %s: %d of the backbone's tensors stay random: %s"
        log.warning(text, path, len(missing), _shorten(missing))


def _trainable_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters, and the running means and variances of BatchNorm."""
    parameters, statistics = dict(backbone.named_parameters()), ("running_mean", "running_var")
    state = backbone.state_dict()
    return {name: tensor for name, tensor in state.items() if name in parameters or name.endswith(statistics)}


def _find_prefixes(names: Iterable[str], expected: Collection[str]) -> list[str]:
    """Return the prefixes in the file that may precede the backbone's names, at least one."""
    sizes = Counter(prefix for name in names for prefix in _prefixes(name))
    equal = Counter(prefix for name in names for prefix in _prefixes(name) if name[len(prefix) :] in expected)
    most = max(equal.values(), default=0)
    prefixes = [prefix for prefix, count in equal.most_common() if count >= MIN_FRACTION * most]
    if most < MIN_FRACTION * len(expected):
        # Other names, which timm may translate: try every prefix with enough tensors.
        prefixes += [prefix for prefix, count in sizes.items() if count >= MIN_FRACTION * len(expected)]
    return list(dict.fromkeys(prefixes)) or [""]


def _prefixes(name: str) -> list[str]:
    """Return all prefixes of a name: for `a.b.c` the empty one, `a.` and `a.b.`."""
    return ["", *accumulate(f"{part}." for part in name.split(".")[:-1])]


def _match(
    prefix: str, tensors: Mapping[str, Tensor], backbone: nn.Module, expected: Mapping[str, Tensor]
) -> WeightMatch:
    by_name = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def count_equal(table: Mapping[str, Tensor]) -> int:
        return sum(name in table and table[name].shape == tensor.shape for name, tensor in expected.items())

    table = by_name
    if count_equal(by_name) < len(expected):
        table = max((by_name, by_name | _translate(by_name, backbone)), key=count_equal)
    state = backbone.state_dict()
    named = {name: by_name.get(name, table[name]) for name in state if name in table}
    resampled = {name: _resample(name, table[name], state[name]) for name in named}
    matched = {name: tensor for name, tensor in resampled.items() if tensor.shape == state[name].shape}
    learned = len(matched.keys() & expected.keys())
    return WeightMatch(prefix, named, matched, learned, max(0, len(by_name) - len(matched)))


def _translate(tensors: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors with timm's names and shapes if timm or `_rename_efficientnet` can translate the authors', else none."""
    if STEM in tensors:
        return _rename_efficientnet(tensors, backbone)
    module = sys.modules[type(backbone).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if translate is None or not module.__name__.startswith("timm."):
        return {}
    parameters = signature(translate).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about timm's code
            renamed = translate(dict(tensors), *[backbone][: len(parameters) - 1], **options)
    except Exception as error:  # timm's function can fail in any way on unexpected names
        log.debug("timm does not translate these weights: %s", error)
        return {}
    return {name: tensor for name, tensor in renamed.items() if isinstance(tensor, Tensor)}


def _rename_efficientnet(tensors: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return tensors of the libraries efficientnet_pytorch and efficientnet_lite_pytorch with the names of timm's EfficientNets.

    The libraries count all blocks from 0; timm counts them in each stage, and names their parts by the type of the block.
    """
    stages = getattr(backbone, "blocks", ())
    blocks = [
        (f"blocks.{s}.{b}", type(block).__name__) for s, stage in enumerate(stages) for b, block in enumerate(stage)
    ]
    parts: dict[str, str] = dict(EFFICIENTNET_PARTS)
    for number, (name, kind) in enumerate(blocks):
        parts |= {f"_blocks.{number}.{old}": f"{name}.{new}" for old, new in EFFICIENTNET_BLOCKS.get(kind, {}).items()}
    renamed = {}
    for name, tensor in tensors.items():
        part, _, last = name.rpartition(".")
        if part in parts:
            renamed[f"{parts[part]}.{last}"] = tensor
    return renamed


def _resample(name: str, tensor: Tensor, expected: Tensor) -> Tensor:
    """Adapt a first convolution to 3 channels as timm does, or torchvision's positions to another square grid; return others unchanged."""
    shape, target = tuple(tensor.shape), tuple(expected.shape)
    if len(shape) == len(target) == 4 and target[1] == 3 != shape[1] and shape == (target[0], shape[1], *target[2:]):
        channels = max(1, shape[1])
        return tensor.float().repeat(1, -(-3 // channels), 1, 1)[:, :3] * (channels / 3)
    if name.endswith("pos_embedding") and len(shape) == len(target) == 3 and shape[::2] == target[::2]:
        old, new = (isqrt(max(0, size[1] - 1)) for size in (shape, target))  # without the class token
        if old and [old * old + 1, new * new + 1] == [shape[1], target[1]]:
            from timm.layers import resample_abs_pos_embed

            return resample_abs_pos_embed(tensor, [new, new])
    return tensor


def _format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _shorten(texts: list[str]) -> str:
    return "; ".join(texts[:MAX_SHOWN]) + (f" and {len(texts) - MAX_SHOWN} more" if len(texts) > MAX_SHOWN else "")


def load_strict(model: nn.Module, path: Path) -> None:
    """Load a model that `save_weights` wrote. Raise a DataError unless every tensor is present with its shape."""
    if not path.is_file():
        raise MissingInputError(f"no weights at {path}")
    try:
        model.load_state_dict(_read_safetensors(path))
    except RuntimeError as error:
        raise DataError(f"{path} does not contain the weights that its model.json describes: {error}") from error


def digest_weights(network: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
