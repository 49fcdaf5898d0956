"""Weights on disk: safetensors, written atomically by the caller; a .pth is read without code."""

import logging
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from fivefold.errors import DataError, MissingInputError, SettingsError

log = logging.getLogger("fivefold")
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "backbone.")
LEAST_SHARE = 0.5
"""A file that fits fewer of the backbone's tensors than this is another network's."""


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Writes a state dict as safetensors, bytes that depend on its values alone; who may read it says the umask, where the file system knows that."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in sorted(state.items())}, path)
    with suppress(OSError):  # some network file systems know no modes
        path.chmod(mode)  # safetensors leaves the file to its owner alone


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth (`weights_only=True`), wrappers and prefixes removed."""
    if not path.is_file():
        raise MissingInputError(f"no weights at {path}")
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is none, torch's unpickler raises whatever it stumbles over
        raise DataError(f"{path} cannot be read as weights: {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict: a map of names to tensors is needed")
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = inside or state
    return state


def start_from(backbone: nn.Module, path: Path) -> None:
    """Loads the tensors of `path` that fit into `backbone`, by name and shape, and logs what was left.

    Raises SettingsError when fewer than half of the backbone's tensors are found there.
    """
    state, own = read_weights(path), backbone.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if len(fitting) < LEAST_SHARE * len(own):
        raise SettingsError(
            f"{path} fits {len(fitting)} of the backbone's {len(own)} tensors: these are another network's weights"
        )
    backbone.load_state_dict(fitting, strict=False)
    log.info(
        "weights from %s: %d of %d tensors, %d of the file's unused",
        path,
        len(fitting),
        len(own),
        len(state) - len(fitting),
    )


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
