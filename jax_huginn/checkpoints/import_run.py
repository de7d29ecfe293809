"""Write a run folder of weights from elsewhere: its only checkpoint is step 0, without a training state."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jax_huginn.checkpoints import step_folders
from jax_huginn.checkpoints.checksums import as_hex, checksum
from jax_huginn.checkpoints.step_folders import CHECKPOINTS
from jax_huginn.config.dicts import to_dict
from jax_huginn.config.schema import Config
from jax_huginn.interop.errors import WeightsError
from jax_huginn.interop.foreign_weights import LazyArray, Weights

_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "tokenizer.json",
)  # fmt: skip


def write_run(weights: Weights, run_dir: Path, tokenizer: Path | None = None) -> None:
    """Create a run folder of `weights`, which pass through the memory one tensor at a time.

    Args:
        tokenizer: folder of a tokenizer, instead of the one that came with the weights.

    Raises:
        WeightsError: the folder exists or cannot be written, the tokenizer is none, or the weights are broken.
    """
    if run_dir.exists():
        raise WeightsError(f"{run_dir} exists: remove it or name another --out")
    tokenizer = tokenizer or weights.tokenizer
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise WeightsError(f"{tokenizer}: no tokenizer.json there")
    config = replace(weights.config, run_dir=str(run_dir))
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        # Beside the run and then renamed, so that it appears whole or not at all.
        with tempfile.TemporaryDirectory(dir=run_dir.parent, prefix=f".{run_dir.name}.") as name:
            unfinished = Path(name, run_dir.name)
            unfinished.mkdir()
            (unfinished / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
            if tokenizer:
                copy_tokenizer(tokenizer, unfinished / "tokenizer")
            _save_streamed(unfinished / CHECKPOINTS, weights.params(), config, str(weights.path))
            unfinished.rename(run_dir)
    except OSError as error:
        raise WeightsError(f"{run_dir} cannot be written: {error.strerror or error}") from None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files of a folder that may hold more; `tokenizer.json` comes last, its presence means success."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class _Streamed(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, each read when its turn has come. Orbax itself wants all in memory at once."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.sums: dict[str, jax.Array] = {}

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None):
        for index, value in enumerate(values):
            part = slice(index, index + 1)
            name, array = infos[index].name, value.read()
            self.sums[name] = checksum(array)
            for written in await super().serialize([array], infos[part], args[part] if args else None):
                written.result()
        return []


def _save_streamed(folder: Path, params: Any, config: Config, source: str) -> None:
    """Step 0 of a run: `params`, a tree of `LazyArray`, and `meta`, as `checkpoint.Checkpoints` writes them."""
    streamed = _Streamed()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, streamed),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns where it is missing
    )
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    meta = {"step": 0, "config": to_dict(config), "jax": jax.__version__, "imported_from": source}
    # Synchronous: a broken tensor would leave the threads of an asynchronous save waiting for each other.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers) as manager:
        items = {"params": ocp.args.PyTreeSave(nnx.to_pure_dict(params)), "meta": ocp.args.JsonSave(meta)}
        manager.save(0, args=ocp.args.Composite(**items))
    step_folders.seal(folder / "0", {"params": as_hex(streamed.sums)})
