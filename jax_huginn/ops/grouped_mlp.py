"""Routed SwiGLU experts: every token through the experts it chose, dropless.

Shapes: T tokens, D width, E experts, A experts per token, M expert hidden width, C slots per expert.

`grouped_mlp_oracle` runs every expert on every token. `grouped_mlp` gathers each expert's tokens into C slots and
runs one batched matmul over the experts. XLA wants a static C while the largest group is known only at run time, so
a `lax.switch` picks the smallest sufficient C from a short list; the last one holds every token, hence nothing is
ever dropped. The gradient is written by hand: autodiff would save the residuals of every branch and turn each gather
into a scatter-add, while here dispatch and combine are each other's transpose and both are gathers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Slots per expert relative to an even split. Larger groups fall through to "every token".
CAPACITY_FACTORS = (1.125, 1.25, 1.5, 2.0, 3.0)


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
    nothing, as under expert parallelism; `experts_in_all`, E by default, says over how many the tokens spread when they
    spread evenly. Differentiable in everything but `experts_TA`.
    """

    def branch(slots: _Slots) -> jax.Array:
        x_ECD = slots.dispatch(x_TD)
        hidden_ECM = jax.nn.silu(_each(x_ECD, w_gate_EDM)) * _each(x_ECD, w_up_EDM)
        y_TAD = slots.collect(_each(hidden_ECM, w_down_EMD))
        return jnp.einsum("tad,ta->td", y_TAD, weights_TA.astype(x_TD.dtype))

    return _smallest_sufficient(experts_TA, w_gate_EDM.shape[0], experts_in_all, branch)


def _forward(x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD, experts_in_all):
    inputs = (x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD)
    return grouped_mlp(*inputs, experts_in_all), inputs


def _backward(experts_in_all, inputs, d_y_TD):
    x_TD, experts_TA, weights_TA, w_gate_EDM, w_up_EDM, w_down_EMD = inputs

    def branch(slots: _Slots):
        x_ECD, d_y_ECD = slots.dispatch(x_TD), slots.dispatch(d_y_TD)
        weight_EC1 = slots.dispatch_assignments(weights_TA.astype(x_TD.dtype))[..., None]
        gate, up = _each(x_ECD, w_gate_EDM), _each(x_ECD, w_up_EDM)
        hidden, silu_vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
        # <y, d_y> = <w_down hidden, d_y> = <hidden, w_down^T d_y>: the router's gradient without recomputing y.
        d_hidden = _each(d_y_ECD, jnp.swapaxes(w_down_EMD, 1, 2))
        d_weight_EC = jnp.sum((hidden * d_hidden).astype(weights_TA.dtype), axis=-1)
        d_gate, d_up = silu_vjp(weight_EC1 * d_hidden)
        d_x_ECD = _each(d_gate, jnp.swapaxes(w_gate_EDM, 1, 2)) + _each(d_up, jnp.swapaxes(w_up_EDM, 1, 2))
        return (
            slots.collect(d_x_ECD).sum(axis=1),
            slots.collect(d_weight_EC[..., None])[..., 0],
            jnp.einsum("ecd,ecm->edm", x_ECD, d_gate),
            jnp.einsum("ecd,ecm->edm", x_ECD, d_up),
            jnp.einsum("ecm,ecd->emd", weight_EC1 * hidden, d_y_ECD),
        )

    d_x_TD, d_weights_TA, *d_experts = _smallest_sufficient(experts_TA, w_gate_EDM.shape[0], experts_in_all, branch)
    return d_x_TD, None, d_weights_TA, *d_experts


grouped_mlp.defvjp(_forward, _backward)


class _Groups(NamedTuple):
    """The assignments (token, choice) sorted by expert."""

    experts_TA: jax.Array
    order: jax.Array  # the assignment at each place of the sorted list
    rank_TA: jax.Array  # each assignment's place within its expert's group
    first_E: jax.Array  # where each expert's group starts and ends in the sorted list
    end_E: jax.Array


def _group(experts_TA: jax.Array, experts: int) -> _Groups:
    assignments = experts_TA.reshape(-1)
    order = jnp.argsort(assignments, stable=True)
    ids, in_order = jnp.arange(experts), assignments[order]
    first_E, end_E = (jnp.searchsorted(in_order, ids, side=side) for side in ("left", "right"))
    rank_TA = jnp.argsort(order).reshape(experts_TA.shape) - first_E.at[experts_TA].get(mode="clip")
    return _Groups(experts_TA, order, rank_TA, first_E, end_E)


class _Slots:
    """The (E, C) grid of slots over the groups: a map from slots to assignments and its inverse."""

    def __init__(self, groups: _Groups, capacity: int):
        experts = groups.first_E.size
        place_EC = groups.first_E[:, None] + jnp.arange(capacity)
        assignment_EC = groups.order.at[place_EC].get(mode="clip")
        self.active = groups.experts_TA.shape[1]
        self.assignment_EC = jnp.where(place_EC < groups.end_E[:, None], assignment_EC, groups.order.size)
        self.slot_TA = jnp.where(
            groups.experts_TA < experts, groups.experts_TA * capacity + groups.rank_TA, experts * capacity
        )

    def dispatch(self, x_TD: jax.Array) -> jax.Array:
        """Each slot's token, zeros in empty slots: (E,C,D)."""
        return x_TD.at[self.assignment_EC // self.active].get(mode="fill", fill_value=0)

    def dispatch_assignments(self, values_TA: jax.Array) -> jax.Array:
        """Each slot's value, zeros in empty slots: (E,C)."""
        return values_TA.reshape(-1).at[self.assignment_EC].get(mode="fill", fill_value=0)

    def collect(self, y_ECD: jax.Array) -> jax.Array:
        """Each assignment's row, zeros where its expert is not here: (T,A,D)."""
        rows = y_ECD.reshape(-1, y_ECD.shape[-1])
        return rows.at[self.slot_TA].get(mode="fill", fill_value=0)


def _each(x_ECI: jax.Array, w_EIO: jax.Array) -> jax.Array:
    """One matmul per expert: (E,C,I) by (E,I,O)."""
    return jnp.einsum("eci,eio->eco", x_ECI, w_EIO)


def _smallest_sufficient(
    experts_TA: jax.Array, experts: int, experts_in_all: int | None, branch: Callable[[_Slots], object]
):
    """Run `branch` with the fewest slots per expert, of a short list, that hold the largest group."""
    groups = _group(experts_TA, experts)
    tokens, active = experts_TA.shape
    even = tokens * active / (experts_in_all or experts)
    capacities = sorted({min(tokens, 8 + int(even * factor) // 8 * 8) for factor in CAPACITY_FACTORS} | {tokens})
    index = jnp.searchsorted(jnp.array(capacities), jnp.max(groups.end_E - groups.first_E))
    return lax.switch(index, [lambda capacity=capacity: branch(_Slots(groups, capacity)) for capacity in capacities])
