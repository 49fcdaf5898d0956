"""Weights on disk: our own as safetensors, written atomically by the caller; those of others in the forms that people have."""

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from math import isqrt
from pathlib import Path

from torch import Tensor, nn

from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.models.pickles import read_pickled

log = logging.getLogger("fivefold")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch puts into names, anywhere, where a network is compiled, sharded or checkpointed."""
AVERAGED = {"ema", "swa", "teacher", "averaged"}
"""Words in names of weights that are an average over the training."""
LEAST_SHARE = 0.5
"""A file that fits fewer of the backbone's tensors than this is another network's."""
MOST_UNUSED = 0.25
"""A place of a file of which more is left over may be of a larger network; a head is less."""
SHOWN = 20
"""Tensors that a message names."""


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Writes a state dict as safetensors, bytes that depend on its values alone; who may read it says the umask, where the file system knows that."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in sorted(state.items())}, path)
    with suppress(OSError):  # some network file systems know no modes
        path.chmod(mode)  # safetensors leaves the file to its owner alone


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of one of `torch.save`, whatever it is called; none of its code is run.

    Their names are those of the way to them, `state_dict.module.conv1.weight`.
    """
    if not path.is_file():
        raise MissingInputError(f"no weights at {path}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`")
    pickled = head[:1] in (b"P", b"\x80") and head[8:9] != b"{"
    tensors = read_pickled(path) if pickled else _read_safetensors(path)
    if not tensors:
        raise DataError(f"{path} holds no tensors")
    parts = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in tensors}
    return {".".join(parts[name]): tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{path} is damaged, or neither a safetensors file nor one of torch.save ({type(error).__name__})"
        ) from error


@dataclass(frozen=True)
class Source:
    """What the tensors below one place of a file are to a backbone.

    `named`: by its names, as they lie there; `found`: those of its shapes, some of them `resampled`; `learned`: how many
    of these a training had made; `unused`: how many of the file's are no part of it.
    """

    place: str
    named: Mapping[str, Tensor]
    found: Mapping[str, Tensor]
    resampled: list[str]
    learned: int
    unused: int

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED & set(self.place.replace("_", ".").split(".")))


def start_from(backbone: nn.Module, path: Path) -> None:
    """Loads the tensors of `path` that fit into `backbone`, and logs which they are; what stays random is a warning.

    Names may have a prefix that the backbone's lack, or lack one. Of several sets in the file the one that fits best is
    taken, of equal ones an average (EMA). Position embeddings, tables of relative positions and a first convolution of
    other channels are resampled. Raises SettingsError when fewer than half of the backbone's tensors are there.
    """
    tensors, wanted = read_weights(path), _learned(backbone)
    sources = _sources(tensors, backbone, wanted)
    taken = max(sources, key=lambda source: (source.learned, source.averaged))
    if taken.learned < LEAST_SHARE * len(wanted):
        raise SettingsError(
            f"{path} fits {taken.learned} of the backbone's {len(wanted)} tensors: these are another network's weights; "
            + _beside(tensors, taken, wanted)
        )
    backbone.load_state_dict(dict(taken.found), strict=False)
    others = [other.place for other in sources if other is not taken and other.learned >= LEAST_SHARE * len(wanted)]
    log.info(
        "weights from %s: %d of the backbone's %d tensors, %s%s%s; %d of the file's unused",
        path,
        taken.learned,
        len(wanted),
        f"those below {taken.place!r}" if taken.place else "by their names",
        ", an average (EMA)" if taken.averaged else "",
        f", not those below {_some([*map(repr, others)])}" if others else "",
        taken.unused,
    )
    if taken.resampled:
        log.info("weights from %s: resampled to the backbone's shapes: %s", path, _some(taken.resampled))
    if taken.unused > MOST_UNUSED * (taken.unused + len(taken.found)):
        log.warning(
            "weights from %s: %d tensors have no place in the backbone: a larger network's?", path, taken.unused
        )
    left = [_left(name, tensor, taken) for name, tensor in wanted.items() if name not in taken.found]
    if left:
        log.warning("weights from %s: %d of the backbone's tensors stay random: %s", path, len(left), _some(left))


def _learned(backbone: nn.Module) -> dict[str, Tensor]:
    """What a training makes of a network: parameters, and the means and variances of BatchNorm."""
    parameters, counted = dict(backbone.named_parameters()), ("running_mean", "running_var")
    state = backbone.state_dict()
    return {name: tensor for name, tensor in state.items() if name in parameters or name.endswith(counted)}


def _sources(tensors: Mapping[str, Tensor], backbone: nn.Module, wanted: Mapping[str, Tensor]) -> list[Source]:
    """The places of the file to start from, at least one."""
    places = _places(tensors, wanted)
    if not places or places[0][2] < LEAST_SHARE * len(wanted):
        # Others' names, which timm may know how to translate: wherever there are enough of them.
        below = Counter(start for name in tensors for start in _starts(name))
        places += [(start, "", 0) for start, count in below.items() if count >= LEAST_SHARE * len(wanted)]
    pairs = dict.fromkeys((place, lacking) for place, lacking, _ in places) or {("", ""): None}
    return [_source(place, lacking, tensors, backbone, wanted) for place, lacking in pairs]


