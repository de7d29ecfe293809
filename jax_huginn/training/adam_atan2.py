"""Adam-atan2 as used for the public Huginn: invariant to the scale of gradients, with update clipping per tensor.

With g the gradient and t the step, counted from 1. The moments start as the first gradient and its square:

    m = b1 m + (1 - b1) g;    v = max(b2 v + (1 - b2) g^2, 1e-12)
    u = atan2(m, sqrt(v) / sqrt(1 - b2^t)) / max(1, rms(g / sqrt(v))) / (1 - b1^t)

The atan2 of arXiv 2407.05872 replaces Adam's division; the rms is the update clipping of arXiv 1804.04235. Because m
starts at g rather than 0, dividing by 1 - b1^t enlarges the first steps instead of removing a bias. So did the public
run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPS = 1e-6  # floor of sqrt(v), as in the public run


class AdamAtan2State(NamedTuple):
    step: jax.Array
    """Number of steps done, int32."""
    mu: Any
    """First moment (m)."""
    nu: Any
    """Second moment (v), at least EPS^2."""


def scale_by_adam_atan2(b1: float, b2: float, is_stack: Callable[[Any, Any], bool]) -> optax.GradientTransformation:
    """Computes u of the module's docstring, before scaling by the learning rate.

    Args:
        is_stack: (path, leaf) -> whether the leaf stacks tensors along its first axis, as experts do; the rms is then
            taken for each of them.
    """

    def init(params: Any) -> AdamAtan2State:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamAtan2State(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamAtan2State]:
        del params
        gradients, first, step = updates, state.step == 0, state.step + 1

        def moment(g: jax.Array, m: jax.Array, decay: float) -> jax.Array:
            return jnp.where(first, g, decay * m + (1 - decay) * g)

        mu = jax.tree.map(lambda g, m: moment(g, m, b1), gradients, state.mu)
        nu = jax.tree.map(lambda g, v: jnp.maximum(moment(g**2, v, b2), EPS**2), gradients, state.nu)
        t = step.astype(float)  # float64 where x64 is enabled, for parity
        m_correction, v_correction = 1 - b1**t, jnp.sqrt(1 - b2**t)

        def direction(path: Any, g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            axes = tuple(range(1, g.ndim)) if is_stack(path, g) else None
            rms = jnp.sqrt(jnp.mean(g**2 / v, axes, keepdims=True))
            angle = jnp.arctan2(m, jnp.sqrt(v) / v_correction.astype(v.dtype))
            return angle / (jnp.maximum(1, rms) * m_correction.astype(rms.dtype))

        return jax.tree_util.tree_map_with_path(direction, gradients, mu, nu), AdamAtan2State(step, mu, nu)

    return optax.GradientTransformation(init, update)
