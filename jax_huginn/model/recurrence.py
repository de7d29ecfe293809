"""Iterating the core: n steps without gradient, then k steps with (arXiv 2502.05171, section 3.3).

One compilation serves every sampled depth: the n steps are a `lax.fori_loop` with a traced bound. So are the k steps
where k is traced, with a gradient of their own; where k is static they are a `lax.scan` that autodiff sees through. A
scan to a maximal depth, or a `where(stop_gradient)` over all steps, would pay for every step on every draw.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.model.moe import Routing
from jax_huginn.ops.norm import at_least_float32

Depth = int | jax.Array
Core = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Routing | None]]
"""core(params, injected, s) -> (next s, routing); `injected` is what every recurrence receives of the embedding."""


# Unrolled steps whose weight gradients are added in one pass, and so are in memory together. The adding of eight moves
# 9 arrays of the core's size at once, 11 by fours, 15 by pairs and 21 one by one.
SUMMED_AT_ONCE = 4


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
    most: int,
    checkpoint: Callable[[Callable], Callable],
    unroll: bool,
) -> Recurrence:
    """Run `core` n + k times; gradients flow through the last k.

    `n` may be traced. A static k, 0 too, is a scan over `checkpoint(core)`, a `jax.checkpoint` of some policy; with
    `unroll` its steps are written out one after the other. A traced k, of 1 to `most`, is a loop whose backward pass
    keeps the states alone and recomputes a step at a time.
    """
    frozen_params, frozen_injected = lax.stop_gradient((params, injected_BSD))
    state_BSD = lax.stop_gradient(state_BSD)

    def frozen_step(state):
        return core(frozen_params, frozen_injected, state)[0]

    if isinstance(k, int) and k == 0:  # evaluation: the last step is one without gradient
        state_BSD, previous_BSD = lax.fori_loop(
            0, n, lambda _, states: (frozen_step(states[0]), states[0]), (state_BSD, state_BSD)
        )
        routing = _no_routing(core, params, injected_BSD, state_BSD)
        return Recurrence(state_BSD, routing, _mean_distance(state_BSD, previous_BSD))
    state_BSD = lax.fori_loop(0, n, lambda _, state: frozen_step(state), state_BSD)

    if not isinstance(k, int):
        after: Any = _loop(core, most, params, injected_BSD, state_BSD, k)
        state_BSD, routing, residual = after
        return Recurrence(state_BSD, routing and routing.averaged(k), residual)

    @checkpoint
    def step(params, injected_BSD, state):
        new_state, routing = core(params, injected_BSD, state)
        return new_state, (routing, _mean_distance(new_state, state))

    if unroll:
        every_step = []
        for index in range(k):
            if (k - index) % SUMMED_AT_ONCE == 0:  # the gradients of the steps from here on are added up
                params, injected_BSD, state_BSD = _backward_in_order(params, injected_BSD, state_BSD)
            inputs = _backward_in_order(params, injected_BSD, state_BSD)  # this step's own gradients are finished
            state_BSD, seen = step(*inputs)
            every_step.append(seen)
        routings, residuals = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every_step)
    else:
        state_BSD, (routings, residuals) = lax.scan(
            lambda state, _: step(params, injected_BSD, state), state_BSD, length=k
        )
    routing = Routing.total(routings) if isinstance(routings, Routing) else None
    return Recurrence(state_BSD, routing, jnp.asarray(residuals)[-1])


@jax.custom_vjp
def _backward_in_order(*values: Any):
    """The values themselves. In the backward pass all their gradients, as far as they are summed up by there, are
    finished before what lies before is begun: left to itself the compiler puts off weight gradients that nothing waits
    for, and so keeps activations, kept and recomputed ones, of many steps (docs/performance.md)."""
    return values


_backward_in_order.defvjp(lambda *values: (values, None), lambda _, gradients: lax.optimization_barrier(gradients))


# ---- A traced number of steps with gradient -------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(core: Core, most: int, params: Any, injected_BSD: jax.Array, state_BSD: jax.Array, k: jax.Array):
    """The state after k steps, the sum of their routing statistics and the last step's residual."""
    return _loop_forward(core, most, params, injected_BSD, state_BSD, k)[0]


def _loop_forward(core, most, params, injected_BSD, state_BSD, k):
    def step(index, carry):
        state, states, routing, _ = carry
        states = lax.dynamic_update_index_in_dim(states, state, index, axis=0)
        new_state, seen = core(params, injected_BSD, state)
        return new_state, states, jax.tree.map(jnp.add, routing, seen), _mean_distance(new_state, state)

    states = jnp.zeros((most, *state_BSD.shape), state_BSD.dtype)
    routing = _no_routing(core, params, injected_BSD, state_BSD)
    residual = jnp.zeros((), at_least_float32(state_BSD.dtype))
    state_BSD, states, routing, residual = lax.fori_loop(0, k, step, (state_BSD, states, routing, residual))
    return (state_BSD, routing, residual), (params, injected_BSD, states, k)


def _loop_backward(core, most, kept, cotangents):
    params, injected_BSD, states, k = kept
    d_state_BSD, d_routing, _ = cotangents  # every step's statistics have the cotangent of their sum

    def step(index, carry):
        sums, d_state = carry
        _, vjp = jax.vjp(core, params, injected_BSD, states[k - 1 - index])
        *gradients, d_state = vjp((d_state, d_routing))
        return jax.tree.map(jnp.add, sums, tuple(gradients)), d_state

    zeros = jax.tree.map(jnp.zeros_like, (params, injected_BSD))
    (d_params, d_injected_BSD), d_state_BSD = lax.fori_loop(0, k, step, (zeros, d_state_BSD))
    return d_params, d_injected_BSD, d_state_BSD, None


_loop.defvjp(_loop_forward, _loop_backward)


def _no_routing(core: Core, *inputs: Any) -> Routing | None:
    _, routing = jax.eval_shape(core, *inputs)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), routing)


def _mean_distance(a_BSD: jax.Array, b_BSD: jax.Array) -> jax.Array:
    difference = lax.stop_gradient(a_BSD - b_BSD).astype(at_least_float32(a_BSD.dtype))
    return jnp.linalg.norm(difference, axis=-1).mean()
