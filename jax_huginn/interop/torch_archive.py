"""Reading what `torch.save` wrote without Torch and without running anything: no name in the file is ever looked up.

Unpickling normally imports and calls whatever a file names. Here every name becomes a class of its own that only
records what is done to it (`Inert`), and tensors are recognised among these records afterwards. That is stricter than
`weights_only=True`, reads what it refuses, and leaves the numbers on disk until one tensor is wanted.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.foreign_weights import LazyArray

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}


class Inert:
    """An object of the file that is neither plain nor a plain container: what it was made of, and nothing it could do.

    Every name in the file becomes a subclass; `path` is the name.
    """

    path = "?"
    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **_: Any) -> "Inert":
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, {}
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing: `object` would refuse the arguments."""

    def __call__(self, *args: Any, **_: Any) -> "Inert":
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, _: Any) -> None:
        """Drops the element, as do `extend` and `add`: no list-like object is of use."""

    extend = add = append

    def __repr__(self) -> str:
        return f"<{self.path}>"


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """The one written in Python: the other lets ten bytes of a file (a memo index of 2^28) take 4 GB."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self._classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._classes:
            self._classes[key] = type("Inert", (Inert,), {"path": ".".join(key)})
        return self._classes[key]

    def persistent_load(self, pid: Any) -> Any:
        return Inert(pid)  # a storage: ("storage", type, key, device, numbers in it)


class TorchArchive:
    """A file written by `torch.save` (since 1.6, a zip archive of one pickle and of the storages, uncompressed).

    Raises:
        WeightsError: a file that is none, is broken or holds a program (TorchScript).
    """

    def __init__(self, path: Path):
        try:
            self.zip = zipfile.ZipFile(path)
            pickles = [name for name in self.zip.namelist() if name.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1:
                raise WeightsError(f"{path}: a zip archive that torch.save did not write")
            self.folder = pickles[0].removesuffix("data.pkl")
            self.sizes = {entry.filename: entry.file_size for entry in self.zip.infolist()}
            if self.folder + "constants.pkl" in self.sizes:
                raise WeightsError(f"{path}: a TorchScript program, not a checkpoint")
            room = path.stat().st_size
            for entry in self.zip.infolist():  # torch.save compresses nothing, so nothing can grow when it is read
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > room:
                    raise WeightsError(f"{path}: a zip archive that torch.save did not write")
            order = self.folder + "byteorder"
            if order in self.sizes and self.zip.read(order) != b"little":
                raise WeightsError(f"{path}: written on a big-endian machine")
            with self.zip.open(pickles[0]) as file:
                self.content = _Unpickler(file).load()  # pyright: ignore[reportArgumentType]
        except WeightsError:
            raise
        except Exception as error:  # a broken file breaks whatever part of it is read first
            reason = "broken, or not written by torch.save since version 1.6"
            raise WeightsError(f"{path}: {reason} ({type(error).__name__})") from None

    def tensor(self, value: Any) -> LazyArray | None:
        """The tensor that a value of the pickle represents; None for anything else, or out of bounds."""
        try:
            return self._tensor(value)
        except (TypeError, ValueError, IndexError, AttributeError):  # records need not have the form they should
            return None

    def _tensor(self, value: Any) -> LazyArray | None:
        if not isinstance(value, Inert):
            return None
        if value.path == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes: (function, type, its args)
            function, _, arguments, *_ = value.args
            return self._tensor(function(*arguments))
        if value.path in _PARAMETERS:
            return self._tensor(value.args[0])
        if value.path not in _TENSORS:
            return None
        storage, offset, shape, strides = value.args[:4]
        (kind, storage_type, key, *_) = storage.args[0]
        name = f"{self.folder}data/{key}"
        dtype = np.dtype(_DTYPES.get(storage_type.path.removeprefix("torch."), np.void))
        numbers = (offset, *shape, *strides)
        if kind != "storage" or len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            return None
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        empty = 0 in shape
        if name not in self.sizes or (not empty and (last + 1) * dtype.itemsize > self.sizes[name]):
            return None
        return LazyArray(tuple(shape), dtype, _Read(self, name, dtype, offset, tuple(shape), tuple(strides)))

    def storage(self, name: str, dtype: np.dtype) -> np.ndarray:
        """All numbers of a storage; the archive's checksum is compared on the way.

        Raises:
            WeightsError: the file is broken there.
        """
        numbers = np.empty(self.sizes[name] // dtype.itemsize, dtype)
        buffer, filled = memoryview(numbers.view(np.uint8)), 0  # pyright: ignore[reportArgumentType]
        try:
            with self.zip.open(name) as file:
                while count := file.readinto(buffer[filled : filled + 2**24]):  # pyright: ignore[reportAttributeAccessIssue]
                    filled += count
            if filled < numbers.nbytes:
                raise EOFError("a storage is too short")
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:  # whatever zipfile meets
            raise WeightsError(f"{self.zip.filename}: broken ({error})") from None
        return numbers


class _Read:
    """Reads one tensor; two that are the same part of one storage compare equal."""

    def __init__(self, archive: TorchArchive, *view: Any):
        self.archive, self.view = archive, view

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Read) and (self.archive, self.view) == (other.archive, other.view)

    def __hash__(self) -> int:
        return hash(self.view)

    def __call__(self) -> np.ndarray:
        name, dtype, offset, shape, strides = self.view
        numbers = self.archive.storage(name, dtype)
        steps = [stride * dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps)


def plain(value: Any) -> Any:
    """A config that was pickled as an object, as the dict of its attributes; anything else unchanged."""
    if not isinstance(value, Inert):
        return value
    if value.items:  # a dict of some class
        return value.items
    state = value.state
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = {**(state[0] or {}), **(state[1] or {})}
    return state if isinstance(state, Mapping) else value
