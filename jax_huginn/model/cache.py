"""Key/value cache, so that a new token costs one position instead of the whole sequence.

Every block of the core has r slots. A recurrence writes its keys and values to one slot and reads that slot, so as many
slots as recurrences keep all of them apart, and fewer slots are shared. Blocks of prelude and coda have one slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class KV(NamedTuple):
    """Rotated keys, and values, of one block's attention."""

    k_rBLGK: jax.Array
    v_rBLGK: jax.Array

    @property
    def length(self) -> int:
        """Number of positions (L)."""
        return self.k_rBLGK.shape[2]

    def write(
        self,
        slot: int | jax.Array,
        index_BS: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        row_B: jax.Array | None = None,
    ) -> "KV":
        """A copy with these positions of a slot replaced.

        Args:
            slot: one for all rows, or (B,).
            index_BS: the positions. Nothing is written at an index of L or more, so rows that have stopped are kept.
            row_B: the rows of the cache, if they are not all of them in order.
        """
        if (
            k_BSGK.shape[1] == self.length and self.k_rBLGK.shape[0] == 1
        ):  # all positions: a select in place of a scatter
            kept = (index_BS >= self.length)[..., None, None]
            return KV(*(jnp.where(kept, old, new) for old, new in zip(self, (k_BSGK[None], v_BSGK[None]), strict=True)))
        rows_B1 = (jnp.arange(k_BSGK.shape[0]) if row_B is None else row_B)[:, None]
        slot_B1 = jnp.broadcast_to(slot, rows_B1.shape[:1])[:, None]
        at = (slot_B1, rows_B1, index_BS)
        return KV(self.k_rBLGK.at[at].set(k_BSGK, mode="drop"), self.v_rBLGK.at[at].set(v_BSGK, mode="drop"))

    def read(self, slot: int | jax.Array, row_B: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B,L,G,K) of a slot: one for all rows, a slice, or (B,), a gather.

        For a single query XLA fuses a gather with what reads it, at no cost, where it may copy a slice.
        """
        slots, rows = self.k_rBLGK.shape[:2]
        if row_B is None and slots == 1:
            return self.k_rBLGK[0], self.v_rBLGK[0]
        if row_B is None and jnp.ndim(slot) == 0:
            k, v = (lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in self)
            return k, v
        place = (0 if slots == 1 else slot, jnp.arange(rows) if row_B is None else row_B)
        k, v = (x.at[place].get(mode="promise_in_bounds") for x in self)
        return k, v


class Cache(NamedTuple):
    """The caches of all blocks."""

    prelude: tuple[KV, ...]
    core: tuple[KV, ...]
    coda: tuple[KV, ...]
