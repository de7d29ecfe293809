"""Statistics of the recurrence that are logged with a training step."""

import jax
import jax.numpy as jnp

from jax_huginn.ops.norm import at_least_float32
from jax_huginn.parallel.mesh import batch_mean


def recurrence_statistics(state_BSD: jax.Array, y_BSD: jax.Array, residual: jax.Array) -> dict[str, jax.Array]:
    """Scalars over all devices, without gradients.

    Args:
        state_BSD: s_R, the last state.
        y_BSD: the coda's output after norm_f.
        residual: mean of ||s_R - s_{R-1}|| over this device's tokens.
    """
    state, y = (jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype)) for x in (state_BSD, y_BSD))
    norm = batch_mean(jnp.linalg.norm(state, axis=-1).mean())
    residual = batch_mean(residual)
    return {
        "recurrent_residual": residual,
        "rel_residual": residual / norm,
        "recurrent_state_norm": norm,
        "recurrent_state_token_corr": batch_mean(_token_correlation(state)),
        "last_hidden_token_corr": batch_mean(_token_correlation(y)),
    }


def _token_correlation(x_BSD: jax.Array) -> jax.Array:
    """Mean correlation between different tokens of a sequence; near 1 if the state has collapsed.

    The mean of all pairwise products of unit vectors is the squared norm of their mean.
    """
    x_BSD = x_BSD - x_BSD.mean(axis=-1, keepdims=True)
    x_BSD = x_BSD / jnp.maximum(jnp.linalg.norm(x_BSD, axis=-1, keepdims=True), 1e-30)
    return jnp.mean(jnp.sum(x_BSD.mean(axis=1) ** 2, axis=-1)) - 1 / x_BSD.shape[1]
