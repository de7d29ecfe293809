"""Routed SwiGLU experts: every token through the experts it chose, dropless.

Shapes: T tokens, D width, E experts, A experts per token, M expert hidden width, C slots per expert, K tokens of a
block.

`grouped_mlp_oracle` runs every expert on every token. `grouped_mlp` gathers up to C tokens of each expert, a little
more than an even share, and runs one batched matmul over the experts. What an expert received beyond C goes through it
in blocks of K tokens, in a loop whose length is known only at run time: shapes are static, nothing is ever dropped, and
the cost follows the tokens, not the largest group. The gradient is written by hand: autodiff cannot reverse that loop,
and would turn each gather into a scatter-add, while dispatch and combine are each other's transpose and both gathers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.ops.swiglu import expert_mlp, gate_and_up, gated

CAPACITY = 1.125  # slots per expert relative to an even split: a balanced router's largest group is about 1.12
BLOCKS = 4  # blocks of tokens in an expert's capacity; smaller ones leave a GPU idle
COUNTED = 128  # assignments that are counted by one row of a triangular matmul

_T = TypeVar("_T")


def grouped_mlp_oracle(x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD):
    """The sum over a token's experts of weight * w_down(silu(w_gate x) * (w_up x)), every expert on every token."""
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
    """Same result as `grouped_mlp_oracle`, shape (T,D).

    `experts_TA` holds different experts for each token; an entry of E or more is an expert that is not here and adds
    nothing, as under expert parallelism, where `experts_in_all` says over how many the tokens spread (default: E).
    Differentiable in everything but `experts_TA`.
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

    def add_block(expert, assignments_K, y_TD):
        tokens_K = assignments_K // groups.active
        x_KD = _rows(x_TD, tokens_K)
        y_KD = expert_mlp(x_KD, w_gate_EDM[expert], w_up_EDM[expert], w_down_EMD[expert])
        return _add_rows(y_TD, tokens_K, _rows(weights.reshape(-1, 1), assignments_K) * y_KD)

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
        x_T, hidden_T = jnp.swapaxes(x, -1, -2), jnp.swapaxes(weight * hidden, -1, -2)
        return d_x, d_weight, x_T @ d_gate, x_T @ d_up, hidden_T @ d_y

    x_ECD, d_y_ECD = _rows(x_TD, groups.tokens_EC), _rows(d_y_TD, groups.tokens_EC)
    weight_EC1 = _rows(flat_weights, groups.assignments_EC)
    d_x_ECD, d_weight_EC1, *d_experts = backward(x_ECD, d_y_ECD, weight_EC1, gate, up, w_gate_EDM, w_up_EDM, w_down_EMD)
    d_x_TD = groups.collect(d_x_ECD).sum(axis=1)
    d_flat_weights = groups.collect(d_weight_EC1).reshape(-1, 1)

    def add_block(expert, assignments_K, sums):
        d_x_TD, d_flat_weights, d_experts = sums
        tokens_K = assignments_K // groups.active
        x_KD, d_y_KD = _rows(x_TD, tokens_K), _rows(d_y_TD, tokens_K)
        weight_K1 = _rows(flat_weights, assignments_K)
        w_gate, w_up, w_down = w_gate_EDM[expert], w_up_EDM[expert], w_down_EMD[expert]
        d_x_KD, d_weight_K1, *d_expert = backward(
            x_KD, d_y_KD, weight_K1, *gate_and_up(x_KD, w_gate, w_up), w_gate, w_up, w_down
        )
        d_experts = [d_all.at[expert].add(d) for d_all, d in zip(d_experts, d_expert, strict=True)]
        d_flat_weights = _add_rows(d_flat_weights, assignments_K, d_weight_K1)
        return _add_rows(d_x_TD, tokens_K, d_x_KD), d_flat_weights, d_experts

    sums = groups.for_each_block(add_block, (d_x_TD, d_flat_weights, d_experts))
    d_x_TD, d_flat_weights, d_experts = sums
    return d_x_TD, None, d_flat_weights.reshape(weights_TA.shape), *d_experts


grouped_mlp.defvjp(_forward, _backward)


class _Groups:
    """Which assignment, a (token, choice) pair counted token by token, stands where. None is T*A, beyond the last.

    Of an expert's list of assignments, the first C have a slot, the others form blocks of K.
    """

    def __init__(self, experts_TA: jax.Array, experts: int, experts_in_all: int | None):
        tokens, self.active = experts_TA.shape
        assigned = experts_TA.reshape(-1)
        self.capacity = min(_round_up(CAPACITY * assigned.size / (experts_in_all or experts)), tokens)
        self.block_size = min(_round_up(self.capacity / BLOCKS), tokens - self.capacity)

        rank_N, sizes_E = ranks(assigned, experts)
        self.ends_E = jnp.cumsum(sizes_E)  # where each expert's list ends when the lists stand one after the other
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
            self.blocks_E = jnp.cumsum(-(-over_E // self.block_size))  # of all experts up to this one

    def for_each_block(self, body: Callable[[jax.Array, jax.Array, _T], _T], sums: _T) -> _T:
        """sums = body(expert, assignments_K, sums) for every block; as many as there are at run time."""
        if not self.block_size:  # every token has a slot, whatever it chooses
            return sums

        def step(index, sums):
            expert = jnp.sum(self.blocks_E <= index)
            before = jnp.where(expert > 0, self.blocks_E[expert - 1], 0)
            begin = self.begins_E[expert] + self.capacity + (index - before) * self.block_size
            return body(expert, self._listed(begin + jnp.arange(self.block_size), self.ends_E[expert]), sums)

        return lax.fori_loop(0, self.blocks_E[-1], step, sums)

    def collect(self, y_ECD: jax.Array) -> jax.Array:
        """Each assignment's row, zeros where it has no slot: (T,A,D)."""
        return _rows(y_ECD.reshape(-1, y_ECD.shape[-1]), self.slot_TA)

    def _listed(self, places: jax.Array, end: jax.Array) -> jax.Array:
        """The assignments at places of the lists, none from `end` on."""
        return jnp.where(places < end, self.lists.at[places].get(mode="clip"), self.lists.size)


