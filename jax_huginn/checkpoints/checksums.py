"""A checksum of an array's values that is the same on every device count, layout and process.

Each element's bits are mixed with its index into 32 bits, one-to-one in the bits, and the results are added modulo
2^32. The sum has no order, so every device adds up what it holds; and a change within one element always shows. It is
computed where the array lies: a pass over the memory, no copy to the host.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # 8 bytes are two elements: uint64 needs x64


def checksums(tree: Any) -> dict[str, jax.Array]:
    """name -> checksum, a uint32 scalar still on the device, of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    # One program for all: on several devices each sum ends in an exchange, and XLA for CPUs may starve of threads on
    # many programs with exchanges that are under way at once.
    sums = _sums_of_bits([leaf for _, leaf in leaves])
    if jax.default_backend() == "cpu":
        jax.block_until_ready(sums)
    return dict(zip(names, sums, strict=True))


def checksum(array: jax.Array | np.ndarray) -> jax.Array:
    """Checksum of one array, from the device or the host; waits for nothing."""
    if isinstance(array, np.ndarray):  # as bits, since JAX would round float64 where x64 is off
        array = np.ascontiguousarray(array)
        words = array.reshape(*array.shape, 1).view(_UNSIGNED[array.dtype.itemsize])
        return _sum_of_bits(words.reshape(array.shape) if array.dtype.itemsize < 8 else words)
    return _sum_of_bits(array)


def as_hex(sums: dict[str, jax.Array]) -> dict[str, str]:
    """As they are written; waits for them."""
    return {name: f"{int(value):08x}" for name, value in jax.device_get(sums).items()}


def _bits_summed(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
        bits = array.astype(jnp.uint8)
    else:
        bits = lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = bits ^ (index * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # MurmurHash3's last steps, a bijection
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


_sum_of_bits = jax.jit(_bits_summed)
_sums_of_bits = jax.jit(lambda arrays: [_bits_summed(array) for array in arrays])
