"""Iterating the core: n steps without gradient, then k steps with (arXiv 2502.05171, section 3.3).

One compilation serves every sampled depth. The n steps are a `lax.fori_loop` with a traced bound. So are the k steps if
k is traced, with a gradient of their own; if k is static they are a `lax.scan`, or unrolled, and autodiff sees through.
A scan to the largest depth, or `where(stop_gradient)` over all steps, would pay for every step on every draw.
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
Step = Callable[[Any, jax.Array], tuple[jax.Array, Routing | None]]
"""step(inputs, s) -> (next s, routing); `inputs` are the weights and the injected embedding, read by every step."""

# Number of unrolled steps whose weight gradients are summed together. Larger groups save memory traffic (summing 8
# gradients moves 9 core-sized arrays in one group, 11 in fours, 15 in pairs, 21 singly) but keep more gradients alive.
SUMMED_AT_ONCE = 4


class Plan(NamedTuple):
    """How the steps with gradient are computed, for any k."""

    most: int
    """Upper bound of a traced k."""
    checkpoint: Callable[[Callable], Callable]
    """`jax.checkpoint` with a policy; wraps every step if k is static."""
    unroll: bool
    """Unroll a static number of steps instead of scanning over them."""


class Recurrence(NamedTuple):
    """The state after the last recurrence, with the statistics of the steps with gradient."""

    state_BSD: jax.Array
    routing: Routing | None
    residual: jax.Array
    """Mean over tokens of ||s_R - s_{R-1}||, in at least float32."""


def iterate(step: Step, inputs: Any, state_BSD: jax.Array, n: Depth, k: Depth, plan: Plan) -> Recurrence:
    """Run `step` n + k times, with gradients through the last k.

    n may be traced. A static k, 0 included, is a scan over checkpointed steps or its unrolled form. A traced k, from 1
    to `plan.most`, is a loop that keeps only the states and recomputes one step at a time in the backward pass.
    """
    frozen = lax.stop_gradient(inputs)
    state_BSD = lax.stop_gradient(state_BSD)

    def frozen_step(state):
        return step(frozen, state)[0]

    if isinstance(k, int) and k == 0:  # evaluation: the residual is that of a step without gradient
        state_BSD, previous_BSD = lax.fori_loop(
            0, n, lambda _, states: (frozen_step(states[0]), states[0]), (state_BSD, state_BSD)
        )
        return Recurrence(state_BSD, _no_routing(step, inputs, state_BSD), _mean_distance(state_BSD, previous_BSD))
    state_BSD = lax.fori_loop(0, n, lambda _, state: frozen_step(state), state_BSD)

    if not isinstance(k, int):
        after: Any = _loop(step, plan.most, inputs, state_BSD, k)
        state_BSD, routing, residual = after
        return Recurrence(state_BSD, routing and routing.averaged(k), residual)

    @plan.checkpoint
    def checkpointed(inputs, state):
        new_state, routing = step(inputs, state)
        return new_state, (routing, _mean_distance(new_state, state))

    if plan.unroll:
        every_step = []
        for index in range(k):
            if (k - index) % SUMMED_AT_ONCE == 0:  # sum the gradients of the steps from here to the end
                inputs, state_BSD = _backward_in_order(inputs, state_BSD)
            state_BSD, seen = checkpointed(*_backward_in_order(inputs, state_BSD))
            every_step.append(seen)
        routings, residuals = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every_step)
    else:
        state_BSD, (routings, residuals) = lax.scan(lambda state, _: checkpointed(inputs, state), state_BSD, length=k)
    routing = Routing.total(routings) if isinstance(routings, Routing) else None
    return Recurrence(state_BSD, routing, jnp.asarray(residuals)[-1])


@jax.custom_vjp
def _backward_in_order(*values: Any):
    """Identity. In the backward pass, a barrier: all gradients accumulated so far must be complete before an earlier
    step's backward pass starts. Without it the compiler delays weight gradients, since nothing waits for them, and
    keeps the activations of many steps alive (docs/performance.md)."""
    return values


_backward_in_order.defvjp(lambda *values: (values, None), lambda _, gradients: lax.optimization_barrier(gradients))


# ---- A traced number of steps with gradient -------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(step: Step, most: int, inputs: Any, state_BSD: jax.Array, k: jax.Array):
    """The state after k steps, the sum of their routing statistics and the last step's residual."""
    return _loop_forward(step, most, inputs, state_BSD, k)[0]


def _loop_forward(step, most, inputs, state_BSD, k):
    def forward(index, carry):
        state, states, routing, _ = carry
        states = lax.dynamic_update_index_in_dim(states, state, index, axis=0)
        new_state, seen = step(inputs, state)
        return new_state, states, jax.tree.map(jnp.add, routing, seen), _mean_distance(new_state, state)

    states = jnp.zeros((most, *state_BSD.shape), state_BSD.dtype)
    routing = _no_routing(step, inputs, state_BSD)
    residual = jnp.zeros((), at_least_float32(state_BSD.dtype))
    state_BSD, states, routing, residual = lax.fori_loop(0, k, forward, (state_BSD, states, routing, residual))
    return (state_BSD, routing, residual), (inputs, states, k)


def _loop_backward(step, most, kept, cotangents):
    inputs, states, k = kept
    d_state_BSD, d_routing, _ = cotangents  # the cotangent of the sum is that of every step's statistics

    def backward(index, carry):
        sums, d_state = carry
        _, vjp = jax.vjp(step, inputs, states[k - 1 - index])
        gradients, d_state = vjp((d_state, d_routing))
        return jax.tree.map(jnp.add, sums, gradients), d_state

    zeros = jax.tree.map(jnp.zeros_like, inputs)
    d_inputs, d_state_BSD = lax.fori_loop(0, k, backward, (zeros, d_state_BSD))
    return d_inputs, d_state_BSD, None


_loop.defvjp(_loop_forward, _loop_backward)


def _no_routing(step: Step, *arguments: Any) -> Routing | None:
    _, routing = jax.eval_shape(step, *arguments)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), routing)


def _mean_distance(a_BSD: jax.Array, b_BSD: jax.Array) -> jax.Array:
    difference = lax.stop_gradient(a_BSD - b_BSD).astype(at_least_float32(a_BSD.dtype))
    return jnp.linalg.norm(difference, axis=-1).mean()
