"""Expert parallelism: tokens travel to the device that has their experts, and their results travel back.

Shapes: T tokens of this device, D width, E routed experts in all, L of them on this device, A experts per token, M
expert hidden width, N devices along the mesh's expert axis, C places per expert.

Inside the program of one device (`mesh.per_device`) the experts' weights are this device's L experts. Outside, all
experts are here and no token travels. The result is the same, save what all_to_all drops.
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
"""w_gate (L,D,M), w_up (L,D,M), w_down (L,M,D)."""


class Dispatched(NamedTuple):
    """What came back from the experts."""

    y_TD: jax.Array
    """The weighted sum over each token's experts."""
    dropped: jax.Array
    """Assignments of all devices that found no place, a scalar."""


def dispatch(
    config: ParallelConfig, x_TD: jax.Array, experts_TA: jax.Array, weights_TA: jax.Array, weights: Weights
) -> Dispatched:
    """Every token through its experts, wherever they are; `experts_TA` counts over all E experts."""
    if not inside():
        return Dispatched(grouped_mlp(x_TD, experts_TA, weights_TA, *weights), jnp.zeros((), weights_TA.dtype))
    run = {"ring": _ring, "all_to_all": _all_to_all, "ragged": _ragged}[config.dispatch]
    y_TD, dropped = run(config, x_TD, experts_TA, weights_TA, weights)
    return Dispatched(y_TD, batch_sum(jnp.asarray(dropped, weights_TA.dtype)))


# ---- ring: every token to every device ------------------------------------------------------------------------------


def _ring(config: ParallelConfig, x_TD, experts_TA, weights_TA, weights: Weights):
    """Each device sees the tokens of all N, computes its experts' share of the sums, and the shares are added up where
    the tokens came from. Dropless, and balanced in what it sends whatever the router does."""
    local = weights[0].shape[0]
    x, experts, token_weights = (all_gather(part, (AXIS,), 0) for part in (x_TD, experts_TA, weights_TA))
    y: jax.Array = grouped_mlp(x, _here(experts, local), token_weights, *weights, lax.axis_size(AXIS) * local)
    return reduce_scatter(y, (AXIS,), 0), 0


def _here(experts: jax.Array, local: int) -> jax.Array:
    """Experts counted among this device's own; `local` for those that are elsewhere."""
    own = experts - lax.axis_index(AXIS) * local
    return jnp.where((own >= 0) & (own < local), own, local)


# ---- all_to_all: a fixed number of places ---------------------------------------------------------------------------


