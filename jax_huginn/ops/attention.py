"""Causal attention over a whole sequence and attention of new tokens over a cache, each with its oracle.

The letters of shapes are those of `jax_huginn.model`.
"""

from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.ops.norm import at_least_float32


def causal_attention_oracle(q_BSHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array) -> jax.Array:
    """Softmax attention written out. Exact in float64, where `jax.nn.dot_product_attention` is off by 6e-8 because it
    computes its softmax in float32.

    Heads are transposed in front of positions, a layout in which XLA's batched matmul is twice as fast on CPUs.
    """
    dtype = at_least_float32(q_BSHK.dtype)
    length = q_BSHK.shape[1]
    q_BHSK, k_BHSK, v_BHSK = (x.swapaxes(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    scores = jnp.einsum("bhsk,bhtk->bhst", q_BHSK, k_BHSK, preferred_element_type=dtype) * q_BSHK.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("bhst,bhtk->bhsk", weights, v_BHSK).swapaxes(1, 2)


def causal_attention(
    q_BSHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, implementation: str = "auto", deterministic: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v under a causal mask, shape (B,S,H,K).

    Args:
        implementation: "xla", "cudnn" (NVIDIA, 16-bit types), "einsum" (the oracle) or "auto", see `resolve`.
    """
    implementation = resolve(implementation, q_BSHK.dtype, deterministic)
    if implementation == "einsum":
        y_BSHK = causal_attention_oracle(q_BSHK, k_BSHK, v_BSHK)
    else:
        kernel = cast(Literal["xla", "cudnn"], implementation)
        y_BSHK = jax.nn.dot_product_attention(q_BSHK, k_BSHK, v_BSHK, is_causal=True, implementation=kernel)
    return checkpoint_name(y_BSHK, "attention")


def cached_attention_oracle(
    q_BSHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, index_BS: jax.Array, k_bias_LHK: jax.Array | None = None
) -> jax.Array:
    """`cached_attention` with keys and values copied to all H heads and an explicit mask."""
    dtype = at_least_float32(q_BSHK.dtype)
    copies = q_BSHK.shape[2] // k_BLGK.shape[2]
    k_BLHK, v_BLHK = (jnp.repeat(x, copies, axis=2) for x in (k_BLGK, v_BLGK))
    k_BLHK = k_BLHK if k_bias_LHK is None else k_BLHK + k_bias_LHK
    scores = jnp.einsum("bshk,blhk->bhsl", q_BSHK, k_BLHK, preferred_element_type=dtype) * q_BSHK.shape[-1] ** -0.5
    visible_BSL = jnp.arange(k_BLGK.shape[1]) <= index_BS[:, :, None]
    weights = jax.nn.softmax(jnp.where(visible_BSL[:, None], scores, -jnp.inf), axis=-1).astype(v_BLGK.dtype)
    return jnp.einsum("bhsl,blhk->bshk", weights, v_BLHK)


def cached_attention(
    q_BSHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, index_BS: jax.Array, k_bias_LHK: jax.Array | None = None
) -> jax.Array:
    """Attention of queries at positions `index_BS` over the cached positions up to their own, shape (B,S,H,K).

    Each key head serves its h = H / G query heads without being copied. A key bias per query head, `k_bias_LHK`, enters
    as q . bias in the scores, which avoids the copies too.
    """
    dtype = at_least_float32(q_BSHK.dtype)
    batch, length, heads, head_dim = q_BSHK.shape
    q_BSGhK = q_BSHK.reshape(batch, length, k_BLGK.shape[2], -1, head_dim)
    scores = jnp.einsum("bsgnk,blgk->bgnsl", q_BSGhK, k_BLGK, preferred_element_type=dtype)
    scores = scores.reshape(batch, heads, length, -1)
    if k_bias_LHK is not None:
        scores += jnp.einsum("bshk,lhk->bhsl", q_BSHK, k_bias_LHK, preferred_element_type=dtype)
    visible_BSL = jnp.arange(k_BLGK.shape[1]) <= index_BS[:, :, None]
    scores = jnp.where(visible_BSL[:, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BLGK.dtype).reshape(batch, *q_BSGhK.shape[2:4], length, -1)
    return jnp.einsum("bgnsl,blgk->bsgnk", weights, v_BLGK).reshape(q_BSHK.shape)


def resolve(
    implementation: str, dtype: jax.typing.DTypeLike, deterministic: bool = False, maker: str | None = None
) -> str:
    """The kernel that "auto" selects; any other name is returned unchanged.

    Args:
        maker: "cpu", "nvidia" or "other"; that of the default device if None.
        deterministic: rules out cuDNN, whose backward pass is not reproducible and which XLA refuses to compile under
            its flag for deterministic kernels.
    """
    if implementation != "auto":
        return implementation
    maker = maker or _maker_of_the_default_device()
    if jnp.dtype(dtype) == jnp.float64 or maker == "cpu":
        return "einsum"  # faster on CPUs than the library's kernel (docs/decisions.md)
    return "cudnn" if maker == "nvidia" and jnp.dtype(dtype).itemsize == 2 and not deterministic else "xla"


def _maker_of_the_default_device() -> str:
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    return "nvidia" if backend == "gpu" and "NVIDIA" in jax.devices()[0].device_kind else "other"
