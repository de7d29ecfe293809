"""What a caller passes to a model, refused in one line where it cannot be used."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def token_array(name: str, tokens: Any, rows: int, ignored: int | None = None) -> jax.Array:
    """Token ids (B,S), whatever array or list of integers they come as.

    Under a JAX transform no values are seen, and JAX reads the nearest row of the embedding for an id beyond it.

    Args:
        name: of the argument, for the message.
        rows: of the embedding: ids are 0 to rows - 1.
        ignored: a further value that is allowed.

    Raises:
        ValueError: not integers of this shape, or an id without a row.
    """
    array = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if array.ndim != 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape (batch, sequence), not {array.dtype} of shape {tuple(array.shape)}"
        )
    if not isinstance(array, Tracer):
        ids = np.asarray(array)
        wrong = ids[((ids < 0) | (ids >= rows)) & (ids != ignored)]
        if wrong.size:
            raise ValueError(f"{name} holds {wrong[0]}, but the model's ids are 0 to {rows - 1}")
    return jnp.asarray(array)
