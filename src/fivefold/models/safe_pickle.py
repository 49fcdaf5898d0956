"""Read the tensors of a `torch.save` file without running any code that it names.

Unpickling normally calls the classes and functions that a pickle names. `torch.load` therefore gets this module in place of
`pickle`: every name maps to a class below that only builds tensors or does nothing, so objects of any class, such as a
checkpoint's settings, are ignored.
"""

import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from tarfile import is_tarfile
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
from torch import Tensor

from fivefold.errors import DataError

MAX_DEPTH = 10
"""Maximum depth of nested dicts and lists that are searched for tensors."""


class Placeholder(dict[Any, Any]):
    """Placeholder for an object of any class: it keeps dict items and ignores everything else in its pickle."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return dict.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state. A class or function of a pickle has no such method, so its state is an error."""

    def append(self, item: Any) -> None:
        """Ignore the item."""

    extend = append
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class StoragePlaceholder(Placeholder):
    """Placeholder for the functions that build a tensor from a storage."""

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        dtype = more[2] if len(more) > 2 and isinstance(more[2], torch.dtype) else storage.dtype
        flat = torch.empty(0, dtype=dtype).set_(storage.untyped())
        # as_strided raises if the tensor is outside of the storage; a size larger than the storage would use any memory
        return flat.as_strided(size, stride, offset) if prod(size) <= flat.numel() else Placeholder()


class TensorPlaceholder(Placeholder):
    """Placeholder for the functions that make a tensor a parameter, or move it to its device."""

    def __new__(cls, tensor: Any = None, *_: Any) -> Any:
        return tensor


MAKERS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.storage", "UntypedStorage"): type("UntypedStorage", (Placeholder,), {"dtype": torch.uint8}),
    **{("torch._utils", f"_rebuild_tensor{version}"): StoragePlaceholder for version in ("", "_v2", "_v3")},
    **{("torch._utils", f"_rebuild_parameter{state}"): TensorPlaceholder for state in ("", "_with_state")},
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): TensorPlaceholder,
}


class Unpickler(pickle.Unpickler):
    """An unpickler that imports nothing: it can only call the classes above and torch's types of storages."""

    def find_class(self, module: str, name: str) -> Any:
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        # A class of its own has no source code, which torch would compare with that of a pickled network.
        return MAKERS.get((module, name)) or type("Inert", (Placeholder,), {})


def load(file: BinaryIO, **options: Any) -> Any:
    """Read one pickle, for `torch.load`."""
    return Unpickler(file, **options).load()


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the file except the optimiser's, on the CPU, by their path in it: `state_dict.conv1.weight`.

    Raise a DataError if the file has another format, is damaged, or has no named tensors.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        _check_format(path, zipped)
        mmap = zipped and path.suffix != ".safetensors"  # of a path with this suffix torch.load expects that format
        options = {"weights_only": False, "mmap": mmap, "encoding": "latin1"}  # Python 2 wrote names as bytes
        # torch warns about its own classes of storages
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            tree = torch.load(path if mmap else file, "cpu", sys.modules[__name__], **options)
    except DataError:
        raise
    except Exception as error:  # the unpickler can raise any error if the file has another format
        raise DataError(f"{path} is damaged, or not a torch.save file ({type(error).__name__})") from error
    tensors = dict(_walk(tree, (), set()))
    if not tensors:
        raise DataError(f"{path} contains no state dict (names of tensors): save the state_dict() of the network")
    return tensors


def _check_format(path: Path, zipped: bool) -> None:
    """Raise a DataError for programs and archives that `torch.load` would run or unpack, and for entries it cannot map."""
    if not zipped and is_tarfile(path):
        raise DataError(f"{path} is a tar archive, not a torch.save file")
    if not zipped:
        return
    names = torch._C.PyTorchFileReader(str(path)).get_all_records()  # torch.load's own reader of zips
    if "constants.pkl" in names:
        raise DataError(f"{path} is a TorchScript program, not weights; save the state_dict() of the network instead")
    with ZipFile(path) as file:
        if any(entry.compress_size != entry.file_size for entry in file.infolist()):
            raise DataError(f"{path} has compressed entries; save it again with torch.save")


def _walk(tree: Any, names: tuple[str, ...], visited: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in `tree` with their names. Skip keys that are not text, which are an optimiser's, and visited dicts."""
    if isinstance(tree, Tensor):
        if names:
            yield ".".join(names), tree
    elif isinstance(tree, dict | list | tuple) and len(names) < MAX_DEPTH and id(tree) not in visited:
        visited.add(id(tree))
        items = tree.items() if isinstance(tree, dict) else ((str(n), value) for n, value in enumerate(tree))
        for key, value in items:
            if isinstance(key, str) and not key.startswith("optim"):
                yield from _walk(value, (*names, key), visited)
