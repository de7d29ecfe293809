"""Takase initialisation (arXiv 2312.16903, as the public Huginn uses it) and the reproducible initial state."""

import functools
import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_huginn.config.schema import Config

Initializer = Callable[[jax.Array, tuple[int, ...], jax.typing.DTypeLike], jax.Array]

STATE_STD = math.sqrt(2 / 5)
"""Std of s_0 before truncation at 3 std: sqrt(D) * sqrt(2 / (5 D)), independent of the width."""
ROUTER_STD = 0.02


def truncated_normal(std: float) -> Initializer:
    """Normal of this std, truncated at 3 std on both sides; the realised std is 0.987 of it."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return std * jax.random.truncated_normal(key, -3, 3, shape, dtype)

    return initialize


def matrix(config: Config) -> Initializer:
    """For every matrix except output projections, the embedding included: std sqrt(2 / (5 D))."""
    return truncated_normal(math.sqrt(2 / (5 * config.model.width)))


def output_projection(config: Config) -> Initializer:
    """For the last matrix of a residual branch: the std of `matrix` over sqrt(2 x effective depth)."""
    model = config.model
    depth = model.prelude_layers + model.core_layers * config.recurrence.mean + model.coda_layers
    return truncated_normal(math.sqrt(2 / (5 * model.width)) / math.sqrt(2 * depth))


def expert_output(config: Config) -> Initializer:
    """For w_down of the experts: `output_projection` in a residual branch, else `matrix`.

    At the injection without `moe.residual`, norm_moe follows the MoE, so that a small w_down would only enlarge its own
    gradient.
    """
    branch = config.moe.placement == "core" or config.moe.residual
    return output_projection(config) if branch else matrix(config)


def router(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    return ROUTER_STD * jax.random.normal(key, shape, dtype)


@functools.lru_cache(maxsize=1)
def _state_quantiles() -> np.ndarray:
    """The 2**16 equally likely values of s_0 in training, float32: evenly spaced quantiles of its distribution."""
    normal = statistics.NormalDist()
    lowest = normal.cdf(-3)
    shares = lowest + (1 - 2 * lowest) * (np.arange(2**16) + 0.5) / 2**16
    return np.array([STATE_STD * normal.inv_cdf(share) for share in shares], np.float32)


def random_state(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, first_row: int | jax.Array = 0
) -> jax.Array:
    """s_0 for training, (B,S,D), of the global rows starting at `first_row`.

    The state is bitwise the same on every mesh, device and version: each row has its own random bits, so a device can
    draw its rows alone, and the bits index a table, so the compiler has nothing to round.
    """
    rows = first_row + jnp.arange(shape[0], dtype=jnp.uint32)
    bits = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), shape[1:], jnp.uint16))(rows)
    return jnp.asarray(_state_quantiles())[bits].astype(dtype)


@functools.lru_cache(maxsize=4)
def fixed_state(seed: int, length: int, width: int, start: int = 0) -> np.ndarray:
    """s_0 outside training, (length,D), float32, for the absolute positions starting at `start`.

    A row depends on (seed, position) alone, so scores are independent of batch, padding and caching.
    `torch_reference/initial_state.py` holds the same recipe, also in NumPy; a parity test compares them bitwise.
    """
    rows = np.empty((length, width), np.float32)
    for row, position in enumerate(range(start, start + length)):
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
        draws = generator.standard_normal(width)
        while (outside := np.abs(draws) > 3).any():
            draws[outside] = generator.standard_normal(outside.sum())
        rows[row] = draws * STATE_STD
    rows.setflags(write=False)
    return rows
