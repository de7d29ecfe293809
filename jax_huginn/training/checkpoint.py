"""Checkpoints of a run: RUN/checkpoints/<step>/ by Orbax, written asynchronously, each one atomic.

A step holds four items: `params`, `optimizer`, `data` (the exact position) and `meta` (config and versions), the
last two JSON. No pickle is involved.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

import jax_huginn.model.huginn as huginn
from jax_huginn.config.schema import CheckpointConfig, Config, from_dict, to_dict
from jax_huginn.data.position import whole_position
from jax_huginn.parallel.mesh import replicated, shardings
from jax_huginn.parallel.processes import gather_text
from jax_huginn.training.step import TrainState, init_state

CHECKPOINTS = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be used; its text is one line."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_dir: Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        # Orbax takes a relative path and fails late.
        self.manager = ocp.CheckpointManager((run_dir / CHECKPOINTS).resolve(), options=options)

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState, data: Any, config: Config) -> None:
        """Start writing the state after `state.step` steps; returns once the arrays are on the host.

        Args:
            data: the training batches, `data.pipeline.TrainBatches`.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        items = {
            "params": ocp.args.StandardSave(nnx.to_pure_dict(state.params)),
            "optimizer": ocp.args.StandardSave(state.opt_state),
            "data": ocp.args.JsonSave(gather_position(data.get_state())),
            "meta": ocp.args.JsonSave({"step": step, "config": to_dict(config), "jax": jax.__version__}),
        }
        self.manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, data: Any, config: Config, mesh: Mesh) -> TrainState:
        """The state after `step` steps, split over this mesh whatever mesh wrote it; sets `data` to its position."""
        abstract = jax.eval_shape(lambda: init_state(config))
        items = {
            "params": ocp.args.StandardRestore(nnx.to_pure_dict(_split(abstract.params, mesh))),
            "optimizer": ocp.args.StandardRestore(_split(abstract.opt_state, mesh)),
            "data": ocp.args.JsonRestore(),
        }
        restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        data.set_state(restored["data"])
        params = abstract.params
        nnx.replace_by_pure_dict(params, restored["params"])
        return TrainState(nnx.as_pure(params), restored["optimizer"], replicated(np.int32(step), mesh))

    def close(self) -> None:
        """Block until the last save is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def gather_position(part: dict[str, Any]) -> dict[str, Any]:
    """The whole position in the data from every process's part."""
    return whole_position([json.loads(text) for text in gather_text(json.dumps(part))])


def find_step(run_or_step: str | os.PathLike) -> Path:
    """The step folder that a path means: itself, or the newest step of a run folder."""
    path = Path(run_or_step)
    if (path / "params").is_dir():
        return path
    if not path.is_dir():
        raise CheckpointError(f"no run or checkpoint folder at {path}")
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = [entry for entry in folder.iterdir() if entry.name.isdecimal() and (entry / "params").is_dir()]
    if not steps:
        raise CheckpointError(f"no checkpoint in {path}: train first, or name a run folder or a step folder")
    return max(steps, key=lambda entry: int(entry.name))


def load_config(run_or_step: str | os.PathLike) -> Config:
    """The config that a checkpoint was written with."""
    step = find_step(run_or_step)
    return from_dict(_restore_item(step, "meta", ocp.args.JsonRestore())["config"])


def load_checkpoint(run_or_step: str | os.PathLike) -> huginn.MoEHuginnModel:
    """The model of a run's newest checkpoint, or of one step folder; its `config` attribute is the run's.

    Raises:
        CheckpointError: no checkpoint there.
    """
    step = find_step(run_or_step)
    config = load_config(step)
    graphdef, params = huginn.abstract_model(config)
    return nnx.merge(graphdef, restore_params(step, _placed(params)))


def restore_params(step: Path, abstract: Any) -> Any:
    """The parameters in a step folder, typed and placed as the `abstract` ones are."""
    restored = _restore_item(step, "params", ocp.args.StandardRestore(nnx.to_pure_dict(abstract)))
    nnx.replace_by_pure_dict(abstract, restored)
    return nnx.as_pure(abstract)


def _restore_item(step: Path, item: str, args: Any) -> Any:
    """One of the items of a step folder."""
    with ocp.CheckpointManager(step.parent.resolve()) as manager:
        return manager.restore(int(step.name), args=ocp.args.Composite(**{item: args}))[item]


def _split(tree: Any, mesh: Mesh) -> Any:
    """The abstract arrays, to be restored as each device's part of them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings(tree, mesh)
    )


def _placed(tree: Any) -> Any:
    """The abstract arrays, to be restored onto the default device whatever device they were saved from."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