def _all_to_all(config: ParallelConfig, x_TD, experts_TA, weights_TA, weights: Weights):
    """Each device fills C places for each of the E experts, in the order of its tokens; who comes later is dropped.

    What travels is N times L x C rows each way, about `capacity_factor` x A / N of what the ring moves.
    """
    devices, local, width = lax.axis_size(AXIS), weights[0].shape[0], x_TD.shape[1]
    experts, (tokens, active) = devices * local, experts_TA.shape
    capacity = min(tokens, max(1, -int(-tokens * active * config.capacity_factor // experts)))
    rank_TA = ranks(experts_TA.reshape(-1), experts)[0].reshape(experts_TA.shape)
    kept_TA = rank_TA < capacity
    place_TA = jnp.where(kept_TA, experts_TA * capacity + rank_TA, experts * capacity)

    token_TA = jnp.broadcast_to(jnp.arange(tokens)[:, None], experts_TA.shape)
    empty = jnp.full(experts * capacity, tokens, token_TA.dtype)
    token_at = empty.at[place_TA.reshape(-1)].set(token_TA.reshape(-1), mode="drop")
    sent = x_TD.at[token_at].get(mode="fill", fill_value=0).reshape(devices, local * capacity, width)
    received = lax.all_to_all(sent, AXIS, split_axis=0, concat_axis=0)
    rows_LCD = received.reshape(devices, local, capacity, width).swapaxes(0, 1).reshape(local, -1, width)

    y_LCD = expert_mlp(rows_LCD, *weights)
    back = y_LCD.reshape(local, devices, capacity, width).swapaxes(0, 1).reshape(devices, local * capacity, width)
    y = lax.all_to_all(back, AXIS, split_axis=0, concat_axis=0).reshape(-1, width)
    y_TAD = y.at[place_TA].get(mode="fill", fill_value=0)
    return jnp.einsum("tad,ta->td", y_TAD, weights_TA.astype(x_TD.dtype)), jnp.sum(~kept_TA)


# ---- ragged: only what is needed, and all of it ---------------------------------------------------------------------


class RaggedPlan(NamedTuple):
    """Which rows go where in a `ragged_all_to_all`; all arrays have an entry per device of the expert axis."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    """Where this device's rows begin on the receiving device."""
    recv_sizes: jax.Array


def _ragged(config: ParallelConfig, x_TD, experts_TA, weights_TA, weights: Weights):
    """Rows sorted by expert go to their experts' devices by `lax.ragged_all_to_all`. Dropless: the buffer has room for
    the worst case, every token of every device with as many of its experts here as there can be."""
    devices, local = lax.axis_size(AXIS), weights[0].shape[0]
    experts, (tokens, active) = devices * local, experts_TA.shape
    order = jnp.argsort(experts_TA.reshape(-1), stable=True)
    counts_E = jnp.zeros(experts, jnp.int32).at[experts_TA.reshape(-1)].add(1)
    counts_NNL = lax.all_gather(counts_E, AXIS).reshape(devices, devices, local)  # from, to, expert
    plan, returning, received_NL = ragged_plan(counts_NNL, lax.axis_index(AXIS))

    room = tokens * devices * min(active, local)
    buffer = jnp.zeros((room, x_TD.shape[1]), x_TD.dtype)
    rows = lax.ragged_all_to_all(x_TD[order // active], buffer, *plan, axis_name=AXIS)
    ends = jnp.cumsum(received_NL.reshape(-1))  # rows lie by the device they came from, then by expert
    group = jnp.searchsorted(ends, jnp.arange(room), side="right")
    own = jnp.where(group < devices * local, group % local, local)
    ones = jnp.ones((room, 1), weights_TA.dtype)
    # Of `room` rows at most a share of 1 / min(active, local) can be taken: sized as if by one expert of all of them.
    y = grouped_mlp(rows, own[:, None], ones, *weights, experts * min(active, local) // active or 1)

    home = jnp.zeros((tokens * active, x_TD.shape[1]), x_TD.dtype)
    y_sorted = lax.ragged_all_to_all(y, home, *returning, axis_name=AXIS)
    y_TAD = y_sorted[jnp.argsort(order)].reshape(tokens, active, -1)
    return jnp.einsum("tad,ta->td", y_TAD, weights_TA.astype(x_TD.dtype)), 0


def ragged_plan(counts_NNL: jax.Array, me: int | jax.Array) -> tuple[RaggedPlan, RaggedPlan, jax.Array]:
    """Offsets and sizes of the way there and back for device `me`, and the rows that it receives, (N,L).

    Args:
        counts_NNL: rows that device i has for device j's expert l.
    """
    sizes_NN = counts_NNL.sum(axis=-1)
    input_offsets_NN = jnp.cumsum(sizes_NN, axis=1) - sizes_NN  # [i, j]: where i's rows for j begin on i
    output_offsets_NN = jnp.cumsum(sizes_NN, axis=0) - sizes_NN  # [i, j]: where i's rows for j begin on j
    there = RaggedPlan(input_offsets_NN[me], sizes_NN[me], output_offsets_NN[me], sizes_NN[:, me])
    back = RaggedPlan(output_offsets_NN[:, me], sizes_NN[:, me], input_offsets_NN[:, me], sizes_NN[me])
    return there, back, counts_NNL[:, me]
