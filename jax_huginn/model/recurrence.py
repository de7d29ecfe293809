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
"""core(params, injected, s) -> (next s, routing); `injected` is what every recurrence receives of the embedding."""


class Recurrence(NamedTuple):
    """The state after the last recurrence and what was seen of the steps with gradient."""

    state_BSD: jax.Array
    routing: Routing | None
    residual: jax.Array
    """Mean over tokens of ||s_R - s_{R-1}||, in at least float32."""


def iterate(
    core: Core,
    params: Any,
    injected_BSD: jax.Array,
    state_BSD: jax.Array,
    n: Depth,
    k: Depth,
    scan_length: int,
    checkpoint: Callable[[Callable], Callable],
    unroll: bool,
) -> Recurrence:
    """Run `core` n + k times; gradients flow through the last k.

    `n` may be traced. `scan_length` is static and at least k; where k is traced it is the backpropagation depth, and
    the rare k below it skips steps by `lax.cond`. `checkpoint` is a `jax.checkpoint` of some policy; it must stand
    around the `cond`: inside it, plain differentiation of the `cond` would save the *weights* once per step, 19 GB
    more at 3.8 B (docs/decisions.md).
    """
    frozen_params, frozen_injected = lax.stop_gradient((params, injected_BSD))
    state_BSD = lax.stop_gradient(state_BSD)

    def frozen_step(state):
        return core(frozen_params, frozen_injected, state)[0]

    if scan_length == 0:  # evaluation: the last step is one without gradient
        state_BSD, previous_BSD = lax.fori_loop(
            0, n, lambda _, states: (frozen_step(states[0]), states[0]), (state_BSD, state_BSD)
        )
        _, routing = _zeros_like(jax.eval_shape(core, params, injected_BSD, state_BSD))
        return Recurrence(state_BSD, routing, _mean_distance(state_BSD, previous_BSD))
    state_BSD = lax.fori_loop(0, n, lambda _, state: frozen_step(state), state_BSD)

    def active_step(params, injected_BSD, state):
        new_state, routing = core(params, injected_BSD, state)
        return new_state, routing, _mean_distance(new_state, state)

    shapes = jax.eval_shape(active_step, params, injected_BSD, state_BSD)

    def skipped_step(params, injected_BSD, state):
        return state, *_zeros_like(shapes[1:])

    def step(params, injected_BSD, state, index):
        if isinstance(k, int):
            return active_step(params, injected_BSD, state)
        return lax.cond(index < k, active_step, skipped_step, params, injected_BSD, state)

    step = checkpoint(step)

    def scan_step(state, index):
        new_state, *seen = step(params, injected_BSD, state, index)
        return new_state, tuple(seen)

    state_BSD, (routings, residuals) = lax.scan(scan_step, state_BSD, jnp.arange(scan_length), unroll=unroll)
    routing = Routing.total(routings, k) if isinstance(routings, Routing) else None
    return Recurrence(state_BSD, routing, jnp.asarray(residuals)[k - 1])


def _zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _mean_distance(a_BSD: jax.Array, b_BSD: jax.Array) -> jax.Array:
    difference = lax.stop_gradient(a_BSD - b_BSD).astype(at_least_float32(a_BSD.dtype))
    return jnp.linalg.norm(difference, axis=-1).mean()
