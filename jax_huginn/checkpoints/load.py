"""Read a checkpoint: the newest whole step of a run, its config and its parameters."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

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


def restore_params(step: Path, abstract: Any) -> Any:
    """The parameters in a step folder, typed and placed as the `abstract` ones are; one array is read after the other,
    the largest first, so that the copies that reading makes are large only while little is loaded.

    Raises:
        DamagedError: their values are not those that were saved.
    """
    kind = config_of(step).model.param_dtype  # as they were saved: the checksums are of that type
    saved = step_folders.array_sums(step)
    tree = nnx.to_pure_dict(abstract)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    restored: dict[int, jax.Array] = {}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        for place, (path, target) in sorted(enumerate(leaves), key=lambda entry: -entry[1][1].size):
            one = _nested(path, jax.ShapeDtypeStruct(target.shape, kind, sharding=target.sharding))
            arguments = jax.tree.map(
                lambda x: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding, global_shape=x.shape), one
            )
            item = ocp.args.PyTreeRestore(item=one, restore_args=arguments, partial_restore=True)
            found = reader.restore(step.resolve(), args=ocp.args.Composite(params=item))["params"]
            compare_arrays(step, "params", found, saved)
            restored[place] = jax.block_until_ready(jax.tree.leaves(found)[0].astype(target.dtype))
    nnx.replace_by_pure_dict(abstract, jax.tree.unflatten(structure, [restored[i] for i in range(len(leaves))]))
    return nnx.as_pure(abstract)


def _nested(path: Any, leaf: Any) -> Any:
    """The part of a tree of dicts that leads to one leaf."""
    for entry in reversed(path):
        leaf = {entry.key: leaf}
    return leaf


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