def _places(names: Iterable[str], wanted: Iterable[str]) -> list[tuple[str, str, int]]:
    """Prefixes in the file and in the backbone that, taken off, make most names equal, and how many; the first has most."""
    own = list(wanted)
    common = [
        start for start, count in Counter(s for name in own for s in _starts(name)).items() if count > len(own) / 2
    ]
    counts: Counter[tuple[str, str]] = Counter()
    for lacking in common:
        ends = {name.removeprefix(lacking) for name in own if name.startswith(lacking)}
        part = lacking.rpartition(".")[0].rpartition(".")[2]
        for name in names:
            for start in _starts(name):
                redundant = part and f".{start}".endswith(f".{part}.")
                if name[len(start) :] in ends and not redundant:
                    counts[start, lacking] += 1
    most = max(counts.values(), default=0)
    near = [(*pair, count) for pair, count in counts.items() if count >= LEAST_SHARE * most]
    return sorted(near, key=lambda place: -place[2])


def _starts(name: str) -> list[str]:
    """All that may be a prefix of a name: of `a.b.c` the empty one, `a.` and `a.b.`."""
    return ["", *accumulate(f"{part}." for part in name.split(".")[:-1])]


def _source(
    place: str, lacking: str, tensors: Mapping[str, Tensor], backbone: nn.Module, wanted: Mapping[str, Tensor]
) -> Source:
    below = {lacking + name.removeprefix(place): each for name, each in tensors.items() if name.startswith(place)}
    state = backbone.state_dict()
    ways = [below]
    if any(name not in below or below[name].shape != tensor.shape for name, tensor in wanted.items()):
        ways.append(_translated(below, backbone))
        ways.sort(key=lambda way: -sum(name in way and way[name].shape == wanted[name].shape for name in wanted))
    named, found, resampled = {}, {}, []
    for name, tensor in state.items():
        for given in [way[name] for way in ways if name in way]:
            named.setdefault(name, below.get(name, given))
            fitting = _resampled(name, given, tensor)
            if fitting.shape == tensor.shape:
                found[name] = fitting
                if named[name].shape != tensor.shape:
                    resampled.append(f"{name!r} from {_shape(named[name])} to {_shape(tensor)}")
                break
    learned = len(found.keys() & wanted.keys())
    return Source(place, named, found, resampled, learned, max(0, len(below) - len(found)))


def _translated(below: Mapping[str, Tensor], backbone: nn.Module) -> Mapping[str, Tensor]:
    """The tensors by timm's names and shapes, where timm knows the names of the network's authors or resamples; else none."""
    module = sys.modules[type(backbone).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if translate is None or not module.__name__.startswith("timm."):
        return {}
    known = signature(translate).parameters
    more = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about timm's code
            made = translate(dict(below), backbone, **more) if len(known) > 1 else translate(dict(below))
    except Exception as error:  # it meets names that it was not written for
        log.debug("timm does not translate these weights: %s", error)
        return {}
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)}


def _resampled(name: str, given: Tensor, wanted: Tensor) -> Tensor:
    """A first convolution of other channels, as timm adapts it, or positions of another square grid; others as they are."""
    shape, target = tuple(given.shape), tuple(wanted.shape)
    if len(shape) == len(target) == 4 and target[1] == 3 != shape[1] and shape == (target[0], shape[1], *target[2:]):
        channels = max(1, shape[1])
        return given.float().repeat(1, -(-3 // channels), 1, 1)[:, :3] * (channels / 3)
    if name.endswith(("pos_embed", "pos_embedding")) and len(shape) == len(target) == 3 and shape[::2] == target[::2]:
        for extra in (1, 0, 2, 5):  # tokens of no place: a class, and a distillation or registers
            sides = [isqrt(max(0, size[1] - extra)) for size in (shape, target)]
            if [side * side + extra for side in sides] == [shape[1], target[1]] and all(sides):
                from timm.layers import resample_abs_pos_embed

                return resample_abs_pos_embed(given, [sides[1]] * 2, num_prefix_tokens=extra)
    return given


def _left(name: str, tensor: Tensor, taken: Source) -> str:
    there = f", in the file {_shape(taken.named[name])}" if name in taken.named else ""
    return f"{name!r} ({_shape(tensor)}{there})"


def _beside(tensors: Mapping[str, Tensor], taken: Source, wanted: Mapping[str, Tensor]) -> str:
    """A tensor of the file beside one of the backbone: one of another shape, or else the first of each."""
    own = next((name for name in wanted if name in taken.named and name not in taken.found), None)
    if own is not None:
        return f"{own!r} is {_shape(taken.named[own])} in the file and {_shape(wanted[own])} in the backbone"
    theirs, own = next(iter(tensors)), next(iter(wanted))
    return f"the file has {theirs!r} ({_shape(tensors[theirs])}), the backbone {own!r} ({_shape(wanted[own])})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def load_exactly(model: nn.Module, path: Path) -> None:
    """Loads a model that this project saved; every tensor must be there with its shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingInputError(f"no weights at {path}")
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise DataError(f"{path} does not hold the weights that its model.json describes: {error}") from error
