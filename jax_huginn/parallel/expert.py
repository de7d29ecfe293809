"""Expert parallelism: dispatch of tokens to the devices that hold their experts, and the way back.

Inside the program of one device (`mesh.per_device`) the weights are those of this device's e experts, a share of E over
Z devices along the mesh's expert axis. Outside, all experts are local and no token travels. The results are equal,
except for tokens that all_to_all drops. The letters of shapes are those of `jax_huginn.model`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.config.schema import ParallelConfig
from jax_huginn.ops.grouped_mlp import grouped_mlp, ranks
from jax_huginn.ops.swiglu import expert_mlp
from jax_huginn.parallel.mesh import all_gather, batch_sum, inside, reduce_scatter

AXIS = "expert"
Weights = tuple[jax.Array, jax.Array, jax.Array]
"""w_gate (e,D,M), w_up (e,D,M), w_down (e,M,D)."""


class Dispatched(NamedTuple):
    """The combined output of the experts."""

    y_TD: jax.Array
    """The weighted sum over each token's experts."""
    dropped: jax.Array
    """Number of assignments dropped, over all devices."""


def dispatch(
    config: ParallelConfig, x_TD: jax.Array, experts_TA: jax.Array, weights_TA: jax.Array, weights: Weights
) -> Dispatched:
    """Runs every token through its experts, on whichever device they are; `experts_TA` are indices below E."""
    if not inside():
        return Dispatched(grouped_mlp(x_TD, experts_TA, weights_TA, *weights), jnp.zeros((), weights_TA.dtype))
    run = {"ring": _ring, "all_to_all": _all_to_all}[config.dispatch]
    y_TD, dropped = run(config, x_TD, experts_TA, weights_TA, weights)
    return Dispatched(y_TD, batch_sum(jnp.asarray(dropped, weights_TA.dtype)))


# ---- ring: every token to every device ------------------------------------------------------------------------------


def _ring(config: ParallelConfig, x_TD, experts_TA, weights_TA, weights: Weights):
    """All-gathers the tokens, runs this device's experts on them, and reduce-scatters the partial sums.

    Drops nothing, and its traffic does not depend on the router.
    """
    local = weights[0].shape[0]
    x, experts, token_weights = (all_gather(part, (AXIS,), 0) for part in (x_TD, experts_TA, weights_TA))
    y: jax.Array = grouped_mlp(x, _here(experts, local), token_weights, *weights, lax.axis_size(AXIS) * local)
    return reduce_scatter(y, (AXIS,), 0), 0


def _here(experts: jax.Array, local: int) -> jax.Array:
    """Indices among this device's experts; `local` for experts of other devices."""
    own = experts - lax.axis_index(AXIS) * local
    return jnp.where((own >= 0) & (own < local), own, local)


# ---- all_to_all: a fixed number of slots ----------------------------------------------------------------------------


def _all_to_all(config: ParallelConfig, x_TD, experts_TA, weights_TA, weights: Weights):
    """Each device fills C slots of each of the E experts in the order of its tokens and drops the tokens beyond.

    Z times e x C rows travel each way, about `capacity_factor` x A / Z of the ring's traffic.
    """
    devices, local, width = lax.axis_size(AXIS), weights[0].shape[0], x_TD.shape[1]
    experts, (tokens, active) = devices * local, experts_TA.shape
    capacity = min(tokens, max(1, -int(-tokens * active * config.capacity_factor // experts)))
    rank_TA = ranks(experts_TA.reshape(-1), experts)[0].reshape(experts_TA.shape)
    kept_TA = rank_TA < capacity
    slot_TA = jnp.where(kept_TA, experts_TA * capacity + rank_TA, experts * capacity)

    token_TA = jnp.broadcast_to(jnp.arange(tokens)[:, None], experts_TA.shape)
    empty = jnp.full(experts * capacity, tokens, token_TA.dtype)
    token_at = empty.at[slot_TA.reshape(-1)].set(token_TA.reshape(-1), mode="drop")
    sent = x_TD.at[token_at].get(mode="fill", fill_value=0).reshape(devices, local * capacity, width)
    received = lax.all_to_all(sent, AXIS, split_axis=0, concat_axis=0)
    rows = received.reshape(devices, local, capacity, width).swapaxes(0, 1).reshape(local, -1, width)

    y = expert_mlp(rows, *weights)  # (e, Z*C, D)
    back = y.reshape(local, devices, capacity, width).swapaxes(0, 1).reshape(devices, local * capacity, width)
    y = lax.all_to_all(back, AXIS, split_axis=0, concat_axis=0).reshape(-1, width)
    y_TAD = y.at[slot_TA].get(mode="fill", fill_value=0)
    return jnp.einsum("tad,ta->td", y_TAD, weights_TA.astype(x_TD.dtype)), jnp.sum(~kept_TA)
