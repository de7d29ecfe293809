"""RMSNorm in at least float32, scaled after the cast back as in the public Huginn."""

import jax
import jax.numpy as jnp
from jax import lax


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float32 for narrower types; float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm_oracle(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * weight` over the last axis; shape and type of `x`."""
    h, _ = _normalized(x, eps)
    return h.astype(x.dtype) * weight_D


# A gradient written by hand keeps `x` alone. Autodiff keeps, or under rematerialisation recomputes and stores, several
# float32 intermediates of its size (docs/performance.md).
rms_norm = jax.custom_vjp(rms_norm_oracle, nondiff_argnums=(2,))


def _forward(x: jax.Array, weight_D: jax.Array, eps: float):
    return rms_norm_oracle(x, weight_D, eps), (x, weight_D)


def _backward(eps: float, inputs: tuple[jax.Array, jax.Array], d_y: jax.Array):
    x, weight_D = inputs
    h, scale = _normalized(x, eps)
    d_y = d_y.astype(h.dtype)
    d_h = d_y * weight_D
    d_x = scale * (d_h - h * jnp.mean(d_h * h, axis=-1, keepdims=True))
    d_weight_D = jnp.sum(d_y * h.astype(x.dtype), axis=tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_weight_D.astype(weight_D.dtype)


rms_norm.defvjp(_forward, _backward)


def _normalized(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x / rms(x) and 1 / rms(x), in at least float32."""
    h = x.astype(at_least_float32(x.dtype))
    scale = lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return h * scale, scale
