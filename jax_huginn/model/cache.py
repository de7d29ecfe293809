"""Keys and values that attention keeps between calls, so that a new token costs one position.

A block's attention has r slots. The core writes recurrence i into one slot and reads that slot again, so r slots keep r
recurrences apart and fewer are shared between them. Prelude and coda have one slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class KV(NamedTuple):
    """Keys, already turned by their positions, and values of one block's attention."""

    k_rBLGK: jax.Array
    v_rBLGK: jax.Array

    @property
    def length(self) -> int:
        """Positions there is room for (L)."""
        return self.k_rBLGK.shape[2]

    def write(self, slot: int | jax.Array, index_BS: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> "KV":
        """With these positions of a slot replaced; `slot` is one for all rows or (B,). An index of L or more writes
        nothing, which is how a row that has stopped keeps what it has."""
        if k_BSGK.shape[1] == self.length and self.k_rBLGK.shape[0] == 1:  # all positions, hence a choice in place
            kept = (index_BS >= self.length)[..., None, None]
            return KV(*(jnp.where(kept, old, new) for old, new in zip(self, (k_BSGK[None], v_BSGK[None]), strict=True)))
        rows_B1 = jnp.arange(k_BSGK.shape[0])[:, None]
        slot_B1 = jnp.broadcast_to(slot, rows_B1.shape[:1])[:, None]
        at = (slot_B1, rows_B1, index_BS)
        return KV(self.k_rBLGK.at[at].set(k_BSGK, mode="drop"), self.v_rBLGK.at[at].set(v_BSGK, mode="drop"))

    def read(self, slot: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B,L,G,K) of a slot; a slot per row, (B,), is a gather and so a copy."""
        if self.k_rBLGK.shape[0] == 1:
            return self.k_rBLGK[0], self.v_rBLGK[0]
        if jnp.ndim(slot) == 0:
            k, v = (lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in self)
        else:
            k, v = (x[slot, jnp.arange(x.shape[1])] for x in self)
        return k, v


class Cache(NamedTuple):
    """What all blocks keep."""

    prelude: tuple[KV, ...]
    core: tuple[KV, ...]
    coda: tuple[KV, ...]
