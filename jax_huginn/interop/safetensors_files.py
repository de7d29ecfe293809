"""The safetensors format, read and written one tensor at a time.

A file is the length of a header (8 bytes, little-endian), the header (JSON: type, shape and byte range of each name)
and the numbers. The library's NumPy reader knows no bfloat16, and its writer wants all tensors of a file in memory.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.foreign_weights import LazyArray

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Declared = dict[str, tuple[tuple[int, ...], np.dtype]]
Tensors = Iterator[tuple[str, np.ndarray]]
_HEADER_LIMIT = 100_000_000  # bytes, the format's own


def read_tensors(path: Path) -> dict[str, LazyArray]:
    """Every tensor of a file, none of which is read yet.

    Raises:
        WeightsError: no such file, or not a whole file of this format.
    """
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_LIMIT, size - 8):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise WeightsError(f"{path}: {name} has numbers of type {entry['dtype']}, which is not read here")
            dtype = np.dtype(DTYPES[entry["dtype"]])
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError
            if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError
            tensors[name] = LazyArray(shape, dtype, partial(_read, path, 8 + length + begin, dtype, shape))
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{path}: broken, or no safetensors file of plain numbers") from None
    return tensors


def _read(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.fromfile(path, np.uint8, math.prod(shape) * dtype.itemsize, offset=offset)
    return numbers.view(dtype).reshape(shape)


def write_shards(folder: Path, declared: Declared, tensors: Tensors, limit: int) -> None:
    """Write `model.safetensors`, or numbered files of at most `limit` bytes of tensors each and their index.

    Args:
        declared: shape and type of every tensor, by name.
        tensors: them, in the same order; one is held at a time.
    """
    shards: list[Declared] = [{}]
    filled = total = 0
    for name, (shape, dtype) in declared.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        _write(folder / SINGLE, declared, tensors)
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write(folder / file, shard, tensors)
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(path: Path, declared: Declared, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in declared.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, (shape, dtype) in declared.items():
            name, array = next(tensors)
            assert (name, array.shape) == (expected, shape)
            file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)  # tofile hides a full disk
