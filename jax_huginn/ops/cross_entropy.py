"""Cross-entropy of a tied head that never materialises the (B,S,V) logits.

Labels are already the next tokens; positions labelled `IGNORE` do not count. The letters of shapes are those of
`jax_huginn.model`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jax_huginn.ops.norm import at_least_float32

IGNORE = -100


def token_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in at least float32, zero where ignored; shape of `labels`."""
    logits = logits.astype(at_least_float32(logits.dtype))
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels == IGNORE, 0, jax.nn.logsumexp(logits, axis=-1) - chosen)


def cross_entropy_oracle(y_BSD: jax.Array, head_VD: jax.Array, labels_BS: jax.Array) -> jax.Array:
    """Mean loss over the labels that count, from the full logits."""
    return token_losses(y_BSD @ head_VD.T, labels_BS).sum() / _count(labels_BS, y_BSD.dtype)


def most_likely(y_BSD: jax.Array, head_VD: jax.Array, chunk: int) -> jax.Array:
    """The most likely next tokens, (B,S) int32, holding the logits of about `chunk` tokens at a time."""
    batch, length, _ = y_BSD.shape
    y, _ = _chunks(y_BSD, jnp.zeros((batch, length), jnp.int32), chunk)
    best = lax.map(lambda y_BsD: jnp.argmax(y_BsD @ head_VD.T, axis=-1), y)
    return jnp.moveaxis(best, 0, 1).reshape(batch, -1)[:, :length].astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(y_BSD: jax.Array, head_VD: jax.Array, labels_BS: jax.Array, chunk: int) -> jax.Array:
    """Mean loss over the labels that count, holding the logits of about `chunk` tokens at a time.

    The sequence is what is cut, so a batch sharded over devices stays sharded. Under differentiation the forward pass
    computes the gradient as well, while a chunk's logits exist: three matmuls per chunk instead of four.
    """

    def one_chunk(total, chunk_of):
        y_BsD, labels_Bs = chunk_of
        return total + token_losses(y_BsD @ head_VD.T, labels_Bs).sum(), None

    zero = jnp.zeros((), at_least_float32(y_BSD.dtype))
    total, _ = lax.scan(one_chunk, zero, _chunks(y_BSD, labels_BS, chunk))
    return total / _count(labels_BS, y_BSD.dtype)


def _forward(y_BSD, head_VD, labels_BS, chunk):
    dtype = at_least_float32(y_BSD.dtype)
    scale = 1 / _count(labels_BS, dtype)

    def one_chunk(carry, chunk_of):
        total, d_head_VD = carry
        y_BsD, labels_Bs = chunk_of
        logits = y_BsD @ head_VD.T
        losses = token_losses(logits, labels_Bs)
        d_logits = jax.nn.softmax(logits.astype(dtype), axis=-1) - jax.nn.one_hot(labels_Bs, head_VD.shape[0])
        d_logits = jnp.where(labels_Bs[..., None] == IGNORE, 0, d_logits * scale).astype(y_BsD.dtype)
        d_head_VD += jnp.einsum("bcv,bcd->vd", d_logits, y_BsD, preferred_element_type=dtype)
        return (total + losses.sum(), d_head_VD), d_logits @ head_VD

    start = (jnp.zeros((), dtype), jnp.zeros(head_VD.shape, dtype))
    (total, d_head_VD), d_y = lax.scan(one_chunk, start, _chunks(y_BSD, labels_BS, chunk))
    batch, length, width = y_BSD.shape
    d_y_BSD = jnp.moveaxis(d_y, 0, 1).reshape(batch, -1, width)[:, :length]
    return total * scale, (d_y_BSD, d_head_VD.astype(head_VD.dtype))


def _backward(chunk, gradients, d_loss):
    d_y_BSD, d_head_VD = gradients
    return d_y_BSD * d_loss.astype(d_y_BSD.dtype), d_head_VD * d_loss.astype(d_head_VD.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _count(labels_BS: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Number of labels that count, at least 1, so that a batch without any has loss 0."""
    return jnp.maximum(jnp.sum(labels_BS != IGNORE), 1).astype(at_least_float32(dtype))


def _chunks(y_BSD: jax.Array, labels_BS: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Equal pieces of the sequence, the last one padded with ignored positions: (pieces,B,s,D) and (pieces,B,s)."""
    batch, length, width = y_BSD.shape
    pieces = max(1, min(length, -(-batch * length // chunk)))
    size = -(-length // pieces)
    pieces = -(-length // size)
    padding = pieces * size - length
    y_BSD = jnp.pad(y_BSD, ((0, 0), (0, padding), (0, 0)))
    labels_BS = jnp.pad(labels_BS, ((0, 0), (0, padding)), constant_values=IGNORE)
    return (
        jnp.moveaxis(y_BSD.reshape(batch, pieces, size, width), 1, 0),
        jnp.moveaxis(labels_BS.reshape(batch, pieces, size), 1, 0),
    )
