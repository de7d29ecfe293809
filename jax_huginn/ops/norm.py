"""RMSNorm, computed in at least float32 and scaled after the cast back, as the public Huginn does."""

import jax
import jax.numpy as jnp
from jax import lax


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float32 for narrower types, else the type itself, so that float64 stays float64 throughout."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * weight` over the last axis; shape and type of `x`."""
    h = x.astype(at_least_float32(x.dtype))
    h = h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return h.astype(x.dtype) * weight_D
