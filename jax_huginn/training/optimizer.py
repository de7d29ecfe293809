"""Optimisers of the master weights, the groups of weights they update and decay, and learning rate schedules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jax_huginn.config.schema import Config
from jax_huginn.model.parameters import Group, group_of
from jax_huginn.training.adam_atan2 import scale_by_adam_atan2

MUON_MOMENTUM = 0.95  # as in Keller Jordan's Muon, torch.optim.Muon and optax
MUON_RMS = 0.2  # rms of an update, about that of AdamW, so that both share a learning rate (arXiv 2502.16982)


# ---- Schedule -----------------------------------------------------------------------------------------------------


def make_schedule(config: Config) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Learning rate of step t, counted from 0, at which it is already above 0."""
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


# ---- Groups of weights --------------------------------------------------------------------------------------------


def _where(*groups: Group) -> Callable[[Any], Any]:
    """params -> tree of booleans, true for parameters of these groups."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: group_of(path) in groups, params)


decayed = _where("embedding", "router", "matrix", "expert stack")
"""All weights except norms and biases."""
in_muon = _where("matrix", "expert stack")
"""Hidden matrices. AdamW updates the embedding, which is also the head, and the router, a head over experts."""


# ---- Optimisers ---------------------------------------------------------------------------------------------------


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimiser named by `optimizer.name`."""
    base = optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        {"adamw": _adamw, "adam_atan2": _adam_atan2, "muon": _muon}[config.optimizer.name](config),
    )
    return base if config.optimizer.moment_dtype == "float32" else kept_in(base, config.optimizer.moment_dtype)


def _adamw(config: Config) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101); a step decays a weight by learning rate * weight decay of its value."""
    optimizer = config.optimizer
    return optax.adamw(
        make_schedule(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.decay,
        mask=decayed,
    )


def _adam_atan2(config: Config) -> optax.GradientTransformation:
    """Adam-atan2 of the public run; a step decays a weight by learning rate / peak * weight decay of its value."""
    optimizer = config.optimizer
    return optax.chain(
        scale_by_adam_atan2(optimizer.b1, optimizer.b2, lambda path, _: group_of(path) == "expert stack"),
        optax.add_decayed_weights(optimizer.decay / optimizer.learning_rate, decayed),
        optax.scale_by_learning_rate(make_schedule(config)),
    )


def _muon(config: Config) -> optax.GradientTransformation:
    """Muon on the hidden matrices, each expert's separately, and AdamW on the rest, with one learning rate and decay.

    The rest uses `_adamw`, because `optax.contrib.muon` would give it Nesterov momentum, b2 0.999 and no decay. It
    would also count 3-D expert stacks to the rest, and embedding and router to the matrices.
    """
    optimizer = config.optimizer
    muon = optax.contrib.muon(
        make_schedule(config),
        beta=MUON_MOMENTUM,
        weight_decay=optimizer.decay,
        consistent_rms=MUON_RMS,
        # (..., in, out): leading axes are a batch of matrices.
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params
        ),
    )
    return optax.partition(
        {True: muon, False: _adamw(config)},
        in_muon,  # pyright: ignore[reportArgumentType]  labels need only be hashable
    )


def kept_in(base: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`base` with its moments stored in `dtype` between updates and computed in float32.

    optax's own `mu_dtype` affects the first moment only.
    """

    def cast(state: Any, dtype: jax.typing.DTypeLike) -> Any:
        # Only the moments, which map to parameters: Muon also keeps its coefficients in the state.
        return optax.tree.map_params(base, lambda x: x.astype(dtype), state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = base.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(base.init(params), dtype), update)
