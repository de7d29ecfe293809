"""Routed SwiGLU experts without dropped tokens.

`grouped_mlp_oracle` runs every expert on every token. `grouped_mlp` gathers up to C tokens for each expert, slightly
more than an even share, and runs one batched matmul over the experts. An expert's remaining tokens pass through it in
blocks of n, in a loop whose length is known only at run time. So shapes are static, no token is dropped, and the cost
grows with the number of tokens rather than with the largest group.

The gradient is written by hand. Autodiff cannot reverse a loop of dynamic length, and it would turn every gather into a
scatter-add, although dispatch and combine are transposes of each other and can both be gathers.

An assignment is one (token, choice) pair, numbered token by token; T*A, one past the last, means none. The letters of
shapes are those of `jax_huginn.model`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.ops.swiglu import expert_mlp, gate_and_up, gated

CAPACITY = 1.125  # slots per expert relative to an even split; a balanced router's largest group is about 1.12
BLOCKS = 4  # blocks per capacity of an expert; smaller blocks leave a GPU idle
COUNTED = 128  # assignments counted by one block of a triangular matmul

_T = TypeVar("_T")


def grouped_mlp_oracle(x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD):
    """Sum over a token's experts of weight * w_down(silu(w_gate x) * (w_up x)); every expert runs on every token."""
    gate = jnp.einsum("td,edm->etm", x_TD, w_gate_EDM)
    up = jnp.einsum("td,edm->etm", x_TD, w_up_EDM)
    y_ETD = jnp.einsum("etm,emd->etd", jax.nn.silu(gate) * up, w_down_EMD)
    chosen_TAE = jax.nn.one_hot(experts_TA, w_gate_EDM.shape[0], dtype=x_TD.dtype)
    weights_TE = jnp.einsum("ta,tae->te", weights_TA.astype(x_TD.dtype), chosen_TAE)
    return jnp.einsum("te,etd->td", weights_TE, y_ETD)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def grouped_mlp(
    x_TD: jax.Array,
    experts_TA: jax.Array,
    weights_TA: jax.Array,
    w_gate_EDM: jax.Array,
    w_up_EDM: jax.Array,
    w_down_EMD: jax.Array,
    experts_in_all: int | None = None,
) -> jax.Array:
    """The result of `grouped_mlp_oracle`, (T,D); differentiable in everything except `experts_TA`.

    Args:
        experts_TA: A different experts per token. An index of E or more, an expert on another device, adds nothing.
        experts_in_all: number of experts that the tokens are spread over, E by default; it sets the capacity.
    """
    inputs = (x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD)
    return _forward(*inputs, experts_in_all)[0]


def _forward(x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD, experts_in_all):
    groups = _Groups(experts_TA, w_gate_EDM.shape[0], experts_in_all)
    weights = weights_TA.astype(x_TD.dtype)

    x_ECD = _rows(x_TD, groups.tokens_EC)
    gate, up = gate_and_up(x_ECD, w_gate_EDM, w_up_EDM)
    y_ECD = gated(gate, up) @ w_down_EMD
    y_TD = jnp.einsum("tad,ta->td", groups.collect(y_ECD), weights)

    def add_block(expert, assignments_n, y_TD):
        tokens_n = assignments_n // groups.active
        x_nD = _rows(x_TD, tokens_n)
        y_nD = expert_mlp(x_nD, w_gate_EDM[expert], w_up_EDM[expert], w_down_EMD[expert])
        return _add_rows(y_TD, tokens_n, _rows(weights.reshape(-1, 1), assignments_n) * y_nD)

    y_TD = groups.for_each_block(add_block, y_TD)
    return y_TD, (x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD, gate, up)


def _backward(experts_in_all, kept, d_y_TD):
    x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD, gate, up = kept
    groups = _Groups(experts_TA, w_gate_EDM.shape[0], experts_in_all)
    flat_weights = weights_TA.astype(x_TD.dtype).reshape(-1, 1)

    def backward(x, d_y, weight, gate, up, w_gate, w_up, w_down):
        """Gradients of rows (..., D) with weights (..., 1) through one expert each, batched over leading axes."""
        hidden, swiglu_vjp = jax.vjp(gated, gate, up)
        # <y, d_y> = <w_down hidden, d_y> = <hidden, w_down^T d_y>: the router's gradient without recomputing y.
        d_hidden = d_y @ jnp.swapaxes(w_down, -1, -2)
        d_weight = jnp.sum((hidden * d_hidden).astype(weights_TA.dtype), axis=-1, keepdims=True)
        d_gate, d_up = swiglu_vjp(weight * d_hidden)
        d_x = d_gate @ jnp.swapaxes(w_gate, -1, -2) + d_up @ jnp.swapaxes(w_up, -1, -2)
        x_transposed, hidden_transposed = jnp.swapaxes(x, -1, -2), jnp.swapaxes(weight * hidden, -1, -2)
        return d_x, d_weight, x_transposed @ d_gate, x_transposed @ d_up, hidden_transposed @ d_y

    x_ECD, d_y_ECD = _rows(x_TD, groups.tokens_EC), _rows(d_y_TD, groups.tokens_EC)
    weight_EC1 = _rows(flat_weights, groups.assignments_EC)
    d_x_ECD, d_weight_EC1, *d_experts = backward(x_ECD, d_y_ECD, weight_EC1, gate, up, w_gate_EDM, w_up_EDM, w_down_EMD)
    d_x_TD = groups.collect(d_x_ECD).sum(axis=1)
    d_flat_weights = groups.collect(d_weight_EC1).reshape(-1, 1)

    def add_block(expert, assignments_n, sums):
        d_x_TD, d_flat_weights, d_experts = sums
        tokens_n = assignments_n // groups.active
        x_nD, d_y_nD = _rows(x_TD, tokens_n), _rows(d_y_TD, tokens_n)
        weight_n1 = _rows(flat_weights, assignments_n)
        w_gate, w_up, w_down = w_gate_EDM[expert], w_up_EDM[expert], w_down_EMD[expert]
        d_x_nD, d_weight_n1, *d_expert = backward(
            x_nD, d_y_nD, weight_n1, *gate_and_up(x_nD, w_gate, w_up), w_gate, w_up, w_down
        )
        d_experts = [d_all.at[expert].add(d) for d_all, d in zip(d_experts, d_expert, strict=True)]
        d_flat_weights = _add_rows(d_flat_weights, assignments_n, d_weight_n1)
        return _add_rows(d_x_TD, tokens_n, d_x_nD), d_flat_weights, d_experts

    sums = groups.for_each_block(add_block, (d_x_TD, d_flat_weights, d_experts))
    d_x_TD, d_flat_weights, d_experts = sums
    return d_x_TD, None, d_flat_weights.reshape(weights_TA.shape), *d_experts


