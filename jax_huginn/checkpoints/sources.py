"""What holds a model: a run folder, a step folder, a `.pth` file, a Hugging Face folder, or the name of one on the hub.

Every command that takes a model finds it here, so that all accept the same and refuse with the same line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_huginn.checkpoints.digest import files_of_weights
from jax_huginn.checkpoints.load import config_of, find_step, restore_params
from jax_huginn.checkpoints.step_folders import CHECKPOINTS, CHECKSUMS
from jax_huginn.config.schema import Config
from jax_huginn.files import sha256_of
from jax_huginn.interop.foreign_weights import LazyArray
from jax_huginn.interop.open_weights import open_weights
from jax_huginn.model.huginn import MoEHuginnModel, abstract_model, cast_params
from jax_huginn.parallel.mesh import available_devices


@dataclass(frozen=True)
class Source:
    """A model that was found and described, but not loaded yet."""

    path: Path
    """The step folder, the `.pth` file or the Hugging Face folder."""
    config: Config
    """A run's own config; of other sources the sections `model`, `moe` and `recurrence`, the others are defaults."""
    tokenizer: Path | None
    """The folder of the tokenizer that comes with the model."""
    params: Callable[[Any], Any]
    """Reads the parameters, typed and placed as a tree of `jax.ShapeDtypeStruct` with shardings says; one array after
    the other, so that no second copy of the weights is ever in memory."""

    def digest(self) -> str:
        """SHA-256 of the weights' files, which identifies the model: 64 hexadecimal digits."""
        return sha256_of(files_of_weights(self.path))


def open_source(source: str | os.PathLike) -> Source:
    """Find a model; a run folder means its newest whole checkpoint, OWNER/NAME that is no path a model on the hub.

    Raises:
        CheckpointError, WeightsError: nothing there that can be read, or a model that this one cannot be.
    """
    path = Path(source).expanduser()
    if path.is_dir() and _is_run(path):
        step = find_step(path)
        tokenizer = step.parent.parent / "tokenizer"
        found = tokenizer if (tokenizer / "tokenizer.json").is_file() else None
        return Source(step, config_of(step), found, lambda target: restore_params(step, target))
    weights = open_weights(source)
    return Source(
        weights.path, weights.config, weights.tokenizer, lambda target: _largest_first(target, weights.params())
    )


def load_checkpoint(source: str | os.PathLike) -> MoEHuginnModel:
    """The model that a source holds, with its weights as they were saved; its `config` attribute is the source's.

    Args:
        source: a run folder (its newest whole checkpoint), a step folder, a `.pth` file, a Hugging Face folder or the
            name of one on the hub, for example `tomg-group-umd/huginn-0125`.

    Raises:
        CheckpointError, WeightsError: nothing there that can be read, or a model that this one cannot be.
    """
    return open_and_load(source)[1]


def open_and_load(source: str | os.PathLike) -> tuple[Source, MoEHuginnModel]:
    """`load_source(open_source(source))`, also from a run in training, which may delete the step that is being read."""
    while True:
        found = open_source(source)
        try:
            return found, load_source(found)
        except Exception:
            if found.path.exists():
                raise


def load_source(source: Source) -> MoEHuginnModel:
    """The model of a source with its weights in `model.param_dtype`, on the default device."""
    graphdef, params = abstract_model(source.config)
    return nnx.merge(graphdef, source.params(_on_one_device(params)))


def load_for_inference(
    source: Source, dtype: str | None = None, shardings: Callable[[Any], Any] | None = None
) -> MoEHuginnModel:
    """The model of a source with its weights in the type that it computes in, read straight into it.

    Args:
        dtype: `bfloat16`, `float32` or `float64`; the model's own `model.dtype` when not given.
        shardings: from the abstract parameters to their shardings; all on the default device when not given.
    """
    model = replace(source.config.model, dtype=dtype or source.config.model.dtype)
    config = replace(source.config, model=model)
    graphdef, params = abstract_model(config)
    target = jax.eval_shape(lambda tree: cast_params(tree, model.dtype), params)
    if shardings is None:
        placed = _on_one_device(target)
    else:
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), target, shardings(target)
        )
    return nnx.merge(graphdef, source.params(placed))


def _is_run(path: Path) -> bool:
    """Whether a folder is a run, its folder of checkpoints, or a step."""
    step = (path / "params").is_dir() or (path / CHECKSUMS).is_file()
    return step or (path / CHECKPOINTS).is_dir() or path.name == CHECKPOINTS


def _on_one_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(available_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)


def _largest_first(target: Any, lazy: Any) -> Any:
    """The arrays read in an order in which the copies that reading makes are large only while little is loaded."""
    targets, structure = jax.tree.flatten(target)
    sources = structure.flatten_up_to(lazy)
    placed = {i: _placed(targets[i], sources[i]) for i in sorted(range(len(targets)), key=lambda i: -targets[i].size)}
    return structure.unflatten(placed[i] for i in range(len(targets)))


def _placed(target: jax.ShapeDtypeStruct, lazy: LazyArray) -> jax.Array:
    array = np.asarray(lazy.read(), target.dtype)
    placed = jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])
    return jax.block_until_ready(placed)  # or every tensor would wait in host memory
