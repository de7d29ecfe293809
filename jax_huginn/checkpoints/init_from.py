"""Start a run from the weights of another run, a `.pth` file or a Hugging Face folder: `checkpoint.init_from`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_huginn.checkpoints.import_run import copy_tokenizer
from jax_huginn.checkpoints.load import config_of, find_step, restore_params
from jax_huginn.checkpoints.step_folders import CHECKPOINTS, CheckpointError
from jax_huginn.config.compatibility import differences_of_model
from jax_huginn.config.schema import Config
from jax_huginn.interop.foreign_weights import LazyArray
from jax_huginn.interop.open_weights import open_weights


@dataclass(frozen=True)
class Start:
    """Weights that fit a run and may become its first."""

    load: Callable[[Any], Any]
    """Takes the run's fresh parameters, frees their memory and returns the weights, typed and placed as they were."""
    tokenizer: Path | None


def open_start(config: Config) -> Start | None:
    """The weights that `checkpoint.init_from` names: a run or step folder, a `.pth` file or a Hugging Face folder.

    None without that option, and where the run goes on from a checkpoint of its own: the source may be gone by then.

    Raises:
        CheckpointError, WeightsError: nothing there that can be read, or a model of another shape; its first field that
            differs is named.
    """
    resumes = config.checkpoint.resume and any(Path(config.run_dir, CHECKPOINTS).glob("[0-9]*"))
    if not config.checkpoint.init_from or resumes:
        return None
    path = Path(config.checkpoint.init_from)
    if not path.exists():
        raise CheckpointError(f"checkpoint.init_from={path}: no such file or folder")
    if (path / "params").is_dir() or (path / CHECKPOINTS).is_dir() or path.name == CHECKPOINTS:
        step = find_step(path)
        if step.parent.resolve() == Path(config.run_dir, CHECKPOINTS).resolve():
            raise CheckpointError(
                f"checkpoint.init_from={path} is the run's own folder, whose checkpoints this command deletes: name "
                "another --run_dir"
            )
        _require_fit(config, config_of(step))
        tokenizer = step.parent.parent / "tokenizer"
        return Start(
            lambda fresh: restore_params(step, _freed(fresh)),
            tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
        )
    weights = open_weights(path)
    _require_fit(config, weights.config)
    return Start(lambda fresh: jax.tree.map(_placed, _freed(fresh), weights.params()), weights.tokenizer)


def adopt_tokenizer(start: Start, config: Config, run_dir: Path) -> str | None:
    """Give a new run the tokenizer of its weights, unless it names one; a warning where text would get another.

    Tokens mean to the weights what they meant to the tokenizer that they were trained with.
    """
    if config.data.tokenizer or (run_dir / "tokenizer/tokenizer.json").exists():
        return None
    if start.tokenizer:
        copy_tokenizer(start.tokenizer, run_dir / "tokenizer")
        return None
    if config.data.source in ("parquet", "hub"):
        return None
    return (
        f"warning: {config.checkpoint.init_from} comes without its tokenizer, so a new one is trained, whose tokens "
        "may mean others to these weights: give theirs by --data.tokenizer"
    )


def _require_fit(config: Config, theirs: Config) -> None:
    for name, ours, other in differences_of_model(config, theirs):
        raise CheckpointError(
            f"checkpoint.init_from={config.checkpoint.init_from} has {name}={other}, this run {ours}: give "
            f"--{name} {other}"
        )


def _freed(fresh: Any) -> Any:
    """Shapes, types and shardings of arrays whose memory is given back."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    jax.tree.map(lambda x: x.delete(), fresh)
    return abstract


def _placed(target: jax.ShapeDtypeStruct, lazy: LazyArray) -> jax.Array:
    array = np.asarray(lazy.read(), target.dtype)
    placed = jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])
    return jax.block_until_ready(placed)  # else every tensor would wait in host memory
