"""Opening the weights of others, whatever their layout."""

import os
from pathlib import Path

from jax_huginn.interop.foreign_weights import Weights
from jax_huginn.interop.huggingface import read_huggingface
from jax_huginn.interop.pth import read_pth


def open_weights(path: str | os.PathLike) -> Weights:
    """The weights in a `.pth` file or a Hugging Face folder; neither is trusted, and nothing in them runs.

    Raises:
        WeightsError: there is nothing to read, it is broken, or it is of a model that this one cannot be.
    """
    path = Path(path)
    if path.is_dir():
        return read_huggingface(path)
    return read_pth(path)
