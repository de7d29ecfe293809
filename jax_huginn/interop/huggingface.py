"""A Hugging Face folder: config.json, model.safetensors (in shards when it is large) and the tokenizer's files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_huginn.files import reason, whole_folder
from jax_huginn.interop.errors import ExportError, WeightsError, check_target
from jax_huginn.interop.foreign_weights import (
    EMBEDDING,
    FLOATS,
    FREQUENCIES,
    LM_HEAD,
    LazyArray,
    Weights,
    checked,
    frequencies,
    tensor_shapes,
)
from jax_huginn.interop.model_config import config_of_huggingface, huggingface_config
from jax_huginn.interop.names import params_of, to_torch
from jax_huginn.interop.safetensors_files import INDEX, SINGLE, read_tensors, write_shards

if TYPE_CHECKING:
    from jax_huginn.model.huginn import MoEHuginnModel

_MODELLING_FILES = (
    "huggingface.py", "model.py", "layers.py", "moe.py", "cache.py", "config.py", "initial_state.py",
)  # fmt: skip
SHARD_BYTES = 5_000_000_000


def read_huggingface(folder: str | os.PathLike) -> Weights:
    """The weights in a folder of huginn-0125's layout or of ours, sharded or not. Tensors are read when asked for.

    Raises:
        WeightsError: a file that is missing or broken, or a model that this one cannot be.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder}: no config.json there, so neither a run nor a Hugging Face folder")
    described = _read_json(folder / "config.json")
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        tensors = _read_shards(folder)
    else:
        tensors = read_tensors(folder / SINGLE)
    return checked(
        folder,
        tensors,
        lambda dtype: config_of_huggingface(described, f"{folder / 'config.json'}: ", dtype),
        folder if (folder / "tokenizer.json").is_file() else None,
    )


def _read_shards(folder: Path) -> dict[str, LazyArray]:
    index = _read_json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise WeightsError(f"{folder / INDEX}: no 'weight_map' of names to files")
    shards = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise WeightsError(f"{folder / INDEX}: {file!r} is not a file of this folder")
        shards[file] = read_tensors(folder / file)
    for name, file in where.items():
        if name not in shards[file]:
            raise WeightsError(f"{folder / file}: {name} is missing, which {INDEX} places there")
    return {name: shards[file][name] for name, file in where.items()}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read as JSON: {error}") from None


def write_huggingface(
    model: MoEHuginnModel,
    folder: str | os.PathLike,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` as a folder; one tensor at a time leaves the device.

    Args:
        tokenizer: folder whose files are copied into the new one; there it puts BOS before every text, as training did.
        dtype: of the tensors, `bfloat16`, `float32` or `float64`; the parameters' own when not given.
        shard_bytes: most bytes of tensors in one file.

    Raises:
        ExportError: the folder exists or cannot be written.
    """
    folder = Path(folder)
    check_target(folder)
    config, params = model.config, params_of(model)
    kind = dtype or config.model.param_dtype
    number = next(number for number, name in FLOATS.items() if name == kind)
    declared = {
        name: (shape, np.dtype(np.float32) if name == FREQUENCIES else number)
        for name, shape in tensor_shapes(config, params).items()
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from to_torch(params)
        yield LM_HEAD, np.asarray(params[EMBEDDING.split(".")[1]])
        yield FREQUENCIES, frequencies(config)

    try:
        with whole_folder(folder) as unfinished:
            if tokenizer:
                shutil.copytree(tokenizer, unfinished, dirs_exist_ok=True)
                _begin_with_bos(unfinished)
            _copy_modelling_files(unfinished)
            ids = token_ids(unfinished)
            _write_json(unfinished / "config.json", {**huggingface_config(config, kind), **ids})
            _write_json(unfinished / "generation_config.json", ids)  # without an EOS id generation never stops
            write_shards(unfinished, declared, tensors(), shard_bytes)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {reason(error)}") from None


def _copy_modelling_files(folder: Path) -> None:
    """The twin's own, with which Transformers opens the folder where `trust_remote_code` allows it."""
    twin = find_spec("torch_reference")  # found, not imported: that would need torch
    if twin is None or twin.origin is None:
        raise ExportError("the package torch_reference is not installed, whose files every folder holds")
    for name in _MODELLING_FILES:
        shutil.copyfile(Path(twin.origin).with_name(name), folder / name)


def _begin_with_bos(folder: Path) -> None:
    """Let the tokenizer in a folder begin every text with BOS, unless it adds special tokens by a rule of its own.

    The project's own code adds BOS itself. Transformers and lm-eval do what the tokenizer says.
    """
    bos = token_ids(folder).get("bos_token_id")
    if bos is None:
        return
    file = folder / "tokenizer.json"
    content = _read_json(file)
    rule = content.get("post_processor")
    if rule is not None and (rule.get("type") != "TemplateProcessing" or rule.get("special_tokens")):
        return
    name = next(token["content"] for token in content["added_tokens"] if token["id"] == bos)
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }
    _write_json(file, content)


def token_ids(tokenizer: Path) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of the tokenizer in a folder, as far as it defines them."""
    if not ((tokenizer / "tokenizer.json").is_file() and (tokenizer / "tokenizer_config.json").is_file()):
        return {}
    content, described = (_read_json(tokenizer / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    numbers = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = described.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in numbers:
            ids[f"{name}_token_id"] = numbers[token]
    return ids


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
