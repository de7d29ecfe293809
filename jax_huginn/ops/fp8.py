"""Matmuls in 8-bit floats, for the weights that every recurrence reads (`compute.fp8`).

    y   = (e4m3(x / r) @ e4m3(w / c)) * r * c            r: a scale per token of x,   c: a scale of the weight
    d_x = (e5m2(d_y / r) @ e4m3(w / c).T) * r * c        r: a scale per token of d_y
    d_w = x.T @ d_y                                      in the type of x

A scale brings the largest value to the largest number of the 8-bit type. None is remembered between steps: all are
taken from the values at hand, so a checkpoint has nothing to store.

The letters of shapes are those of `jax_huginn.model`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.ops.norm import at_least_float32

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """`weight / scale` in e4m3, in both orders: Hopper's 8-bit matmuls want the summed axis last on both sides."""

    weight_IO: jax.Array
    weight_OI: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A weight together with its copies, to be given to `matmul` in the place of the weight alone."""

    weight_IO: jax.Array
    copies: Copies


def copies_of(weight_IO: jax.Array) -> Copies:
    """The 8-bit copies of a weight, without gradient."""
    rows, scale = quantized(lax.stop_gradient(weight_IO), FORWARD, axis=None)
    # Without the barrier XLA quantises twice; turning the 8-bit copy around moves fewer bytes.
    rows = lax.optimization_barrier(rows)
    return Copies(rows, rows.T, scale)


def matmul(x: jax.Array, weight: jax.Array | Fp8Weight) -> jax.Array:
    """x @ weight for x (...,I), in 8-bit floats if the weight comes with its copies."""
    if isinstance(weight, Fp8Weight):
        return _matmul(x, weight.weight_IO, weight.copies)
    return x @ weight


def quantized(x: jax.Array, dtype: jax.typing.DTypeLike, axis: int | None = -1) -> tuple[jax.Array, jax.Array]:
    """`x / scale` in an 8-bit type, and the scale of each row, or with axis=None of the whole, in at least float32.

    If one value that shares a scale is not finite, all of them become NaN.
    """
    precise = x.astype(at_least_float32(x.dtype))
    largest = jnp.max(jnp.abs(precise), axis=axis, keepdims=True)
    scale = jnp.maximum(largest / float(jnp.finfo(dtype).max), jnp.finfo(precise.dtype).tiny)
    return (precise / scale).astype(dtype), scale


@jax.custom_vjp
def _matmul(x: jax.Array, weight_IO: jax.Array, copies: Copies) -> jax.Array:
    return _product(x, FORWARD, copies.weight_OI, copies.scale)


def _forward(x: jax.Array, weight_IO: jax.Array, copies: Copies):
    return _matmul(x, weight_IO, copies), (x, copies)


def _backward(kept: tuple[jax.Array, Copies], d_y: jax.Array):
    x, copies = kept
    d_x = _product(d_y, BACKWARD, copies.weight_IO, copies.scale)
    tokens = tuple(range(x.ndim - 1))
    return d_x, lax.dot_general(x, d_y, ((tokens, tokens), ((), ()))), None


_matmul.defvjp(_forward, _backward)


def _product(x: jax.Array, dtype: jax.typing.DTypeLike, copy: jax.Array, scale: jax.Array) -> jax.Array:
    """x (...,I) times the transpose of a copy (O,I), both with their scales; (...,O) in the type of x."""
    rows, row_scale = quantized(x, dtype)
    y = lax.dot_general(rows, copy, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    return (y * (row_scale * scale[0])).astype(x.dtype)
