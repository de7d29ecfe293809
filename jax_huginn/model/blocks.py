"""The dense parts: norm, attention, gated MLP and the sandwich block (arXiv 2502.05171, section 3.2).

Shapes: B batch, S sequence, D width, H heads, G key/value heads, K head width, F MLP hidden width.
Modules hold parameters in `model.param_dtype`; the model casts them to `model.dtype` before it runs, so the
code here computes in whatever type its inputs have.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.config.schema import Config
from jax_huginn.model import initializers
from jax_huginn.model.moe import MoE, Routing
from jax_huginn.ops.attention import causal_attention
from jax_huginn.ops.norm import rms_norm
from jax_huginn.ops.rope import apply_rope
from jax_huginn.ops.swiglu import swiglu


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` with a learned weight, 1 at the start."""

    def __init__(self, config: Config):
        self.weight = nnx.Param(jnp.ones(config.model.width, config.model.param_dtype))
        self.eps = config.model.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Causal self-attention with a learned bias on queries and keys and rotary positions."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, dtype = config.model, config.model.param_dtype
        heads, kv_heads, head_dim = model.heads, model.kv_heads, model.head_dim
        fused = (heads + 2 * kv_heads) * head_dim
        self.w_qkv = nnx.Param(initializers.matrix(config)(rngs.params(), (model.width, fused), dtype))
        self.qk_bias = nnx.Param(jnp.zeros((2, 1, heads, head_dim), dtype))
        shape = (heads * head_dim, model.width)
        self.w_out = nnx.Param(initializers.output_projection(config)(rngs.params(), shape, dtype))
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.implementation, self.deterministic = config.compute.attention, config.compute.deterministic

    def __call__(self, x_BSD: jax.Array, rope_SK2: jax.Array) -> jax.Array:
        q, k, v = self.project(x_BSD, rope_SK2)
        y_BSHK = causal_attention(q, k, v, self.implementation, self.deterministic)
        return checkpoint_name(y_BSHK.reshape(*x_BSD.shape[:2], -1) @ self.w_out[...], "matmul")

    def project(self, x_BSD: jax.Array, rope_SK2: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, biased and turned, and values; each (B,S,H,K)."""
        batch, length, _ = x_BSD.shape
        fused = checkpoint_name(x_BSD @ self.w_qkv[...], "matmul")
        edges = (self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim)
        q, k, v = (part.reshape(batch, length, -1, self.head_dim) for part in jnp.split(fused, edges, axis=-1))
        repeats = self.heads // self.kv_heads
        if repeats > 1:
            # Before the bias: qk_bias has a row per query head, also for keys.
            k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        q_bias, k_bias = self.qk_bias[...]
        return apply_rope(q + q_bias, rope_SK2), apply_rope(k + k_bias, rope_SK2), v


class GatedMLP(nnx.Module):
    """`w_proj(silu(gate) * up)`, gate and up from one matrix, gate first."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, hidden, dtype = config.model.width, config.model.mlp_width, config.model.param_dtype
        self.w_fc = nnx.Param(initializers.matrix(config)(rngs.params(), (width, 2 * hidden), dtype))
        self.w_proj = nnx.Param(initializers.output_projection(config)(rngs.params(), (hidden, width), dtype))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        gate_up = checkpoint_name(x_BSD @ self.w_fc[...], "gate_up")
        return checkpoint_name(swiglu(gate_up) @ self.w_proj[...], "matmul")


class SandwichBlock(nnx.Module):
    """`x = norm_2(attn(norm_1(x)) + x); x = norm_4(mlp(norm_3(x)) + x)`; a MoE may stand in the MLP's place."""

    def __init__(self, config: Config, rngs: nnx.Rngs, *, moe: bool = False):
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(config) for _ in range(4))
        self.attn = Attention(config, rngs)
        if moe:
            self.moe = MoE(config, rngs)
        else:
            self.mlp = GatedMLP(config, rngs)

    def __call__(self, x_BSD: jax.Array, rope_SK2: jax.Array) -> tuple[jax.Array, Routing | None]:
        x_BSD = self.norm_2(self.attn(self.norm_1(x_BSD), rope_SK2) + x_BSD)
        normed = self.norm_3(x_BSD)
        y_BSD, routing = self.moe(normed) if hasattr(self, "moe") else (self.mlp(normed), None)
        return self.norm_4(y_BSD + x_BSD), routing
