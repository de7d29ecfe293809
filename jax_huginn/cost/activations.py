"""Bytes of activations on one device, by what `compute.remat` keeps for the backward pass and computes again in it.

Elements a token: D width, F MLP hidden width, H query heads, G key heads, K head width, E experts, A of them active,
M expert hidden width, S sequence.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jax_huginn.config.schema import Config
from jax_huginn.cost.shapes import Sizes, along
from jax_huginn.ops.grouped_mlp import CAPACITY
from jax_huginn.parallel.mesh import AXES

# Arrays of (H,S,S) in float32 of attention without a fused kernel, fitted to what XLA:CPU's compiled steps hold: a
# block's that the policy "none" keeps, a block's within a recurrence that goes backward, and those in hand there.
SCORES_KEPT, SCORES_NEEDED, SCORES_IN_HAND = 3, 1, 3


@dataclass(frozen=True)
class Activations:
    """Bytes for one device's sequences of a micro-batch."""

    config: Config
    sizes: Sizes
    fused_attention: bool
    """A kernel that never holds the (S,S) scores."""

    @property
    def tokens(self) -> int:
        train = self.config.train
        return train.batch_size // train.micro_batches // along(self.sizes, AXES) * train.sequence_length

    def bytes(self, elements: float) -> int:
        """Of so many elements a token in `model.dtype`."""
        return int(elements * self.tokens * jnp.dtype(self.config.model.dtype).itemsize)

    # ---- what is kept --------------------------------------------------------------------------------------------

    def outside(self) -> int:
        """Kept of prelude and MoE until the end, and what every recurrence receives of the embedding."""
        model, moe = self.config.model, self.config.moe
        kept = model.prelude_layers * (model.width + self._block(self.config.compute.remat))
        if moe.experts and moe.placement == "injection":
            kept += 2 * model.width + self._moe(
                self.config.compute.remat
            )  # its input, and its output, which a norm reads
        return self.bytes(kept + model.width)

    def coda(self) -> int:
        model = self.config.model
        return self.bytes(model.width + model.coda_layers * (model.width + self._block(self.config.compute.remat)))

    def recurrence(self, remat: str | None = None) -> int:
        """Bytes kept of a recurrence with gradient: its state, and what the policy (default: `compute.remat`) keeps."""
        model = self.config.model
        remat = remat or self.config.compute.remat
        adapter = 0 if remat in ("full", "attention") else model.width
        return self.bytes(model.width + adapter + model.core_layers * self._block(remat, core=True))

    # ---- what is there while a recurrence goes backward ------------------------------------------------------------

    def recomputed(self) -> int:
        """All of one recurrence beyond what is kept of it, and the gradients within one of its blocks."""
        model = self.config.model
        # Gradients of gate, up and their product; of queries, keys and values after and before RoPE; of the output.
        in_hand = 3 * self._hidden(core=True) + 6 * model.heads * model.head_dim + model.width
        in_hand += SCORES_IN_HAND * self._scores()
        if self.config.compute.remat == "none":
            return self.bytes(in_hand)
        needed = model.core_layers * (SCORES_NEEDED - SCORES_KEPT) * self._scores()
        if (
            self.config.compute.remat == "dots_except_gate_up"
        ):  # which every block can compute by itself when its turn comes
            needed -= (model.core_layers - 1) * 2 * self._hidden(core=True)
        return self.recurrence("none") - self.recurrence() + self.bytes(needed + in_hand)

    # ---- elements a token ----------------------------------------------------------------------------------------

    def _block(self, remat: str, core: bool = False) -> float:
        """Kept of a block apart from its input."""
        model = self.config.model
        heads_width = model.heads * model.head_dim
        if remat == "full":
            return 0
        if remat == "attention":
            return heads_width
        mlp = self._moe(remat) if self._moe_in(core) else self._mlp(remat)
        if remat != "none":  # queries, keys and values, attention, its projection
            return heads_width + 2 * model.kv_heads * model.head_dim + heads_width + model.width + mlp
        scores = SCORES_KEPT * self._scores()
        # The four norms' inputs and outputs as far as a matmul reads them; queries, keys, values and attention.
        return 5 * model.width + 4 * heads_width + scores + mlp

    def _mlp(self, remat: str) -> float:
        model = self.config.model
        if remat == "none":
            return 3 * model.mlp_width
        return 2 * model.mlp_width * (remat == "dots") + model.width

    def _moe(self, remat: str) -> float:
        """Gate and up of the shared and the routed experts, and what else is kept."""
        model, moe = self.config.model, self.config.moe
        if remat in ("full", "attention"):
            return 0
        routed = moe.active * CAPACITY
        if remat == "none":
            return moe.width * (3 + 2 * routed)
        return 2 * moe.width * (1 + routed) * (remat == "dots") + model.width

    def _hidden(self, core: bool) -> float:
        model, moe = self.config.model, self.config.moe
        return moe.width * (1 + moe.active * CAPACITY) if self._moe_in(core) else model.mlp_width

    def _moe_in(self, core: bool) -> bool:
        moe = self.config.moe
        return core and moe.experts > 0 and moe.placement == "core"

    def _scores(self) -> float:
        """An (H,S,S) array in elements of `model.dtype` a token."""
        model = self.config.model
        if self.fused_attention:
            return 0
        return model.heads * self.config.train.sequence_length * 4 / jnp.dtype(model.dtype).itemsize
