"""The public training-checkpoint layout, `.pth`: a dict of `model`, whose keys are PREFIX + name, and `model_config`.

Reading needs no Torch; writing does, and this is the only module here that imports it, late.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_huginn.files import reason, whole_file
from jax_huginn.interop.errors import ExportError, WeightsError, check_target
from jax_huginn.interop.foreign_weights import EMBEDDING, FREQUENCIES, LM_HEAD, LazyArray, Weights, checked, frequencies
from jax_huginn.interop.model_config import config_of, model_config
from jax_huginn.interop.names import params_of, to_torch
from jax_huginn.interop.torch_archive import Inert, TorchArchive, plain

if TYPE_CHECKING:
    from jax_huginn.model.huginn import MoEHuginnModel

PREFIX = "_orig_mod._original_module."
"""What torch.compile and the public training wrapper put before every name."""


def read_pth(path: str | os.PathLike) -> Weights:
    """The weights in a file of the public layout, ours or one that the public training code wrote.

    The latter also pickles its tokenizer, loaders and optimiser; whatever the file holds, nothing of it is run, and all
    but `model` and `model_config` is left where it is. Tensors are read when asked for, one at a time.

    Raises:
        WeightsError: no such file, no such layout, or a model that this one cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    archive = TorchArchive(path)
    content = plain(archive.content)
    model = plain(content.get("model")) if isinstance(content, dict) else None
    if not isinstance(model, dict) or "model_config" not in content:
        raise WeightsError(f"{path}: not a dict of 'model' and 'model_config', so no checkpoint of this layout")

    tensors: dict[str, LazyArray] = {}
    for key, value in model.items():
        tensor = archive.tensor(value)
        if tensor is None:
            raise WeightsError(f"{path}: {key} is not a tensor, or reaches out of the file")
        tensors[str(key)] = tensor

    described = plain(content["model_config"])
    if isinstance(described, dict) and isinstance(described.get("rope_settings"), Inert):
        described = {**described, "rope_settings": plain(described["rope_settings"])}
    # A run's export lies in its folder, beside the tokenizer.
    tokenizer = path.parent / "tokenizer"
    return checked(
        path,
        tensors,
        lambda dtype: config_of(described, f"{path}: model_config.", dtype),
        tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
    )


def write_pth(model: MoEHuginnModel, path: str | os.PathLike, dtype: str | None = None) -> None:
    """Write `model` as a `.pth` that `torch.load(weights_only=True)` and the public scripts read.

    Args:
        dtype: of the tensors, `bfloat16`, `float32` or `float64`; the parameters' own when not given.

    Raises:
        ExportError: the file exists, its folder does not, or torch is missing.
    """
    path = Path(path)
    check_target(path)
    try:
        import torch
    except ImportError:
        raise ExportError("writing a .pth needs PyTorch: pip install 'jax-huginn[torch]'") from None

    config = model.config
    kind = getattr(torch, dtype or config.model.param_dtype)

    def tensor(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array, order="C"))

    tensors = {PREFIX + name: tensor(array).to(kind) for name, array in to_torch(params_of(model))}
    tensors[PREFIX + LM_HEAD] = tensors[PREFIX + EMBEDDING]
    tensors[PREFIX + FREQUENCIES] = tensor(frequencies(config))
    try:
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            torch.save({"model": tensors, "model_config": model_config(config)}, file)
    except (OSError, RuntimeError) as error:  # torch wraps what the file system said
        raise ExportError(f"{path} cannot be written: {reason(error)}") from None
