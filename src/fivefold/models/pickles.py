"""Tensors of a file that `torch.save` wrote, read without running anything that it names.

A pickle names classes and functions, and calls them. Here each name stands for a class of ours that does nothing, so that a
checkpoint's settings, of whatever class, are passed over. Tensors are first records of where their numbers lie.
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
"""What files of torch before 1.6 start with, as a pickled number."""
DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8},
    **{"ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16},
    **{"IntStorage": torch.int32, "LongStorage": torch.int64},
}
DEPTH = 10
"""Maps inside maps are followed so far."""


class Storage(NamedTuple):
    """Numbers of one kind in the file: `numel` of them under `key`."""

    dtype: torch.dtype
    key: str
    numel: int


class Stored(NamedTuple):
    """A tensor as the file describes it, its numbers not yet read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, numbers: Callable[[Storage], bytearray]) -> Tensor:
        if not self.storage.numel:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(numbers(self.storage), dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)  # refuses what lies outside


class Inert(dict[Any, Any]):
    """Stands for an object of any class: it keeps the items of a map and passes over all else that its pickle gives it."""

    kind: ClassVar[str] = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return dict.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Sets nothing."""

    def append(self, item: Any) -> None:
        """Keeps nothing."""

    extend = append
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Ordered(Inert):
    """Stands for an OrderedDict, which old pickles make of pairs."""

    def __init__(self, pairs: Any = ()) -> None:
        dict.__init__(self, pairs)


class OfStorage(Inert):
    """Stands for the function that makes a tensor of a storage."""

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
        if len(more) > 2 and isinstance(more[2], torch.dtype) and isinstance(storage, Storage):
            numel = storage.numel * storage.dtype.itemsize // more[2].itemsize
            storage = Storage(more[2], storage.key, numel)
        sound = isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
        numbers = (offset, *size, *stride) if sound else (None,)
        if any(type(number) is not int or number < 0 for number in numbers) or prod(size) > storage.numel:
            return Inert()
        return Stored(storage, offset, size, stride)


class OfTensor(Inert):
    """Stands for the functions that make a parameter of a tensor, or bring one to its device."""

    def __new__(cls, tensor: Any = None, *_: Any) -> Any:
        return tensor


class OfType(Inert):
    """Stands for the function that makes a tensor of a subclass: the tensor alone is kept."""

    def __new__(cls, function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
        known = function in (OfStorage, OfTensor) and isinstance(arguments, tuple)
        return function(*arguments) if known else Inert()


class Reader(pickle.Unpickler):
    """An unpickler that imports nothing: what it can call are the classes above."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote bytes where names are
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch":
            found = vars(torch).get(name) if module == "torch" else None
            if isinstance(found, torch.dtype):
                return found
            if name in DTYPES:
                return DTYPES[name]
        return MAKERS.get((module, name)) or type("Inert", (Inert,), {"kind": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """A storage of the file: `("storage", kind, key, device, numel)`, and in old files a view, None almost always."""
        match pid:
            case ("storage" | b"storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view):
                if numel >= 0 and not any(view):
                    return self.storages.setdefault(key, Storage(dtype, key, numel))
        return Inert()


MAKERS: dict[tuple[str, str], type[Inert]] = {
    ("collections", "OrderedDict"): Ordered,
    **{("torch._utils", f"_rebuild_tensor{version}"): OfStorage for version in ("", "_v2", "_v3")},
    **{("torch._utils", f"_rebuild_parameter{state}"): OfTensor for state in ("", "_with_state")},
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): OfTensor,
    ("torch._tensor", "_rebuild_from_type_v2"): OfType,
}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """All tensors of the file but the optimiser's, on the CPU, by the names on the way to them: `state_dict.conv1.weight`.

    Raises DataError for a file of another kind, one that is damaged, and one that holds no named tensors.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            return _of_zip(path) if zipped else _of_stream(path, file)
        except DataError:
            raise
        except Exception as error:  # of a file that is none, an unpickler raises whatever it stumbles over
            raise DataError(f"{path} is damaged, or no file of torch.save ({type(error).__name__})") from error


def _of_zip(path: Path) -> dict[str, Tensor]:
    with ZipFile(path) as file:
        names = file.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), None)
        if root is None:
            raise DataError(
                f"{path} is a zip, and none that torch.save wrote; give its .pth or .safetensors file itself"
            )
        if f"{root}constants.pkl" in names:
            raise DataError(
                f"{path} is a TorchScript program, not weights; save the state_dict() of the network instead"
            )
        if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
            raise DataError(f"{path} has compressed entries, which torch.save does not write; save it again")
        if f"{root}byteorder" in names and file.read(f"{root}byteorder").decode() != sys.byteorder:
            raise DataError(f"{path} was written on a machine of another byte order; save it again on one like this")
        with file.open(f"{root}data.pkl") as pickled:
            tree = Reader(pickled).load()  # type: ignore[arg-type]
        read: dict[str, bytearray] = {}

        def numbers(storage: Storage) -> bytearray:
            if storage.key not in read:
                read[storage.key] = bytearray(file.read(f"{root}data/{storage.key}"))
            return read[storage.key]

        return _named(path, tree, numbers)


def _of_stream(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """A file of torch before 1.6: five pickles, the fourth with the objects, then each storage's count and numbers."""
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

    return _named(path, tree, numbers)


def _named(path: Path, tree: Any, numbers: Callable[[Storage], bytearray]) -> dict[str, Tensor]:
    tensors = {name: stored.read(numbers) for name, stored in _walk(tree, (), set())}
    if tensors:
        return tensors
    values = tree.values() if isinstance(tree, dict) else ()
    kinds = [value.kind for value in (tree, *values) if isinstance(value, Inert) and value.kind]
    whole = (
        f"; it holds objects such as {kinds[0]!r}, whose code is not run: save the state_dict() of the network"
        if kinds
        else ""
    )
    raise DataError(f"{path} holds no state dict, a map of names to tensors{whole}")


def _walk(tree: Any, way: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, Stored]]:
    """The tensors below `tree` with their names; keys that are no texts are an optimiser's, and each map is met once."""
    if isinstance(tree, Stored):
        if way:
            yield ".".join(way), tree
    elif isinstance(tree, dict | list | tuple) and len(way) < DEPTH and id(tree) not in seen:
        seen.add(id(tree))
        items = tree.items() if isinstance(tree, dict) else ((str(n), value) for n, value in enumerate(tree))
        for key, value in items:
            if isinstance(key, str) and not key.startswith("optim"):
                yield from _walk(value, (*way, key), seen)
