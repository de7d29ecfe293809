"""Reading what `torch.save` wrote while running nothing of it.

Training checkpoints also pickle tokenizers, loaders and optimisers. Tensors and plain containers are rebuilt; every
other name in the file becomes an inert record, so that nothing is imported or called and the weights are still found.
"""

import collections
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2


class Inert:
    """Stand-in for any class or function that a file names: keeps the state, runs nothing."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing: `object` would refuse the arguments."""

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, *_: Any) -> None:
        """Drops the entry, as do the next for list-like objects."""

    append = extend = add = __setitem__

    def __repr__(self) -> str:
        return "<an object>"


_REBUILT: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
}


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """The one written in Python: the other lets ten bytes of a file (a memo index of 2^28) take 4 GB."""

    def find_class(self, module: str, name: str) -> Any:
        return _REBUILT.get((module, name), Inert)


_INERT_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, __name__="inert_pickle")


def read_archive(path: Path) -> Any:
    """The content of the file. Its checksums are compared first: Torch does not, and a flipped bit would be scored.

    Tensors are mapped into memory, so that an optimiser's cost nothing. Whatever a broken file makes its reader raise
    is raised.
    """
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename for entry in archive.infolist()]
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("a TorchScript program")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed, which torch.save never does")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"damaged: the checksum of {damaged} differs")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_INERT_PICKLE)


def plain(value: Any) -> Any:
    """A config that was pickled as an object, as the dict of its attributes; anything else unchanged."""
    return value.state if isinstance(value, Inert) and isinstance(value.state, dict) else value