grouped_mlp.defvjp(_forward, _backward)


class _Groups:
    """Maps assignments to slots and blocks of experts.

    The first C assignments of each expert have a slot; the rest form blocks of n.
    """

    def __init__(self, experts_TA: jax.Array, experts: int, experts_in_all: int | None):
        tokens, self.active = experts_TA.shape
        assigned = experts_TA.reshape(-1)
        self.capacity = min(_round_up(CAPACITY * assigned.size / (experts_in_all or experts)), tokens)
        self.block_size = min(_round_up(self.capacity / BLOCKS), tokens - self.capacity)

        rank_N, sizes_E = ranks(assigned, experts)
        self.ends_E = jnp.cumsum(sizes_E)  # the end of each expert's list, with all lists concatenated
        self.begins_E = self.ends_E - sizes_E
        place_N = jnp.where(rank_N >= 0, self.begins_E.at[assigned].get(mode="clip") + rank_N, assigned.size)
        every = jnp.arange(assigned.size)
        self.lists = jnp.zeros_like(every).at[place_N].set(every, mode="drop", unique_indices=True)

        slotted = (rank_N >= 0) & (rank_N < self.capacity)
        slot_N = jnp.where(slotted, assigned * self.capacity + rank_N, experts * self.capacity)
        self.slot_TA = slot_N.reshape(experts_TA.shape)
        self.assignments_EC = self._listed(self.begins_E[:, None] + jnp.arange(self.capacity), self.ends_E[:, None])
        self.tokens_EC = self.assignments_EC // self.active
        if self.block_size:
            over_E = jnp.maximum(sizes_E - self.capacity, 0)
            self.blocks_E = jnp.cumsum(-(-over_E // self.block_size))  # cumulative number of blocks

    def for_each_block(self, body: Callable[[jax.Array, jax.Array, _T], _T], sums: _T) -> _T:
        """sums = body(expert, assignments_n, sums) for every block that exists at run time."""
        if not self.block_size:  # every token has a slot, whatever the router chooses
            return sums

        def step(index, sums):
            expert = jnp.sum(self.blocks_E <= index)
            before = jnp.where(expert > 0, self.blocks_E[expert - 1], 0)
            begin = self.begins_E[expert] + self.capacity + (index - before) * self.block_size
            return body(expert, self._listed(begin + jnp.arange(self.block_size), self.ends_E[expert]), sums)

        return lax.fori_loop(0, self.blocks_E[-1], step, sums)

    def collect(self, y_ECD: jax.Array) -> jax.Array:
        """The row of every assignment, zeros if it has no slot: (T,A,D)."""
        return _rows(y_ECD.reshape(-1, y_ECD.shape[-1]), self.slot_TA)

    def _listed(self, places: jax.Array, end: jax.Array) -> jax.Array:
        """The assignments at these places of the concatenated lists; none from `end` onwards."""
        return jnp.where(places < end, self.lists.at[places].get(mode="clip"), self.lists.size)


def ranks(experts_N: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The rank of every assignment among those to the same expert, (N,) int32, and their number per expert, (E,).

    The rank is -1 for an expert index of E or more.
    """
    here_NE = experts_N[:, None] == jnp.arange(experts)
    counts_NE = _running_counts(here_NE)
    return jnp.sum(jnp.where(here_NE, counts_NE, 0), axis=1) - 1, counts_NE[-1]


def _running_counts(here_NE: jax.Array) -> jax.Array:
    """Inclusive cumulative sum along the first axis, int32.

    Two triangular matmuls, because `cumsum`, a sort or `searchsorted` become dozens of small dependent kernels on a
    GPU. The sums are exact: factors are at most `COUNTED`, and float32 holds every integer below 2^24.
    """
    count, experts = here_NE.shape
    padded = jnp.pad(here_NE, ((0, -count % COUNTED), (0, 0))).astype(jnp.float32)
    blocks_PnE = padded.reshape(-1, COUNTED, experts)
    within_PnE = jnp.einsum("ij,bje->bie", jnp.tri(COUNTED), blocks_PnE)
    before_PE = jnp.tri(len(blocks_PnE), k=-1) @ within_PnE[:, -1]
    return (within_PnE + before_PE[:, None]).reshape(-1, experts)[:count].astype(jnp.int32)


def _round_up(size: float) -> int:
    """Up to a multiple of 8, at least 8."""
    return max(math.ceil(size / 8) * 8, 8)


def _rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of x; zeros for an index past the end."""
    return x.at[indices].get(mode="fill", fill_value=0)


def _add_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x with rows added at distinct indices; an index past the end is dropped."""
    return x.at[indices].add(rows, mode="drop", unique_indices=True)
