"""SwiGLU of a dense MLP, whose gate and up are one fused matrix, and of an expert, which keeps them apart.

The letters of shapes are those of `jax_huginn.model`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_huginn.ops.norm import at_least_float32


def swiglu_oracle(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up of [gate | up] along the last axis: (..., 2F) to (..., F)."""
    return gated(*jnp.split(gate_up, 2, axis=-1))


# A gradient written by hand is a single pass over gate, up and cotangent. Under rematerialisation autodiff recomputes
# and stores six arrays of the hidden width and joins the halves in another pass (docs/performance.md).
swiglu = jax.custom_vjp(swiglu_oracle)


def _forward(gate_up: jax.Array):
    return swiglu_oracle(gate_up), gate_up


def _backward(gate_up: jax.Array, d_hidden: jax.Array):
    halves = gate_up.reshape(*gate_up.shape[:-1], 2, -1).astype(at_least_float32(gate_up.dtype))
    gate, up = halves[..., :1, :], halves[..., 1:, :]
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = gate * sigmoid
    # A select over an axis of two: XLA does not fuse a concatenation with its inputs.
    half = lax.broadcasted_iota(jnp.int32, halves.shape, halves.ndim - 2)
    d_halves = jnp.where(half == 0, d_gate, d_up) * d_hidden[..., None, :]
    return (d_halves.reshape(gate_up.shape).astype(gate_up.dtype),)


swiglu.defvjp(_forward, _backward)


# ---- An expert's MLP ------------------------------------------------------------------------------------------------


def expert_mlp(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array) -> jax.Array:
    """w_down(silu(w_gate x) * (w_up x)) of tokens (T,D) for one expert, or (E,C,D) for a stack of E experts."""
    return gated(*gate_and_up(x, w_gate, w_up)) @ w_down


def gate_and_up(x: jax.Array, w_gate: jax.Array, w_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first matmuls of an expert, named so that `model.remat` can keep them."""
    return checkpoint_name(x @ w_gate, "gate_up"), checkpoint_name(x @ w_up, "gate_up")


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up
