"""Reads and writes `.pth` files in the public training-checkpoint layout, and reads Hugging Face folders.

A file is a dict of `model`, whose keys are PREFIX + a name of `MoEHuginnModel.state_dict()`, and `model_config`,
a plain dict. Two entries repeat what the model knows: `lm_head.weight` is the tied embedding, and `freqs_cis`
holds RoPE's cos and sin. Both are written, since the public script loads strictly, and checked when read. A folder
holds the same tensors without PREFIX in safetensors files, and the config, partly in other words, in config.json.
"""

import json
import os
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import MoEHuginnConfig
from .model import MoEHuginnModel, rope_tables

PREFIX = "_orig_mod._original_module."
LM_HEAD, EMBEDDING, FREQUENCIES = ("lm_head.weight", "transformer.wte.weight", "freqs_cis")


class CheckpointError(ValueError):
    """A file that is no checkpoint of this model; its text is one line naming the file and the fault."""


def load_checkpoint(path: str | os.PathLike[str]) -> MoEHuginnModel:
    """The model in the file or Hugging Face folder, on the CPU, in the file's own type, in evaluation mode.

    Nothing but tensors and plain values is unpickled. Raises CheckpointError for a file that is missing, broken,
    or of another shape or kind of model.
    """
    path = Path(path)
    content = _read_folder(path) if path.is_dir() else _read(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "model_config" not in content:
        raise CheckpointError(f"{path}: not a dict of 'model' and 'model_config', so no checkpoint of this layout")
    try:
        config = MoEHuginnConfig.from_model_config(content["model_config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None

    weights: dict[str, Tensor] = {}
    for key, value in content["model"].items():
        name = str(key).removeprefix(PREFIX)
        if name in weights:
            raise CheckpointError(f"{path}: {name} stands there twice, with the prefix {PREFIX} and without")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{path}: {name} is not a tensor of floating-point numbers")
        weights[name] = value

    _check_repeated(path, config, weights.pop(LM_HEAD, None), weights.pop(FREQUENCIES, None), weights)
    with torch.device("meta"):  # neither memory nor time for weights that are about to be replaced
        model = MoEHuginnModel(config, seed=None)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{path}: {name} is missing")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(weights[name].shape)}, not {shape}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(f"{path}: {unknown[0]} is not a tensor of this model")

    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return model.requires_grad_(True).eval()


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
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a broken file by whatever its parts happened to raise
        reason = "it holds more than tensors and plain values" if "GLOBAL" in str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded as a checkpoint ({reason})") from None


def _read_folder(folder: Path) -> dict[str, Any]:
    """A folder's content as if it were a file's."""
    from safetensors.torch import load_file

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no such file, nor a Hugging Face folder")
    try:
        config = json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        weights = {name: weight for file in sorted(files) for name, weight in load_file(folder / file).items()}
    except Exception as error:  # whatever a broken file makes its reader raise
        raise CheckpointError(f"{folder}: cannot be loaded as a checkpoint ({type(error).__name__})") from None
    if isinstance(config, dict) and config.get("model_type") == "huginn_raven":
        renamed = {"n_heads": "num_attention_heads", "vocab_size": "padded_vocab_size"}
        config = {renamed.get(name, name): value for name, value in config.items()}
    return {"model": weights, "model_config": config}


def _check_repeated(
    path: Path, config: MoEHuginnConfig, head: Tensor | None, freqs_cis: Tensor | None, weights: dict[str, Tensor]
) -> None:
    """The tied head must be the embedding, and the angles, rounded differently elsewhere, about ours."""
    embedding = weights.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(f"{path}: {LM_HEAD} differs from {EMBEDDING}, but this model ties them")
    if freqs_cis is None:
        return
    ours = frequencies(config)
    if freqs_cis.shape != ours.shape:
        raise CheckpointError(f"{path}: {FREQUENCIES} has shape {tuple(freqs_cis.shape)}, not {tuple(ours.shape)}")
    # cos and sin of float32 angles up to 4096 are off by 2e-4, and bfloat16 rounds them by 4e-3.
    tolerance = 1e-3 if torch.finfo(freqs_cis.dtype).eps < 1e-3 else 1e-2
    error = (freqs_cis.float() - ours).abs().max().item()
    if not error <= tolerance:
        raise CheckpointError(f"{path}: {FREQUENCIES} is off by {error:.1g} from rope_base={config.rope_base:g}")
