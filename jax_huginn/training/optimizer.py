"""AdamW on float32 master weights and its learning-rate schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_huginn.config.schema import Config


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate of optimiser step t, counted from 0; the first step already moves."""
    optimizer, steps = config.optimizer, config.train.steps
    peak, floor = optimizer.learning_rate, optimizer.final_fraction

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, float)  # float64 where x64 is enabled, for parity
        warmup = jnp.minimum(1.0, (t + 1) / max(optimizer.warmup_steps, 1))
        if optimizer.schedule == "cosine":
            span = max(steps - optimizer.warmup_steps, 1)
            progress = jnp.clip((t - optimizer.warmup_steps) / span, 0.0, 1.0)
            decay = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            decay = jnp.clip((steps - t) / max(optimizer.cooldown_steps, 1), 0.0, 1.0)
        return peak * warmup * (floor + (1 - floor) * decay)

    return schedule


def decayed(params: Any) -> Any:
    """True for the matrices, which are decayed; False for norms and biases."""

    def is_matrix(path, leaf) -> bool:
        return leaf.ndim >= 2 and getattr(path[-1], "key", None) != "qk_bias"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101)."""
    optimizer = config.optimizer
    base = optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
        ),
    )
    return base if optimizer.moment_dtype == "float32" else kept_in(base, optimizer.moment_dtype)


def kept_in(base: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`base`, computing as before, with its floating-point state stored in `dtype` between updates.

    optax's own `mu_dtype` narrows the first moment only.
    """

    def cast(state: Any, dtype: jax.typing.DTypeLike) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = base.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(base.init(params), dtype), update)
