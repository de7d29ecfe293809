"""Start a run from the weights of another run, a `.pth` file or a Hugging Face folder: `checkpoint.init_from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jax_huginn.checkpoints.import_run import copy_tokenizer
from jax_huginn.checkpoints.sources import Source, open_source
from jax_huginn.checkpoints.step_folders import CHECKPOINTS, CheckpointError
from jax_huginn.config.compatibility import differences_of_model
from jax_huginn.config.schema import Config


def open_start(config: Config) -> Source | None:
    """The model that `checkpoint.init_from` names, if this run starts from its weights.

    None without that option, and where the run resumes from a checkpoint of its own: the source may be gone by then.

    Raises:
        CheckpointError, WeightsError: nothing there that can be read, or a model of another shape; its first field that
            differs is named.
    """
    resumes = config.checkpoint.resume and any(Path(config.run_dir, CHECKPOINTS).glob("[0-9]*"))
    if not config.checkpoint.init_from or resumes:
        return None
    source = open_source(config.checkpoint.init_from)
    if source.path.parent.resolve() == Path(config.run_dir, CHECKPOINTS).resolve():
        raise CheckpointError(
            f"checkpoint.init_from={config.checkpoint.init_from} is the run's own folder, whose checkpoints this "
            "command deletes: name another --run_dir"
        )
    for name, ours, theirs in differences_of_model(config, source.config):
        raise CheckpointError(
            f"checkpoint.init_from={config.checkpoint.init_from} has {name}={theirs}, this run {ours}: give "
            f"--{name} {theirs}"
        )
    return source


def load_into(source: Source, fresh: Any) -> Any:
    """The weights of a source in place of a run's fresh parameters, whose memory is freed first."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    jax.tree.map(lambda x: x.delete(), fresh)
    return source.params(abstract)


def adopt_tokenizer(start: Source, config: Config, run_dir: Path) -> str | None:
    """Give a new run the tokenizer of its weights, unless it names one; a line where text may get another.

    The weights know the tokens of the tokenizer that they were trained with, and no others.
    """
    if (run_dir / "tokenizer/tokenizer.json").exists():
        return None
    if config.data.tokenizer:
        theirs = start.tokenizer and start.tokenizer.resolve()
        if theirs in (None, Path(config.data.tokenizer).expanduser().resolve()):
            return None
        return (
            f"the tokenizer is data.tokenizer={config.data.tokenizer}, not the one beside these weights: if the two "
            f"differ, give --data.tokenizer {theirs}"
        )
    if start.tokenizer:
        copy_tokenizer(start.tokenizer, run_dir / "tokenizer")
        return None
    if config.data.source in ("parquet", "hub"):
        return None
    return (
        f"warning: {config.checkpoint.init_from} comes without its tokenizer, so a new one is trained, whose tokens "
        "these weights do not know: give theirs by --data.tokenizer"
    )
