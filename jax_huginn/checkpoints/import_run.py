"""Write a run folder of a model that was not trained here: its only checkpoint is step 0, without a training state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jax_huginn.checkpoints import step_folders
from jax_huginn.checkpoints.checksums import as_hex, checksum
from jax_huginn.checkpoints.step_folders import CHECKPOINTS, UNFINISHED
from jax_huginn.config.checks import UserError
from jax_huginn.config.dicts import to_dict
from jax_huginn.config.schema import Config
from jax_huginn.files import reason, whole_folder
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.foreign_weights import LazyArray, Weights

TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "tokenizer.json",
)  # fmt: skip


def import_weights(weights: Weights, run_dir: Path, tokenizer: Path | None = None) -> None:
    """`write_run` for weights in another layout, whose own tokenizer is taken unless another is given."""
    write_run(weights.params(), weights.config, run_dir, tokenizer or weights.tokenizer, str(weights.path))


def write_run(params: Any, config: Config, run_dir: Path, tokenizer: Path | None = None, origin: str = "") -> None:
    """Create a run folder of `params`; one array at a time is in memory.

    Args:
        params: a model's parameter tree of arrays or of `LazyArray`, in `model.param_dtype`.
        tokenizer: folder of the tokenizer whose tokens the model knows.
        origin: where the weights come from, for the record.

    Raises:
        WeightsError: the folder exists or cannot be written, there is no tokenizer in `tokenizer`, or an array cannot
            be read.
    """
    if run_dir.exists():
        raise WeightsError(f"{run_dir} exists: remove it or name another --out")
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise WeightsError(f"{tokenizer}: no tokenizer.json there")
    config = replace(config, run_dir=str(run_dir))
    try:
        with whole_folder(run_dir) as unfinished:
            (unfinished / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
            if tokenizer:
                copy_tokenizer(tokenizer, unfinished / "tokenizer")
            _write_step_0(unfinished / CHECKPOINTS, params, config, origin)
    except UserError:  # an array that cannot be read
        raise
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a full disk by any of them
        raise WeightsError(f"{run_dir} cannot be written: {reason(error)}") from None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files and no others; `tokenizer.json` comes last, so that its presence means success."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class _Streamed(ocp.type_handlers.NumpyHandler):
    """Reads and writes one array after another. Orbax itself wants all of them in memory at once."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.sums: dict[str, jax.Array] = {}
        self.error: UserError | None = None

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None):
        for index, value in enumerate(values):
            part = slice(index, index + 1)
            try:
                array = value.read()
            except UserError as error:  # raised later, when no other thread of Orbax writes into the folder any more
                self.error, array = self.error or error, np.zeros(value.shape, value.dtype)
            self.sums[infos[index].name] = checksum(array)
            for written in await super().serialize([array], infos[part], args[part] if args else None):
                written.result()
        return []


def _write_step_0(folder: Path, params: Any, config: Config, origin: str) -> None:
    """The checkpoint, with the items `params` and `meta` of those that `save.Checkpoints` writes."""
    streamed = _Streamed()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, streamed),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns where it is missing
    )
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), meta=ocp.JsonCheckpointHandler()
    )
    meta = {"step": 0, "config": to_dict(config), "jax": jax.__version__, "imported_from": origin}
    unfinished = (folder / UNFINISHED / "0").resolve()
    unfinished.parent.mkdir(parents=True)
    # Synchronous: a broken array would leave the threads of an asynchronous save waiting for each other.
    with ocp.Checkpointer(handler) as writer:
        tree = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
        lazy = jax.tree.map(_lazy, tree)
        items = {"params": ocp.args.PyTreeSave(lazy), "meta": ocp.args.JsonSave(meta)}
        writer.save(unfinished, args=ocp.args.Composite(**items))
    if streamed.error is not None:
        raise streamed.error
    step_folders.seal(unfinished, {"params": as_hex(streamed.sums)})
    step_folders.commit(unfinished, folder / "0")
    step_folders.clear(folder)


def _lazy(leaf: Any) -> LazyArray:
    return leaf if isinstance(leaf, LazyArray) else LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf))
