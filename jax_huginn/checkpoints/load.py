"""Read a checkpoint: the config, the parameters or the model of a run folder or of one step folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

import jax_huginn.model.huginn as huginn
from jax_huginn.checkpoints import step_folders
from jax_huginn.checkpoints.checksums import as_hex, checksums
from jax_huginn.checkpoints.step_folders import CHECKPOINTS, CheckpointError, DamagedError
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.dicts import from_dict
from jax_huginn.config.schema import Config

_MODEL = ("params", "meta")  # the items that make a model


def find_step(run_or_step: str | os.PathLike) -> Path:
    """The step folder that a path means: itself, or the newest good step of a run folder.

    Its parameters and its config are compared with their checksums. A damaged step of a run is passed over, with a
    line on stderr; nothing is moved, since the run may be in training.

    Raises:
        CheckpointError: none there, or only damaged ones.
    """
    path = Path(run_or_step)
    if not path.is_dir():
        raise CheckpointError(f"no run or checkpoint folder at {path}")
    if (path / "params").is_dir() or (path / step_folders.CHECKSUMS).is_file():
        step_folders.verify(path, _MODEL)
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    newest, faults = step_folders.newest_good(folder, _MODEL)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(
            f"every checkpoint in {path} is damaged"
            if faults
            else f"no checkpoint in {path}: train first, or name a run folder or a step folder"
        )
    return folder / str(newest)


def load_config(run_or_step: str | os.PathLike) -> Config:
    """The config that a checkpoint was written with."""
    return config_of(find_step(run_or_step))


def load_checkpoint(run_or_step: str | os.PathLike) -> huginn.MoEHuginnModel:
    """The model of a run's newest good checkpoint, or of one step folder; its `config` attribute is the run's.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    return load_step(find_step(run_or_step))


def load_step(step: Path) -> huginn.MoEHuginnModel:
    """The model of a step folder that `find_step` gave, which has read all its files once to compare them.

    Raises:
        DamagedError: its values are not those that were saved.
    """
    graphdef, params = huginn.abstract_model(config_of(step))
    return nnx.merge(graphdef, restore_params(step, _placed(params)))


def restore_params(step: Path, abstract: Any) -> Any:
    """The parameters in a step folder, typed and placed as the `abstract` ones are.

    Raises:
        DamagedError: their values are not those that were saved.
    """
    kind = config_of(step).model.param_dtype  # as they were saved: the checksums are of that type
    saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind, sharding=x.sharding), abstract)
    restored = read_items(step, params=ocp.args.StandardRestore(nnx.to_pure_dict(saved)))["params"]
    compare_arrays(step, "params", restored, step_folders.array_sums(step))
    restored = jax.tree.map(lambda x, target: x.astype(target.dtype), restored, nnx.to_pure_dict(abstract))
    nnx.replace_by_pure_dict(abstract, restored)
    return nnx.as_pure(abstract)


def config_of(step: Path) -> Config:
    """The config of a step folder that `find_step` gave."""
    try:
        return from_dict(json.loads((step / "meta/metadata").read_text(encoding="utf-8"))["config"])
    except ConfigError as error:
        raise CheckpointError(f"{step}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{step}: its config cannot be read ({type(error).__name__})") from None


def read_items(step: Path, **items: Any) -> Any:
    """Some of the items of a step folder, each by its `ocp.args`."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(step.resolve(), args=ocp.args.Composite(**items))


def compare_arrays(step: Path, item: str, arrays: Any, saved: step_folders.ArraySums) -> None:
    """Raises DamagedError where an array is not what was saved."""
    for name, value in as_hex(checksums(arrays)).items():
        if saved.get(item, {}).get(name) != value:
            raise DamagedError(step, f"{item} {name} does not hold the values that were saved")


def _placed(tree: Any) -> Any:
    """The abstract arrays, to be restored onto the default device whatever device they were saved from."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
