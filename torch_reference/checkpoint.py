"""Reads and writes `.pth` files in the public training-checkpoint layout, and reads Hugging Face folders.

A file is a dict of `model`, whose keys are PREFIX + a name of `MoEHuginnModel.state_dict()`, and `model_config`,
a plain dict. Two entries repeat what the model knows: `lm_head.weight` is the tied embedding, and `freqs_cis`
holds RoPE's cos and sin. Both are written, since the public script loads strictly, and checked when read. A folder
holds the same tensors without PREFIX in safetensors files, and the config, partly in other words, in config.json.
"""

import json
import os
import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .archive import Inert, plain, read_archive
from .config import MoEHuginnConfig, model_config_of
from .layers import rope_tables
from .model import MoEHuginnModel

PREFIX = "_orig_mod._original_module."
LM_HEAD, EMBEDDING, FREQUENCIES = ("lm_head.weight", "transformer.wte.weight", "freqs_cis")


_WRAPPERS = re.compile(r"^((_orig_mod|_forward_module|_original_module|module|model)\.)+")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CheckpointError(ValueError):
    """A file that is no checkpoint of this model; its text is one printable line naming the file and the fault."""

    def __init__(self, text: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in text)[:1000])


def load_checkpoint(path: str | os.PathLike[str]) -> MoEHuginnModel:
    """The model in the file or Hugging Face folder, on the CPU, in the file's own type, in evaluation mode.

    Nothing in the file runs: all but tensors and plain values is left inert. Raises CheckpointError for a file that is
    missing, broken, not finite, or of another shape or kind of model.
    """
    path = Path(path)
    content = plain(_read_folder(path) if path.is_dir() else _read(path))
    tensors = plain(content.get("model")) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or "model_config" not in content:
        raise CheckpointError(f"{path}: not a dict of 'model' and 'model_config', so no checkpoint of this layout")
    described = plain(content["model_config"])
    if isinstance(described, dict) and isinstance(described.get("rope_settings"), Inert):
        described = {**described, "rope_settings": plain(described["rope_settings"])}
    try:
        config = MoEHuginnConfig.from_model_config(described)
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None

    weights = _unwrapped(path, tensors)
    head, freqs_cis = weights.pop(LM_HEAD, None), weights.pop(FREQUENCIES, None)
    if EMBEDDING not in weights and head is not None:  # one of two tied tensors is all that some writers keep
        weights[EMBEDDING] = head
    _check_repeated(path, config, head, freqs_cis, weights)
    expected = _shapes(path, config, len(weights))
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{path}: {name} is missing")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(weights[name].shape)}, not {shape}")
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(f"{path}: {unknown[0]} is not a tensor of this model")

    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    with torch.device("meta"):  # neither memory nor time for weights that are about to be replaced
        model = MoEHuginnModel(config, seed=None)
    # Copied: the tensors of a file are views into it.
    model.load_state_dict({name: weight.to(dtype, copy=True) for name, weight in weights.items()}, assign=True)
    return model.requires_grad_(True).eval()


def _unwrapped(path: Path, tensors: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors under the names that they have without `torch.compile` and training wrappers.

    The public training code saves every tensor twice, as `_forward_module` and as `_original_module`, of which the
    latter counts. Any other two of one name must be equal.
    """
    weights: dict[str, Tensor] = {}
    keys = [str(key) for key in tensors]
    originals = {_WRAPPERS.sub("", key) for key in keys if "_original_module." in key}
    for key, value in zip(keys, tensors.values(), strict=True):
        name = _WRAPPERS.sub("", key)
        if "_forward_module." in key and name in originals:
            continue
        if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
            raise CheckpointError(f"{path}: {name} is not a tensor of floating-point numbers of 16 bits or more")
        if name in weights and not torch.equal(weights[name], value):
            raise CheckpointError(f"{path}: {name} is there twice, as {key} too, with other numbers")
        weights[name] = value
    return weights


def _shapes(path: Path, config: MoEHuginnConfig, count: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, which is not made of numbers that may be anything."""
    blocks = config.n_layers_in_prelude + config.n_layers_in_recurrent_block + config.n_layers_in_coda
    if blocks + config.num_experts > count:
        raise CheckpointError(f"{path}: {count} tensors are too few for a model of {blocks} blocks and its experts")
    try:
        with torch.device("meta"):
            model = MoEHuginnModel(config, seed=None)
    except (RuntimeError, OverflowError, TypeError):  # more numbers than a tensor can have
        raise CheckpointError(f"{path}: model_config describes a model too large to exist") from None
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def save_checkpoint(model: MoEHuginnModel, path: str | os.PathLike[str]) -> None:
    """Writes the model as it is, in its own type; the file appears whole or not at all.

    Raises CheckpointError when the file exists or its folder does not.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already, and is not overwritten")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}")
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    weights[LM_HEAD] = weights[EMBEDDING]  # one storage, written once
    weights[FREQUENCIES] = frequencies(model.config)
    content = {
        "model": {PREFIX + name: weight for name, weight in weights.items()},
        "model_config": model.config.to_model_config(),
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def frequencies(config: MoEHuginnConfig) -> Tensor:
    """The buffer `freqs_cis`: cos and sin stacked last, (1, block_size, 1, K/2, 2) float32."""
    tables = rope_tables(config.block_size, config.head_dim, config.rope_base, torch.device("cpu"))
    return torch.stack(tables, dim=-1)[None].float()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return read_archive(path)
    except Exception as error:  # torch reports a broken file by whatever its parts happened to raise
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded as a checkpoint ({reason})") from None


def _read_folder(folder: Path) -> dict[str, Any]:
    """A folder's content as if it were a file's."""
    from safetensors.torch import load_file

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no such file, nor a Hugging Face folder")
    try:
        config = json.loads((folder / "config.json").read_text())
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file() or not index.is_file():  # as Transformers chooses where both are there
            weights = load_file(single)
        else:
            where = json.loads(index.read_text())["weight_map"]
            if any(Path(file).name != file for file in where.values()):
                raise ValueError("a shard lies outside of the folder")
            shards = {file: load_file(folder / file) for file in sorted(set(where.values()))}
            weights = {name: shards[file][name] for name, file in where.items()}
    except Exception as error:  # whatever a broken file makes its reader raise
        raise CheckpointError(f"{folder}: cannot be loaded as a checkpoint ({type(error).__name__})") from None
    try:
        return {"model": weights, "model_config": model_config_of(config)}
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _check_repeated(
    path: Path, config: MoEHuginnConfig, head: Tensor | None, freqs_cis: Tensor | None, weights: dict[str, Tensor]
) -> None:
    """The tied head must be the embedding, and the angles, rounded differently elsewhere, about ours."""
    embedding = weights.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(f"{path}: {LM_HEAD} differs from {EMBEDDING}, but this model ties them")
    if freqs_cis is None:
        return
    shape = (1, config.block_size, 1, config.head_dim // 2, 2)  # before angles are made for any length
    if tuple(freqs_cis.shape) != shape:
        raise CheckpointError(f"{path}: {FREQUENCIES} has shape {tuple(freqs_cis.shape)}, not {shape}")
    ours = frequencies(config)
    # cos and sin of float32 angles up to 4096 are off by 2e-4, and bfloat16 rounds them by 4e-3.
    tolerance = 1e-3 if torch.finfo(freqs_cis.dtype).eps < 1e-3 else 1e-2
    error = (freqs_cis.float() - ours).abs().max().item()
    if not error <= tolerance:
        raise CheckpointError(f"{path}: {FREQUENCIES} is off by {error:.1g} from rope_base={config.rope_base:g}")
