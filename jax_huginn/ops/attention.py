"""Causal attention: one signature, the library's kernels, and a plain einsum as their oracle.

Shapes: B batch, S sequence, H heads, K head width. Keys and values come already repeated to H heads, since
Huginn's qk_bias is added after the repeat.
"""

from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.ops.norm import at_least_float32


def causal_attention_oracle(q_BSHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array) -> jax.Array:
    """Softmax attention written out, at any precision: `jax.nn.dot_product_attention` keeps its softmax in
    float32, which leaves float64 results off by 6e-8.

    Heads are moved before positions first: on a CPU XLA's batched matmul is twice as fast in that layout.
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

    `implementation`: "xla", "cudnn" (NVIDIA, 16-bit types), "einsum" (the oracle), or "auto", see `resolve`.
    """
    implementation = resolve(implementation, q_BSHK.dtype, deterministic)
    if implementation == "einsum":
        y_BSHK = causal_attention_oracle(q_BSHK, k_BSHK, v_BSHK)
    else:
        kernel = cast(Literal["xla", "cudnn"], implementation)
        y_BSHK = jax.nn.dot_product_attention(q_BSHK, k_BSHK, v_BSHK, is_causal=True, implementation=kernel)
    return checkpoint_name(y_BSHK, "attention")


def resolve(
    implementation: str, dtype: jax.typing.DTypeLike, deterministic: bool = False, maker: str | None = None
) -> str:
    """The kernel that "auto" means for this type on a device of this maker ("cpu", "nvidia", "other"), the default
    device unless given; other names are returned as they are.

    cuDNN's backward pass is not reproducible, and XLA does not compile it under its flag for deterministic kernels.
    """
    if implementation != "auto":
        return implementation
    maker = maker or _maker_of_the_default_device()
    if jnp.dtype(dtype) == jnp.float64 or maker == "cpu":
        return "einsum"  # on a CPU the library's kernel is slower (docs/decisions.md)
    return "cudnn" if maker == "nvidia" and jnp.dtype(dtype).itemsize == 2 and not deterministic else "xla"


def _maker_of_the_default_device() -> str:
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    return "nvidia" if backend == "gpu" and "NVIDIA" in jax.devices()[0].device_kind else "other"
