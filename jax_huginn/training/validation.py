"""Held-out loss as a function of depth."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers
from jax_huginn.model.huginn import abstract_model
from jax_huginn.model.parameters import cast_params
from jax_huginn.model.sharding import specs
from jax_huginn.ops.cross_entropy import IGNORE
from jax_huginn.parallel.mesh import BATCH, REPLICATED, from_every_host, per_device, replicated
from jax_huginn.reporting.record import Record, validation_record


def make_validation(
    config: Config, batches: list[dict[str, np.ndarray]], token_bytes_V: np.ndarray | None, mesh: Mesh
) -> Callable[[Any], Record]:
    """`validate(params) -> record` with `val_loss_r{r}`, nats per token at each of `validation.depths`, and
    `val_bpb_r{r}`, bits per byte, where the tokens' byte lengths are known. One compilation serves all depths.

    Every process has the whole `batches`, of which every device computes its part.
    """
    graphdef, _ = abstract_model(config)
    length, width = config.train.sequence_length, config.model.width
    state_SD = replicated(initializers.fixed_state(0, length, width), mesh)
    place = partial(from_every_host, sharding=NamedSharding(mesh, BATCH))

    def local_loss(
        params: Any, tokens_BS: jax.Array, labels_BS: jax.Array, recurrences: jax.Array, state_SD: jax.Array
    ):
        return nnx.merge(graphdef, params).training_loss(tokens_BS, labels_BS, recurrences, 0, state_SD).log_ppl

    @jax.jit
    def mean_loss(params: Any, tokens_BS: jax.Array, labels_BS: jax.Array, recurrences: jax.Array, state_SD: jax.Array):
        params = cast_params(params, config.model.dtype)
        in_specs = (specs(params), BATCH, BATCH, REPLICATED, REPLICATED)
        loss = per_device(local_loss, mesh, in_specs, REPLICATED)
        return loss(params, tokens_BS, labels_BS, recurrences, state_SD)

    def validate(params: Any) -> Record:
        losses: dict[int, tuple[float, float | None]] = {}
        for depth in config.validation.depths:
            nats = tokens = count_bytes = 0.0
            for batch in batches:
                labels = batch["labels"]
                counted = labels[labels != IGNORE]
                loss = mean_loss(params, place(batch["tokens"]), place(labels), np.int32(depth), state_SD)
                nats += float(loss) * counted.size
                tokens += counted.size
                count_bytes += 0 if token_bytes_V is None else int(token_bytes_V[counted].sum())
            losses[depth] = nats / tokens, nats / math.log(2) / count_bytes if count_bytes else None
        return validation_record(losses)

    return validate