def ranks(experts_N: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Each assignment's place, in order, among those to its expert, (N,) int32, and how many each expert has, (E,).

    The place is -1 where the expert is E or more.
    """
    here_NE = experts_N[:, None] == jnp.arange(experts)
    counts_NE = _running_counts(here_NE)
    return jnp.sum(jnp.where(here_NE, counts_NE, 0), axis=1) - 1, counts_NE[-1]


def _running_counts(here_NE: jax.Array) -> jax.Array:
    """Inclusive cumulative sums along the first axis, int32.

    By two triangular matmuls: a sort, `searchsorted` or `cumsum` are dozens of dependent small kernels on a GPU. Exact:
    factors are at most `COUNTED`, sums are float32 below 2^24.
    """
    count, experts = here_NE.shape
    padded = jnp.pad(here_NE, ((0, -count % COUNTED), (0, 0))).astype(jnp.float32)
    blocks_BCE = padded.reshape(-1, COUNTED, experts)
    within_BCE = jnp.einsum("ij,bje->bie", jnp.tri(COUNTED), blocks_BCE)
    before_BE = jnp.tri(len(blocks_BCE), k=-1) @ within_BCE[:, -1]
    return (within_BCE + before_BE[:, None]).reshape(-1, experts)[:count].astype(jnp.int32)


def _round_up(size: float) -> int:
    """To a multiple of 8, at least 8."""
    return max(math.ceil(size / 8) * 8, 8)


def _rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of x, zeros where the index lies beyond its last."""
    return x.at[indices].get(mode="fill", fill_value=0)


def _add_rows(x: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
    """x with rows added at different indices; an index beyond the last is dropped."""
    return x.at[indices].add(rows, mode="drop", unique_indices=True)
