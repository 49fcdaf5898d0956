"""Read the tensors of a `torch.save` file without running any code that it names.

Unpickling normally calls the classes and functions that a pickle names. Here every name maps to a class of ours that does
nothing, so objects of any class, such as a checkpoint's settings, are ignored. Tensors are first read as descriptions of
where their data are in the file.
"""

import pickle
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor

from fivefold.errors import DataError

MAGIC = 0x1950A86A20F9469CFC6C
"""The pickled number at the start of files of torch before 1.6."""
DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8},
    **{"ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16},
    **{"IntStorage": torch.int32, "LongStorage": torch.int64},
}
MAX_DEPTH = 10
"""Maximum depth of nested dicts and lists that are searched for tensors."""


class Storage(NamedTuple):
    """A storage of the file: `numel` numbers of type `dtype` under `key`."""

    dtype: torch.dtype
    key: str
    numel: int


class TensorRecord(NamedTuple):
    """A tensor as the file describes it, before its numbers are read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, numbers: Callable[[Storage], bytearray]) -> Tensor:
        if not self.storage.numel:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(numbers(self.storage), dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)  # raises if outside of the storage


class Placeholder(dict[Any, Any]):
    """Placeholder for an object of any class: it keeps dict items and ignores everything else in its pickle."""

    kind: ClassVar[str] = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return dict.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def append(self, item: Any) -> None:
        """Ignore the item."""

    extend = append
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class OrderedDictPlaceholder(Placeholder):
    """Placeholder for OrderedDict, which old pickles build from pairs."""

    def __init__(self, pairs: Any = ()) -> None:
        dict.__init__(self, pairs)


class StoragePlaceholder(Placeholder):
    """Placeholder for the function that builds a tensor from a storage."""

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        if len(more) > 2 and isinstance(more[2], torch.dtype) and isinstance(storage, Storage):
            numel = storage.numel * storage.dtype.itemsize // more[2].itemsize
            storage = Storage(more[2], storage.key, numel)
        sound = isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
        numbers = (offset, *size, *stride) if sound else (None,)
        if any(type(number) is not int or number < 0 for number in numbers) or prod(size) > storage.numel:
            return Placeholder()
        return TensorRecord(storage, offset, size, stride)


class TensorPlaceholder(Placeholder):
    """Placeholder for the functions that make a tensor a parameter, or move it to its device."""

    def __new__(cls, tensor: Any = None, *_: Any) -> Any:
        return tensor


class SubclassPlaceholder(Placeholder):
    """Placeholder for the function that builds a tensor of a subclass: keep the plain tensor."""

    def __new__(cls, function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
        known = function in (StoragePlaceholder, TensorPlaceholder) and isinstance(arguments, tuple)
        return function(*arguments) if known else Placeholder()


class Reader(pickle.Unpickler):
    """An unpickler that imports nothing: it can only call the classes above."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote names as bytes
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch":
            dtype = vars(torch).get(name) if module == "torch" else None
            if isinstance(dtype, torch.dtype):
                return dtype
            if name in DTYPES:
                return DTYPES[name]
        return MAKERS.get((module, name)) or type("Inert", (Placeholder,), {"kind": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of `("storage", kind, key, device, numel)`; old files add a view, which is nearly always None."""
        match pid:
            case ("storage" | b"storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view):
                if numel >= 0 and not any(view):
                    return self.storages.setdefault(key, Storage(dtype, key, numel))
        return Placeholder()


MAKERS: dict[tuple[str, str], type[Placeholder]] = {
    ("collections", "OrderedDict"): OrderedDictPlaceholder,
    **{("torch._utils", f"_rebuild_tensor{version}"): StoragePlaceholder for version in ("", "_v2", "_v3")},
    **{("torch._utils", f"_rebuild_parameter{state}"): TensorPlaceholder for state in ("", "_with_state")},
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): TensorPlaceholder,
    ("torch._tensor", "_rebuild_from_type_v2"): SubclassPlaceholder,
}


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the file except the optimiser's, on the CPU, by their path in it: `state_dict.conv1.weight`.

    Raise a DataError if the file has another format, is damaged, or has no named tensors.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            return _read_zip(path) if zipped else _read_stream(path, file)
        except DataError:
            raise
        except Exception as error:  # the unpickler can raise any error if the file has another format
            raise DataError(f"{path} is damaged, or not a torch.save file ({type(error).__name__})") from error


def _read_zip(path: Path) -> dict[str, Tensor]:
    with ZipFile(path) as file:
        names = file.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), None)
        if root is None:
            raise DataError(
                f"{path} is a zip that torch.save did not write; set the path of the .pth or .safetensors file inside it"
            )
        if f"{root}constants.pkl" in names:
            raise DataError(
                f"{path} is a TorchScript program, not weights; save the state_dict() of the network instead"
            )
        if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
            raise DataError(
                f"{path} has compressed entries, which torch.save never writes; save it again with torch.save"
            )
        if f"{root}byteorder" in names and file.read(f"{root}byteorder").decode() != sys.byteorder:
            raise DataError(f"{path} has another byte order than this machine; save it again on a machine like this")
        with file.open(f"{root}data.pkl") as pickled:
            tree = Reader(pickled).load()  # type: ignore[arg-type]
        read: dict[str, bytearray] = {}

        def numbers(storage: Storage) -> bytearray:
            if storage.key not in read:
                read[storage.key] = bytearray(file.read(f"{root}data/{storage.key}"))
            return read[storage.key]

        return _named_tensors(path, tree, numbers)


def _read_stream(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """Read a file of torch before 1.6: five pickles, the fourth with the objects, then each storage's count and numbers."""
    if Reader(file).load() != MAGIC:
        raise DataError(f"{path} is a pickle that torch.save did not write; save a state_dict() with torch.save")
    for _ in range(2):  # the protocol, and sizes of C's types
        Reader(file).load()
    reader = Reader(file)
    tree = reader.load()
    places = {}
    for key in Reader(file).load():
        size = int.from_bytes(file.read(8), "little") * reader.storages[key].dtype.itemsize
        places[key] = (file.tell(), size)
        file.seek(size, 1)
    read: dict[str, bytearray] = {}

    def numbers(storage: Storage) -> bytearray:
        if storage.key not in read:
            start, size = places[storage.key]
            file.seek(start)
            read[storage.key] = bytearray(file.read(size))
        return read[storage.key]

    return _named_tensors(path, tree, numbers)


def _named_tensors(path: Path, tree: Any, numbers: Callable[[Storage], bytearray]) -> dict[str, Tensor]:
    tensors = {name: stored.read(numbers) for name, stored in _walk(tree, (), set())}
    if tensors:
        return tensors
    values = tree.values() if isinstance(tree, dict) else ()
    kinds = [value.kind for value in (tree, *values) if isinstance(value, Placeholder) and value.kind]
    hint = (
        f"; it contains objects such as {kinds[0]!r}, whose code is never run: save the state_dict() of the network"
        if kinds
        else ""
    )
    raise DataError(f"{path} contains no state dict (names mapped to tensors){hint}")


def _walk(tree: Any, names: tuple[str, ...], visited: set[int]) -> Iterator[tuple[str, TensorRecord]]:
    """Yield the tensors in `tree` with their names. Skip keys that are not text, which are an optimiser's, and visited dicts."""
    if isinstance(tree, TensorRecord):
        if names:
            yield ".".join(names), tree
    elif isinstance(tree, dict | list | tuple) and len(names) < MAX_DEPTH and id(tree) not in visited:
        visited.add(id(tree))
        items = tree.items() if isinstance(tree, dict) else ((str(n), value) for n, value in enumerate(tree))
        for key, value in items:
            if isinstance(key, str) and not key.startswith("optim"):
                yield from _walk(value, (*names, key), visited)
