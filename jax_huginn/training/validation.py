"""Held-out loss and accuracy as functions of depth."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers
from jax_huginn.model.huginn import abstract_model
from jax_huginn.model.parameters import cast_params
from jax_huginn.model.sharding import specs
from jax_huginn.ops.cross_entropy import IGNORE
from jax_huginn.parallel.mesh import BATCH, REPLICATED, batch_sum, from_every_host, per_device, replicated
from jax_huginn.reporting.record import Record, accuracy_record, validation_record


def make_validation(
    config: Config, batches: list[dict[str, np.ndarray]], token_bytes_V: np.ndarray | None, mesh: Mesh
) -> Callable[[Any], Record]:
    """`validate(params) -> record` with `val_loss_r{r}`, nats per token at each of `validation.depths`, and
    `val_bpb_r{r}`, bits per byte, where the tokens' byte lengths are known. One compilation serves all depths.

    Batches with `groups` also give `val_accuracy_r{r}`, the share of the labels that are the most likely token, as a
    whole and by group.

    Every process has the whole `batches`, of which every device computes its part.
    """
    graphdef, _ = abstract_model(config)
    groups = 1 + max((int(batch["groups"].max()) for batch in batches if "groups" in batch), default=-1)
    length, width = config.train.sequence_length, config.model.width
    state_SD = replicated(initializers.fixed_state(0, length, width), mesh)
    labels_of_groups = sum(
        (np.bincount(batch["groups"][batch["labels"] != IGNORE], minlength=groups) for batch in batches if groups),
        start=np.zeros(groups, int),
    )
    place = partial(from_every_host, sharding=NamedSharding(mesh, BATCH))

    def local_scores(
        params: Any, batch: dict[str, jax.Array], recurrences: jax.Array, state_SD: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """The mean loss and, with groups, the number of labels of each that are the most likely token."""
        model, labels_BS = nnx.merge(graphdef, params), batch["labels"]
        if not groups:
            return model.training_loss(batch["tokens"], labels_BS, recurrences, 0, state_SD).log_ppl, None
        model = model.cast()
        y_BSD = model.hidden(batch["tokens"], recurrences, 0, state_SD).y_BSD
        hits_BS = (model.most_likely(y_BSD) == labels_BS).astype(jnp.int32)
        hits = jax.ops.segment_sum(hits_BS.ravel(), batch["groups"].ravel(), groups)
        return model.loss(y_BSD, labels_BS, None)[1], batch_sum(hits)

    @jax.jit
    def scores(params: Any, batch: dict[str, jax.Array], recurrences: jax.Array, state_SD: jax.Array):
        params = cast_params(params, config.model.dtype)
        in_specs = (specs(params), BATCH, REPLICATED, REPLICATED)
        return per_device(local_scores, mesh, in_specs, REPLICATED)(params, batch, recurrences, state_SD)

    def validate(params: Any) -> Record:
        losses: dict[int, tuple[float, float | None]] = {}
        hits: dict[int, np.ndarray] = {}
        for depth in config.validation.depths:
            nats = tokens = count_bytes = 0.0
            hits[depth] = np.zeros(groups, int)
            for batch in batches:
                labels = batch["labels"]
                counted = labels[labels != IGNORE]
                placed = {name: place(rows) for name, rows in batch.items()}
                loss, right = scores(params, placed, np.int32(depth), state_SD)
                nats += float(loss) * counted.size
                tokens += counted.size
                hits[depth] += 0 if right is None else np.asarray(right)
                count_bytes += 0 if token_bytes_V is None else int(token_bytes_V[counted].sum())
            losses[depth] = nats / tokens, nats / math.log(2) / count_bytes if count_bytes else None
        return validation_record(losses) | (accuracy_record(hits, labels_of_groups) if groups else {})

    return validate
