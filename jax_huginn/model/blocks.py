"""The dense parts: norm, attention, gated MLP and the sandwich block (arXiv 2502.05171, section 3.2).

Parameters are stored in `model.param_dtype` and cast to `model.dtype` by the model, so the code here computes in the
type of its inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers
from jax_huginn.model.cache import KV
from jax_huginn.model.moe import MoE, Routing
from jax_huginn.ops.attention import cached_attention, causal_attention
from jax_huginn.ops.fp8 import matmul
from jax_huginn.ops.norm import rms_norm
from jax_huginn.ops.rope import apply_rope, rope_table
from jax_huginn.ops.swiglu import swiglu


class Positions(NamedTuple):
    """Positions of the tokens of a call."""

    angles: jax.Array
    """Rotary angles, (S,J,2), or (B,S,J,2) if sequences differ."""
    index_BS: jax.Array
    """Positions from 0. A token at a position past the end of the cache is not written to it."""
    row_B: jax.Array | None = None
    """Rows of the cache that the sequences are in, if they are not all of them in order."""


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight`, with a learned weight initialised to 1."""

    def __init__(self, config: Config):
        self.weight = nnx.Param(jnp.ones(config.model.width, config.model.param_dtype))
        self.eps = config.model.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and a learned bias on queries and keys."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, dtype = config.model, config.model.param_dtype
        heads, kv_heads, head_dim = model.heads, model.kv_heads, model.head_dim
        fused = (heads + 2 * kv_heads) * head_dim
        self.w_qkv = nnx.Param(initializers.matrix(config)(rngs.params(), (model.width, fused), dtype))
        self.qk_bias = nnx.Param(jnp.zeros((2, 1, heads, head_dim), dtype))
        shape = (heads * head_dim, model.width)
        self.w_out = nnx.Param(initializers.output_projection(config)(rngs.params(), shape, dtype))
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_base = model.rope_base
        self.implementation, self.deterministic = config.compute.attention, config.compute.deterministic

    def __call__(
        self, x_BSD: jax.Array, at: Positions, kv: KV | None = None, slot: int | jax.Array = 0
    ) -> tuple[jax.Array, KV | None]:
        """The output (B,S,D), and the cache, if given, with the keys and values of these tokens written to a slot."""
        q_BSHK, k_BSGK, v_BSGK = self.project(x_BSD)
        q_bias, k_bias = self.qk_bias[...]
        q_BSHK = apply_rope(q_BSHK + q_bias, at.angles)
        if kv is None:
            # The key bias too has a row per query head, so keys are copied to all heads before it is added.
            k_BSHK = apply_rope(self.to_all_heads(k_BSGK) + k_bias, at.angles)
            y_BSHK = self.causal(q_BSHK, k_BSHK, v_BSGK)
        else:
            y_BSHK, kv = self.cached(q_BSHK, k_BSGK, v_BSGK, k_bias, at, kv, slot)
        return checkpoint_name(matmul(y_BSHK.reshape(*x_BSD.shape[:2], -1), self.w_out.get_value()), "matmul"), kv

    def project(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B,S,H,K), keys and values (B,S,G,K), before bias and rotation."""
        batch, length, _ = x_BSD.shape
        fused = checkpoint_name(matmul(x_BSD, self.w_qkv.get_value()), "matmul")
        edges = (self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim)
        q, k, v = (part.reshape(batch, length, -1, self.head_dim) for part in jnp.split(fused, edges, axis=-1))
        return q, k, v

    def cached(self, q_BSHK, k_BSGK, v_BSGK, k_bias_1HK, at: Positions, kv: KV, slot) -> tuple[jax.Array, KV]:
        """Attention over the cache, to which these tokens are written first.

        The cache holds rope(k + bias) if every query head has its own key head. Otherwise it holds rope(k), and
        rope(bias) is added when the cache is read, which is equal because rotation is linear.
        """
        grouped, bias_LHK = self.kv_heads < self.heads, None
        k_BSGK = apply_rope(k_BSGK if grouped else k_BSGK + k_bias_1HK, at.angles)
        kv = kv.write(slot, at.index_BS, k_BSGK, v_BSGK, at.row_B)
        k_BLGK, v_BLGK = kv.read(slot, at.row_B)
        if grouped:
            angles_LJ2 = jnp.asarray(rope_table(kv.length, self.head_dim, self.rope_base))
            bias_LHK = apply_rope(jnp.broadcast_to(k_bias_1HK, (1, kv.length, *k_bias_1HK.shape[1:])), angles_LJ2)[0]
        if q_BSHK.shape[1] == kv.length:  # queries at every position: use the kernels for whole sequences
            k_BLHK = self.to_all_heads(k_BLGK) if bias_LHK is None else self.to_all_heads(k_BLGK) + bias_LHK
            return self.causal(q_BSHK, k_BLHK, v_BLGK), kv
        return cached_attention(q_BSHK, k_BLGK, v_BLGK, at.index_BS, bias_LHK), kv

    def causal(self, q_BSHK: jax.Array, k_BSHK: jax.Array, v_BSGK: jax.Array) -> jax.Array:
        return causal_attention(q_BSHK, k_BSHK, self.to_all_heads(v_BSGK), self.implementation, self.deterministic)

    def to_all_heads(self, x_BSGK: jax.Array) -> jax.Array:
        copies = self.heads // self.kv_heads
        return jnp.repeat(x_BSGK, copies, axis=2) if copies > 1 else x_BSGK


class GatedMLP(nnx.Module):
    """`w_proj(silu(gate) * up)`; one matrix yields [gate | up]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, hidden, dtype = config.model.width, config.model.mlp_width, config.model.param_dtype
        self.w_fc = nnx.Param(initializers.matrix(config)(rngs.params(), (width, 2 * hidden), dtype))
        self.w_proj = nnx.Param(initializers.output_projection(config)(rngs.params(), (hidden, width), dtype))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        gate_up = checkpoint_name(matmul(x_BSD, self.w_fc.get_value()), "gate_up")
        return checkpoint_name(matmul(swiglu(gate_up), self.w_proj.get_value()), "matmul")


class SandwichBlock(nnx.Module):
    """`x = norm_2(attn(norm_1(x)) + x); x = norm_4(mlp(norm_3(x)) + x)`, where `moe` replaces the MLP by a MoE."""

    def __init__(self, config: Config, rngs: nnx.Rngs, *, moe: bool = False):
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(config) for _ in range(4))
        self.attn = Attention(config, rngs)
        self.moe: MoE | None = MoE(config, rngs) if moe else None
        self.mlp: GatedMLP | None = None if moe else GatedMLP(config, rngs)

    def __call__(
        self, x_BSD: jax.Array, at: Positions, kv: KV | None = None, slot: int | jax.Array = 0
    ) -> tuple[jax.Array, Routing | None, KV | None]:
        """The output (B,S,D), the routing statistics of a MoE, and the updated cache."""
        y_BSD, kv = self.attn(self.norm_1(x_BSD), at, kv, slot)
        x_BSD = self.norm_2(y_BSD + x_BSD)
        y_BSD, routing = self.feed_forward(self.norm_3(x_BSD))
        return self.norm_4(y_BSD + x_BSD), routing, kv

    def feed_forward(self, x_BSD: jax.Array) -> tuple[jax.Array, Routing | None]:
        if self.moe is not None:
            return self.moe(x_BSD)
        assert self.mlp is not None
        return self.mlp(x_BSD), None
