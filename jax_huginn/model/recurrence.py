"""Iterating the core: n steps without gradient, then k steps with (arXiv 2502.05171, section 3.3).

`lax.fori_loop` with a traced bound and a `lax.scan` of fixed length let one compilation serve every sampled depth. A
scan to a maximal depth, or a `where(stop_gradient)` over all steps, would pay for every step on every draw.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.model.moe import Routing
from jax_huginn.ops.norm import at_least_float32

Depth = int | jax.Array
Core = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Routing | None]]
"""core(params, e, s) -> (next s, routing)."""


class Recurrence(NamedTuple):
    """The state after the last recurrence and what was seen of the steps with gradient."""

    state_BSD: jax.Array
    routing: Routing | None
    residual: jax.Array
    """Mean over tokens of ||s_R - s_{R-1}||; 0 where k = 0."""


def iterate(
    core: Core,
    params: Any,
    e_BSD: jax.Array,
    state_BSD: jax.Array,
    n: Depth,
    k: Depth,
    scan_length: int,
    checkpoint: Callable[[Callable], Callable],
) -> Recurrence:
    """Run `core` n + k times; gradients flow through the last k.

    `n` may be traced. `scan_length` is static and at least k; where k is traced it is the backpropagation depth, and
    the rare k below it skips steps by `lax.cond`. `checkpoint` is a `jax.checkpoint` of some policy; it must stand
    around the `cond`: inside it, plain differentiation of the `cond` would save the *weights* once per step, 22 GB of
    them at 3.8 B (docs/decisions.md).
    """
    frozen_params, frozen_e = lax.stop_gradient((params, e_BSD))
    state_BSD = lax.fori_loop(
        0, n, lambda _, state: core(frozen_params, frozen_e, state)[0], lax.stop_gradient(state_BSD)
    )

    def active_step(params, e_BSD, state):
        new_state, routing = core(params, e_BSD, state)
        difference = lax.stop_gradient(new_state - state).astype(at_least_float32(state.dtype))
        return new_state, routing, jnp.linalg.norm(difference, axis=-1).mean()

    shapes = jax.eval_shape(active_step, params, e_BSD, state_BSD)

    def skipped_step(params, e_BSD, state):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return state, *zeros[1:]

    def step(params, e_BSD, state, index):
        if isinstance(k, int):
            return active_step(params, e_BSD, state)
        return lax.cond(index < k, active_step, skipped_step, params, e_BSD, state)

    step = checkpoint(step)

    def scan_step(state, index):
        new_state, *seen = step(params, e_BSD, state, index)
        return new_state, tuple(seen)

    state_BSD, (routings, residuals) = lax.scan(scan_step, state_BSD, jnp.arange(scan_length))
    residual = residuals.at[k - 1].get(mode="fill", fill_value=0) if scan_length else jnp.zeros(())
    routing = None if routings is None else Routing.total(routings, k)
    return Recurrence(state_BSD, routing, residual)
