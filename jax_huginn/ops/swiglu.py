"""`silu(gate) * up` of the dense MLPs, on the fused output of one matmul.

Shapes: (..., 2F) in, gate first; (..., F) out.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.ops.norm import at_least_float32


def swiglu_oracle(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up of [gate | up] along the last axis."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


# The gradient is written by hand: under rematerialisation autodiff recomputes six arrays of the hidden width, stores
# each, and joins the halves in one more pass. Here a single pass reads gate, up and cotangent (docs/performance.md).
swiglu = jax.custom_vjp(swiglu_oracle)


def _forward(gate_up: jax.Array):
    return swiglu_oracle(gate_up), gate_up


def _backward(gate_up: jax.Array, d_hidden: jax.Array):
    halves = gate_up.reshape(*gate_up.shape[:-1], 2, -1).astype(at_least_float32(gate_up.dtype))
    gate, up = halves[..., :1, :], halves[..., 1:, :]
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = gate * sigmoid
    # A select over an axis of two, not a concatenation, which XLA would not fuse with what comes before it.
    half = lax.broadcasted_iota(jnp.int32, halves.shape, halves.ndim - 2)
    d_halves = jnp.where(half == 0, d_gate, d_up) * d_hidden[..., None, :]
    return (d_halves.reshape(gate_up.shape).astype(gate_up.dtype),)


swiglu.defvjp(_forward, _backward)
