"""Weights from elsewhere, whatever their layout: a `.pth` file, a Hugging Face folder, or one on the hub."""

import os
import re
from pathlib import Path

from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.foreign_weights import Weights
from jax_huginn.interop.huggingface import read_huggingface
from jax_huginn.interop.pth import read_pth

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # no code: none of it would run


def open_weights(source: str | os.PathLike) -> Weights:
    """The weights in a `.pth` file, in a Hugging Face folder, or of a model on the hub, named OWNER/NAME. None of them
    is trusted, and nothing in them runs.

    Raises:
        WeightsError: there is nothing to read, it is broken, or it is of a model that this one cannot be.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _fetched(str(source))
    return read_huggingface(path) if path.is_dir() else read_pth(path)


def _fetched(name: str) -> Path:
    """The folder of a model on the hub, fetched into the Hugging Face cache unless it is there."""
    if not _HUB_NAME.fullmatch(name):
        raise WeightsError(
            f"no model at {name}: give a run folder, a step folder, a .pth file, a Hugging Face folder, or OWNER/NAME "
            "of a model on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # whatever the hub, the network or the cache does
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"no model at {name}: no such file or folder, and none from the hub ({reason})") from None
