"""The cache of generation: which recurrences it keeps apart, its size, and what exited tokens leave in it.

Recurrences count from 1. Recurrence i is written to slot (i - 1) mod r and read from there; the policies differ only in
the number of slots r. A token that ran j recurrences is read at recurrence i

    full    at min(i, j): as many slots as recurrences
    mod     at the last recurrence up to j that equals i modulo r, or at j if there is none: `budget` slots
    last    at j: one slot
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.config.checks import UserError, require
from jax_huginn.config.schema import Config
from jax_huginn.model.cache import KV, Cache

Policy = Literal["full", "mod", "last"]
POLICIES = ("full", "mod", "last")


def slots_of(policy: str, budget: int, recurrence: int) -> int:
    """Slots r that a policy keeps for `recurrence` recurrences."""
    require(policy in POLICIES, f"cache.policy={policy} must be full, mod or last")
    require(policy != "mod" or budget > 0, f"cache.budget={budget} must be positive with cache.policy=mod")
    return min({"full": recurrence, "mod": budget, "last": 1}[policy], recurrence)


def bytes_of(config: Config, rows: int, length: int, slots: int) -> int:
    """Size of a cache, without allocating it."""
    model = config.model
    layers = model.prelude_layers + slots * model.core_layers + model.coda_layers
    return 2 * layers * rows * length * model.kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize


def require_room(config: Config, rows: int, length: int, slots: int, limit: int | None = None) -> int:
    """The cache's bytes, if they fit into `limit`, by default what the device has free where it reports that.

    Raises:
        UserError: with the numbers.
    """
    size = bytes_of(config, rows, length, slots)
    limit = _free() if limit is None else limit
    if limit is not None and size > limit:
        raise UserError(
            f"the cache of {rows} rows x {length} positions x {slots} slots takes {_gigabytes(size)} and "
            f"{_gigabytes(limit)} are free: take fewer rows, shorter texts, or --cache.policy mod with a smaller budget"
        )
    return size


def _free() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def allocate(config: Config, rows: int, length: int, slots: int) -> Cache:
    """A cache of zeros with room for `length` positions."""
    model = config.model

    def blocks(count: int, slots: int) -> tuple[KV, ...]:
        shape = (slots, rows, length, model.kv_heads, model.head_dim)
        return tuple(KV(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)) for _ in range(count))

    return Cache(blocks(model.prelude_layers, 1), blocks(model.core_layers, slots), blocks(model.coda_layers, 1))


def place(
    kept: tuple[KV, ...], window: tuple[KV, ...], slot: int | jax.Array, where_BS: jax.Array | None = None
) -> tuple[KV, ...]:
    """`kept` with the first positions of a slot replaced by a cache of one slot, as a prompt leaves it; only `where_BS`
    holds, if given."""

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        start = (slot, *[jnp.zeros((), jnp.result_type(slot))] * (old.ndim - 1))
        if where_BS is not None:
            new = jnp.where(where_BS[..., None, None], new, lax.dynamic_slice(old, start, new.shape))
        return lax.dynamic_update_slice(old, new, start)

    return jax.tree.map(one, kept, window)


def fill_deeper(core: tuple[KV, ...], index_B: jax.Array, steps_B: jax.Array) -> tuple[KV, ...]:
    """The slots that a token did not reach in its `steps_B` recurrences get its last keys and values."""
    rows_B = jnp.arange(steps_B.shape[0])

    def fill(x_rBLGK: jax.Array) -> jax.Array:
        slots = x_rBLGK.shape[0]
        x_rBGK = x_rBLGK.at[:, rows_B, index_B].get(mode="clip")
        last_BGK = x_rBGK[(steps_B - 1) % slots, rows_B]
        unreached_rB = jnp.arange(slots)[:, None] >= steps_B
        x_rBGK = jnp.where(unreached_rB[..., None, None], last_BGK, x_rBGK)
        return x_rBLGK.at[:, rows_B, index_B].set(x_rBGK, mode="drop")

    return jax.tree.map(fill, core)
