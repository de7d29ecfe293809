"""Rotary position embedding of interleaved pairs (even, odd); the public configuration has base 50 000.

The letters of shapes are those of `jax_huginn.model`.
"""

import functools

import jax
import numpy as np

from jax_huginn.ops.norm import at_least_float32


@functools.lru_cache(maxsize=8)
def rope_table(length: int, head_dim: int, base: float) -> np.ndarray:
    """cos and sin of every angle, shape (length,J,2), float64.

    The angles are computed in float64; at position 4096 a float32 product is already off by 2e-4 radians.
    """
    frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def apply_rope(x_BSHK: jax.Array, angles_SJ2: jax.Array) -> jax.Array:
    """Rotates the pairs (x[2i], x[2i+1]) of every head by the angles of its position.

    Computes in at least float32 and returns the type of `x`.

    Args:
        angles_SJ2: rows of `rope_table`, (S,J,2), or (B,S,J,2) if sequences differ in their positions.
    """
    pairs = x_BSHK.reshape(*x_BSHK.shape[:-1], -1, 2).astype(at_least_float32(x_BSHK.dtype))
    angles = angles_SJ2.astype(pairs.dtype)[..., None, :, :]
    cos, sin = angles[..., :1], angles[..., 1:]
    # (even, odd) cos + (-odd, even) sin. Reversing the pairs fuses into the product; slicing and stacking even and odd
    # elements would be separate passes over memory, in the gradient too.
    turned = pairs * cos + pairs[..., ::-1] * (sin * np.array([-1, 1], pairs.dtype))
    return turned.reshape(x_BSHK.shape).astype(x_BSHK.dtype)
